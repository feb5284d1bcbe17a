"""A few measured speeds say something of a machine, or nothing: what stands out and agrees moves constants, what does not leaves them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.calibrate.fitting.adjust import movable
from moeplan.calibrate.fitting.update import APART, WITHIN, Measured, linear, untold, updated
from moeplan.specs.machines.compose import compose_text
from moeplan.specs.machines.profile import Profile

BASE = compose_text("rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB", "llama.cpp")


def rate(profile: Profile) -> float:
    """A decoding step that reads the card's memory and starts kernels."""
    assert profile.engine is not None
    return 1 / (2e9 / profile.device.memory_bytes_per_s.value + 200 * profile.engine.layer_s.value)


def prompt(profile: Profile) -> float:
    assert profile.engine is not None
    return 1e14 * profile.engine.expert_efficiency.value


def speeds(*factors: float, repeated: float = 0.0) -> list[Measured]:
    """Return a decoding line, a prompt, a decoding line …, that are so many times as fast as thought."""
    both = [(rate, prompt)[index % 2] for index in range(len(factors))]
    return [
        Measured(tokens_per_s=each(BASE) * factor, relative_deviation=repeated, predict=each)
        for each, factor in zip(both, factors, strict=True)
    ]


def told(*factors: float, repeated: float = 0.0) -> str | None:
    return updated(BASE, speeds(*factors, repeated=repeated), "by test").kept


def constants(profile: Profile) -> dict[str, float]:
    return {name: constant.value for name, constant in profile.constants()}


@settings(max_examples=examples(10), deadline=None)
@given(st.floats(min_value=0.45, max_value=0.6), st.booleans())
def test_lines_that_agree_and_stand_out_move_constants(factor: float, turned: bool) -> None:
    both = (1 / factor, 1 / factor) if turned else (factor, factor)
    found = updated(BASE, speeds(*both), "by test")
    assert found.kept is None
    for after, before, wanted in zip(found.after, found.before, both, strict=True):
        assert abs(math.log(after / before / wanted)) < abs(math.log(wanted)) / 2


@settings(max_examples=examples(10), deadline=None)
@given(st.floats(min_value=0.5, max_value=0.8), st.floats(min_value=1.25, max_value=2.0), st.booleans())
def test_a_pair_that_is_off_opposite_ways_leaves_them(slow: float, fast: float, turned: bool) -> None:
    found = updated(BASE, speeds(*((fast, slow) if turned else (slow, fast))), "by test")
    assert found.kept == APART
    assert found.after == found.before
    assert constants(found.profile) == pytest.approx(constants(BASE))


@settings(max_examples=examples(10), deadline=None)
@given(st.lists(st.floats(min_value=0.97, max_value=1.03), min_size=1, max_size=6))
def test_lines_that_are_as_predicted_leave_them(factors: list[float]) -> None:
    found = updated(BASE, speeds(*factors), "by test")
    assert found.kept == WITHIN
    assert constants(found.profile) == pytest.approx(constants(BASE))


def test_the_more_lines_agree_the_less_they_need_stand_out() -> None:
    off = next(step / 100 for step in range(1, 60) if told(1 + step / 100) is None)
    less = 1 + off * 0.8
    assert told(less) == WITHIN
    assert told(less, less, less, less) is None


def test_lines_that_repeat_badly_need_stand_out_by_more() -> None:
    assert told(1.4, 1.5) is None
    assert told(1.4, 1.5, repeated=1.0) == WITHIN


def test_many_lines_may_be_off_in_ways_of_their_own() -> None:
    """A card whose prompts are slow and whose decoding is fast: two lines do not show it, six do."""
    assert told(1.6, 0.6) == APART
    assert told(*(1.6, 0.6) * 3) is None


def test_what_is_told_is_of_residuals_alone() -> None:
    choice, rows = movable(BASE), speeds(1.5, 1.5)
    before, slopes = linear(BASE, rows)
    residuals = [math.log(one.tokens_per_s) for one in rows] - before
    assert untold(choice, slopes, residuals) is None
    assert untold(choice, slopes, -residuals) is None
    assert untold(choice, slopes, residuals * [1, -1]) == APART
    assert untold(choice, slopes, residuals * 0.01) == WITHIN
