"""What the longer of two lanes allows, side by side: between the longer one and one after the other."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
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


def _run(parts: list[list[int]], disturbed: list[list[bool]]) -> Any:
    """A run of these parts, in milliseconds: the first step is a prompt's."""
    shape = np.array(parts)
    ends = shape.sum(axis=1).cumsum() * 10**6
    return types.SimpleNamespace(
        part_ns=shape * 10**6, disturbed=np.array(disturbed), step_phase=np.array([0] + [1] * (len(parts) - 1)),
        step_begin_ns=ends - shape.sum(axis=1) * 10**6, step_end_ns=ends,
        timeline=types.SimpleNamespace(rows=np.zeros((0, 9), np.int64)),
    )  # fmt: skip


def test_a_part_that_was_interrupted_counts_as_the_others_took_for_it() -> None:
    quiet = [[False, False]] * 3
    runs = [
        _run([[9, 9], [3, 5], [4, 6]], quiet),
        _run([[9, 9], [3, 5], [4, 6]], quiet),
        _run([[9, 9], [3, 55], [4, 6]], [[False, False], [False, True], [False, False]]),
    ]
    assert _MODULE.mean_steps_s(runs) == pytest.approx([0.009, 0.009, 0.009])
    assert _MODULE.clean_steps(runs[2]).tolist() == [False, False, True]
    assert _MODULE.idle_s(runs[2]) == pytest.approx(0.010)


def test_a_part_that_was_interrupted_in_every_run_counts_as_it_was() -> None:
    runs = [_run([[9, 9], [3, 50]], [[False, False], [False, True]])] * 3
    assert _MODULE.mean_steps_s(runs) == pytest.approx([0.053] * 3)
