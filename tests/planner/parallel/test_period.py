"""Rebalancing over a served period: windows, what moving costs, policies beside one another, and the three endings."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from moeplan.base.errors import InputError, UnknownName
from moeplan.planner.parallel.case import ParallelRequest, evidence_of, plain_schedule, prepare_ep
from moeplan.planner.parallel.difference import PAYS, Gain
from moeplan.planner.parallel.period.moves import (
    AT_ONCE,
    BACKGROUND,
    LAYER_BY_LAYER,
    MOVING_S_PER_EXPERT,
    PLANNING_S_PER_SLOT,
    longest_pause_s,
    rearrangement,
    stall_s,
)
from moeplan.planner.parallel.period.policies import Policy, PolicyResult
from moeplan.planner.parallel.period.study import DOES_NOT, TOO_SHORT, Asked, PeriodStudy, period_study
from moeplan.planner.parallel.period.windows import mixed, windows_of
from moeplan.planner.placement.placement import contiguous, round_robin
from moeplan.specs.machines.serving import load_server, serving_machine
from moeplan.specs.models.load import load_model
from moeplan.traces.recording import LoadProfile

MODEL = load_model("deepseek-v2-lite")
MACHINE = serving_machine(load_server("h200"), "sglang")
ASKED = ParallelRequest(ranks_per_node=4, tokens_per_rank=512, context_tokens=512, num_redundant=0).of_model(MODEL)
STEP = 4 * 512


def loads(popularity: np.ndarray, steps: int) -> LoadProfile:
    counts = np.stack([np.roll(popularity, 0) for _ in range(26)])
    counts = np.rint(counts / counts.sum(axis=1, keepdims=True) * steps * STEP * 6).astype(np.int64)
    return LoadProfile(counts=counts, model="", source="made up", layer_ids=tuple(range(1, 27)), licence="", top_k=6)


UNEVEN = np.exp(-0.08 * np.arange(64.0))  # the first rank's experts are the busiest
EVEN = np.ones(64)


def study(stored: np.ndarray, served: list[np.ndarray], **asked: object) -> PeriodStudy:
    schedule = plain_schedule("16")
    recording = loads(stored, 100)
    search = prepare_ep(MODEL, MACHINE, evidence_of(MODEL, recording, ASKED), ASKED, schedule)
    recordings = tuple(loads(each, 4000) for each in served)
    return period_study(search, schedule, recording, ASKED, Asked(recordings=recordings, **asked), 0)  # type: ignore[arg-type]


def test_windows_are_cut_by_steps_and_mixed_by_them() -> None:
    windows = windows_of(MODEL, [loads(UNEVEN, 10), loads(EVEN, 30)], ASKED, 5)
    assert [window.num_steps for window in windows] == [10, 30]
    share = mixed(windows, 0, 40)
    assert share.sum(axis=1) == pytest.approx(1)
    assert share[0] == pytest.approx((10 * UNEVEN / UNEVEN.sum() + 30 * EVEN / 64) / 40, rel=1e-3)
    assert mixed(windows, 10, 40)[0] == pytest.approx(EVEN / 64, rel=1e-3)
    with pytest.raises(InputError, match="shorter than one window"):
        windows_of(MODEL, [loads(EVEN, 10)], ASKED, 1000)
    with pytest.raises(InputError, match="4 experts"):
        windows_of(MODEL, [dataclasses.replace(loads(EVEN, 10), counts=np.ones((26, 4), np.int64))], ASKED, 5)


def test_moving_costs_planning_sends_and_bytes() -> None:
    before, after = contiguous(26, 64, 64, 4, 1), round_robin(26, 64, 64, 4, 1)
    search = prepare_ep(MODEL, MACHINE, evidence_of(MODEL, loads(EVEN, 10), ASKED), ASKED, plain_schedule("16"))
    constants = search.simulation.costing.constants
    move = rearrangement(MODEL, before, after, 10**6, constants)
    # Of sixteen experts in order a rank keeps the four that come round to it.
    assert move.num_experts == 26 * 4 * 12
    assert move.planning_s == pytest.approx(26 * 64 * PLANNING_S_PER_SLOT)
    assert move.moving_s == pytest.approx(26 * 12 * (MOVING_S_PER_EXPERT + 10**6 / constants.intra.bytes_per_s))
    assert rearrangement(MODEL, before, before, 10**6, constants).moving_s == 0
    assert stall_s(AT_ONCE, move, 0.85) == stall_s(LAYER_BY_LAYER, move, 0.85) == move.whole_s
    assert 0 < stall_s(BACKGROUND, move, 0.85) < move.moving_s
    assert (
        longest_pause_s(AT_ONCE, move, 26)
        > longest_pause_s(LAYER_BY_LAYER, move, 26)
        > longest_pause_s(BACKGROUND, move, 26)
        == 0
    )
    with pytest.raises(UnknownName):
        stall_s("tomorrow", move, 0.85)


def test_uneven_loads_that_stay_are_worth_a_placement() -> None:
    found = study(UNEVEN, [UNEVEN, UNEVEN, UNEVEN], every_steps=3000, way=AT_ONCE)
    never, once, every, then = found.results
    assert never.saved.saved_s == 0 and never.num_moves == 0
    assert found.ending == PAYS and found.best is once and once.pays_from_step == 0
    assert once.max_over_mean_load < never.max_over_mean_load
    assert every.num_moves == 3 and every.stalled_s > 0 and every.counting_s > 0
    assert every.whole_s == pytest.approx(every.steps_s + every.stalled_s + every.counting_s)
    assert once.whole_s < every.whole_s < never.whole_s
    # Ahead only after the first stall has been won back.
    assert every.pays_from_step is not None and every.pays_from_step > 3000
    assert "rebalancing pays from the first step" in found.words
    # Statistics that still hold serve until the first rearrangement, which then has little to move.
    assert then.max_over_mean_load < every.max_over_mean_load and then.steps_s < every.steps_s
    assert (
        then.num_moves == every.num_moves and then.counting_s == every.counting_s and then.stalled_s <= every.stalled_s
    )
    assert then.policy.words == "once from stored statistics, then every 3,000 steps, moved at once"
    assert once.whole_s < then.whole_s < every.whole_s
    assert then.pays_from_step == 0


def test_even_loads_are_not() -> None:
    found = study(EVEN, [EVEN, EVEN], every_steps=1000, way=AT_ONCE)
    assert found.ending == DOES_NOT and "does not pay" in found.words
    assert found.results[2].whole_s > found.results[0].whole_s


def test_one_window_does_not_tell_and_says_how_much_would() -> None:
    found = study(UNEVEN, [UNEVEN], every_steps=1000, way=BACKGROUND)
    assert found.ending == TOO_SHORT
    assert found.needed_tokens is not None and found.needed_tokens >= 2 * found.num_tokens
    assert f"{found.needed_tokens:,} tokens" in found.words


def made(saved_s: float, uncertainty_s: float, scatter_s: float) -> PolicyResult:
    gain = Gain(saved_s=saved_s, uncertainty_s=uncertainty_s, of_s=100.0)
    return PolicyResult(
        policy=Policy(kind="once"), whole_s=100 - saved_s, steps_s=100 - saved_s, counting_s=0.0, stalled_s=0.0, num_moves=0,
        longest_pause_s=0.0, saved=gain, scatter_s=scatter_s, pays_from_step=0, max_over_mean_load=1.0,
    )  # fmt: skip


def told(saved_s: float, machine_s: float, scatter_s: float, windows: int = 4) -> PeriodStudy:
    results = (made(0.0, 0.0, 0.0), made(saved_s, math.hypot(machine_s, scatter_s), scatter_s))
    return PeriodStudy(results=results, num_steps=1000, num_tokens=10**6, num_windows=windows, description="ep")


def test_how_many_tokens_would_tell_by_hand() -> None:
    # 4 s of 100 saved, 2 s of doubt about the machine, 6 s about windows: 6^2 / (4^2 - 2^2) = 3 times as long.
    found = told(4.0, 2.0, 6.0)
    assert found.ending == TOO_SHORT and found.needed_tokens == pytest.approx(3e6, abs=1)
    # Three times as long: 12 s saved, 6 s of the machine, 6 * sqrt(3) s of windows: just told.
    assert math.hypot(6.0, 6.0 * math.sqrt(3)) == pytest.approx(12.0)
    # The machine's doubt alone is as large as what is saved: no length tells.
    assert told(4.0, 4.0, 6.0).needed_tokens is None and told(4.0, 4.0, 6.0).ending == DOES_NOT
    # One window says nothing of drift: twice as long at least, however little doubt there is.
    assert told(4.0, 1.0, 4.0, windows=1).needed_tokens == pytest.approx(2e6, abs=1)
    assert told(4.0, 2.0, 3.0).ending == PAYS


def test_stored_statistics_of_other_traffic_cost() -> None:
    other = np.random.default_rng(1).permutation(UNEVEN)
    found = study(UNEVEN, [other, other], every_steps=1000, way=BACKGROUND)
    once, every, then = found.results[1:]
    # Until the first rearrangement the stored placement serves, from then on they are the same.
    step = found.num_steps
    before = once.steps_s * 1000 / step
    assert then.steps_s == pytest.approx(every.steps_s - found.results[0].steps_s * 1000 / step + before, rel=1e-6)
    assert once.max_over_mean_load > every.max_over_mean_load
    assert every.saved.saved_s > once.saved.saved_s and found.best is every


def test_an_interval_beyond_the_period_is_refused() -> None:
    with pytest.raises(InputError, match="--rebalance-every"):
        study(UNEVEN, [UNEVEN], every_steps=10**6)
    with pytest.raises(InputError, match="rearrangements in this period"):
        study(UNEVEN, [UNEVEN], every_steps=1)
