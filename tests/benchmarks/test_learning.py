"""How much of a machine's errors two of its lines can explain."""

from __future__ import annotations

import numpy as np
import pytest

from benchmark_modules import benchmark_module


@pytest.mark.parametrize(("between", "within"), [(0.2, 0.1), (0.1, 0.2), (0.0, 0.2), (0.3, 0.0)])
def test_the_share_that_is_common_to_a_machine_is_found_again(between: float, within: float) -> None:
    rng = np.random.default_rng(5)
    groups = [rng.normal(rng.normal(0.05, between), within, rng.integers(2, 9)).tolist() for _ in range(3000)]
    wanted = between**2 / (between**2 + within**2)
    assert benchmark_module("learning").common_share([*groups, [1.0], []]) == pytest.approx(wanted, abs=0.03)


def test_machines_of_one_line_say_nothing_of_it() -> None:
    assert benchmark_module("learning").common_share([[1.0], [2.0], [], [1.0, 2.0]]) is None
