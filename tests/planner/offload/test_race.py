"""Racing, bounds and giving up lose nothing on windows of several requests, whatever the number of workers; time that is up is said."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.api.load import load_machine
from moeplan.planner.offload import race, space
from moeplan.planner.offload.objective import Limits, decided_by_window, value_of
from moeplan.planner.offload.parts import part_of
from moeplan.planner.offload.plan import OffloadRequest, base_schedule
from moeplan.planner.offload.scoring import SearchResult
from moeplan.planner.offload.search import search
from moeplan.planner.offload.space import candidates, levels
from moeplan.sim.offload.forecast import usual_tables
from moeplan.sim.offload.metrics import figures_of
from moeplan.sim.offload.simulate import Simulation
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models.load import load_model
from strategies import make_trace

MIB = 2**20


@pytest.fixture(autouse=True)
def small_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a search look at two amounts of memory and few guesses."""
    monkeypatch.setattr(space, "LEVEL_SHARES", (0.6, 1.0))
    monkeypatch.setattr(space, "_REACHES", ((1, 1.0),))


def several(seed: int, requests: list[tuple[int, int]], window: int | None = None) -> Simulation:
    trace = make_trace(
        np.random.default_rng(seed), num_layers=6, num_experts=16, top_k=2, requests=requests, skew=0.1, guesses=0
    )
    return Simulation(model=load_model("tiny-moe"), profile=load_hardware("t4"), trace=trace, window_steps=window,
                      memory_bytes=440 * MIB)  # fmt: skip


WISHES = st.sampled_from(["request_s", "ttft_s", "decode_tokens_per_s", "requests_per_s"])
BASE = base_schedule(OffloadRequest(bits=("32",), prefill_chunk_tokens=2), "32")


def counts(found: SearchResult) -> tuple[int, ...]:
    return dataclasses.astuple(found.tally)


@settings(max_examples=examples(2), suppress_health_check=list(HealthCheck), deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=3),
    WISHES,
)
def test_the_answer_for_several_requests_is_that_of_running_everything(
    seed: int, requests: list[tuple[int, int]], objective: str
) -> None:
    this = several(seed, requests)
    every = [one for level in levels(this, BASE) for one in candidates(this, BASE, level)]
    outcomes = [(one, this.run(one.schedule)) for one in every]
    workload = this.workload(BASE)
    assert decided_by_window(objective, workload) == (objective in ("request_s", "requests_per_s"))
    best = min(
        value_of(objective, figures_of(out.step_end, workload))
        for one, out in outcomes
        if out.counts.peak_transient <= one.level
    )
    raced, whole = (search(this, BASE, objective=objective, exhaustive=all_of_it) for all_of_it in (False, True))
    for found in (raced, whole):
        assert value_of(objective, found.best.figures) == best
        assert sum(counts(found)) == len(every)
    assert whole.tally.num_raced_out == 0


def test_a_race_of_long_windows_ends_where_running_everything_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "RUNGS", ((40, 2, 0.05), (90, None, 0.02)))
    this = several(3, [(6, 30)] * 6)
    raced, whole = (search(this, BASE, objective="request_s", exhaustive=all_of_it) for all_of_it in (False, True))
    assert raced.tally.num_raced_out
    begun = [one.tally.num_evaluated + one.tally.num_abandoned for one in (raced, whole)]
    assert begun[0] < begun[1]
    assert raced.best.total_ns == whole.best.total_ns


def test_any_number_of_workers_finds_and_counts_the_same() -> None:
    this = several(4, [(4, 12), (3, 9)])
    one, three = (search(this, BASE, objective="request_s", workers=workers) for workers in (1, 3))
    assert counts(one) == counts(three)
    assert one.best == three.best and one.front == three.front


@settings(max_examples=examples(2), suppress_health_check=list(HealthCheck), deadline=None)
@given(st.integers(0, 10_000), st.lists(WISHES, min_size=1, max_size=2), WISHES, st.sampled_from([1, 3]))
def test_what_was_searched_before_changes_no_answer(seed: int, before: list[str], wish: str, workers: int) -> None:
    searched = several(seed, [(4, 12), (3, 9)])
    for one in before:
        search(searched, BASE, objective=one, workers=1)
    first = search(several(seed, [(4, 12), (3, 9)]), BASE, objective=wish, workers=1)
    again = search(searched, BASE, objective=wish, workers=workers)
    assert {name: getattr(again, name) for name in SearchResult.__slots__} == {
        name: getattr(first, name) for name in SearchResult.__slots__
    }


def test_a_search_whose_time_is_up_has_an_answer_and_says_what_it_left() -> None:
    this = several(5, [(4, 12), (3, 9)])
    found, whole = search(this, BASE, objective="request_s", seconds=1e-6), search(this, BASE, objective="request_s")
    assert found.tally.num_skipped > 0
    assert sum(counts(found)) == sum(counts(whole))
    assert found.best.total_ns >= whole.best.total_ns
    assert len(found.front) == len(whole.front)


def test_requests_with_a_gap_or_at_once_are_not_decided_by_the_window() -> None:
    for requests, window in ([(4, 0), (3, 9)], None), ([(4, 12), (3, 9)], 12):
        assert not decided_by_window("request_s", several(6, requests, window).workload(BASE))
    together = replace(BASE, workload=replace(BASE.workload, concurrency=2))
    assert not decided_by_window("request_s", several(6, [(4, 12), (3, 9)]).workload(together))


def test_a_part_stands_for_the_whole() -> None:
    this = several(7, [(12, 5), (8, 9)])
    workload = this.workload(BASE)
    part = part_of(workload, 8, 2)
    assert list(workload.step_phase[part]) == [0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1]
    assert list(workload.step_tokens[part]) == [2, 2, 1, 1, 1, 1, 1, 2, 2, 1, 1, 1]
    weights = race.part_weights(workload, part, (0, 1))
    assert weights[0] == 1  # the pass in which caches fill
    prompts = workload.step_phase[part] == 0
    assert weights[prompts] @ workload.step_tokens[part][prompts] == pytest.approx(12 + 8)
    assert weights[~prompts].sum() == pytest.approx(5 + 9)
    cut = this.over(this.trace, picked_steps=part).workload(BASE)
    assert list(cut.step_token[:4]) == [0, 1, 2, 3] and cut.num_steps == len(part)
    assert len(cut.prompts) == len(cut.requests) == 0
    whole = this.over(this.trace, picked_steps=np.arange(workload.num_steps)).workload(BASE)
    assert np.array_equal(whole.requests, workload.requests) and np.array_equal(whole.prompts, workload.prompts)


def test_limits_are_kept_where_several_requests_are_searched() -> None:
    this = several(8, [(4, 12), (3, 9)])
    free = search(this, BASE, objective="request_s").best.figures
    limit = (free["ttft_s"] or 0.0) * 1.5
    found = search(this, BASE, objective="decode_tokens_per_s", limits=Limits(ttft_s=limit))
    assert (found.best.figures["ttft_s"] or 0.0) <= limit


def test_a_run_that_lags_is_stopped_and_run_on_when_the_limit_allows() -> None:
    this = several(8, [(4, 12), (3, 9)])
    workload = this.workload(BASE)
    weights = np.where(workload.step_phase == 1, 1.5, 0.25)
    for level in levels(this, BASE):
        for one in list(candidates(this, BASE, level))[::7]:
            whole = float(np.diff(this.run(one.schedule).step_end, prepend=0) @ weights)
            assert this.weighed_ns(one.schedule, weights, whole / 2) == math.inf
            assert len(this._step_ends[one.schedule]) < workload.num_steps
            assert this.weighed_ns(one.schedule, weights, whole) == whole == this.weighed_ns(one.schedule, weights)


def test_schedules_share_tables_only_where_they_are_the_same() -> None:
    profile = load_machine(
        "rtx-3060 + ryzen-7-7700x", engine="llama.cpp"
    )  # deciding what to fetch costs its host time a layer
    this = several(9, [(2, 4)])
    this = this.over(this.trace, profile=profile, memory_bytes=536 * MIB)
    told_apart = set()
    for level in levels(this, BASE):
        for one in list(candidates(this, BASE, level, "8"))[::2]:
            shared, _ = this.usual_tables(one.schedule)
            own, _ = usual_tables(one.schedule, this.workload(BASE), this.model, this.costs)
            for name, table in own._asdict().items():
                assert np.array_equal(table, getattr(shared, name)), (name, one.words())
            told_apart.add((one.schedule.cache.policy, int(own.host_ns[0].layer)))
    assert len({layer for policy, layer in told_apart if policy == "static"}) > 1
