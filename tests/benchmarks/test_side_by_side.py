"""What the longer of two lanes allows, side by side: between the longer one and one after the other."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark_modules import benchmark_module
from long_runs import examples

pytest.importorskip("torch")
_MODULE = benchmark_module("side_by_side")

_SECONDS = st.floats(0.0, 1.0, allow_nan=False)
_RATIOS = st.floats(1.0, 3.0)


def _known(compute: float, copy: float) -> Any:
    return _MODULE.Slower(compute=compute, copy=copy, host=1.0, rows_beside=9)


@settings(max_examples=examples(60), deadline=None)
@given(_SECONDS, _SECONDS)
def test_lanes_that_do_not_hinder_each_other_take_the_longer(compute: float, copy: float) -> None:
    assert _MODULE.together_s(compute, copy, _known(1.0, 1.0)) == pytest.approx(max(compute, copy))


@settings(max_examples=examples(60), deadline=None)
@given(_SECONDS, _SECONDS, _RATIOS, _RATIOS)
def test_work_is_done_at_the_rates_given(compute: float, copy: float, slow: float, slower: float) -> None:
    known = _known(slow, slower)
    both = _MODULE.together_s(compute, copy, known)
    assert both >= max(compute, copy) - 1e-12
    # While both run each does its work at its own rate; the one that is left alone does it at full speed.
    shared = min(compute * slow, copy * slower)
    left = (compute - shared / slow) + (copy - shared / slower)
    assert both == pytest.approx(shared + left)
