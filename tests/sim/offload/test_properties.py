"""What every run must obey, whatever the schedule: bounds on time, conservation of bytes and tokens, capacity, determinism."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.sim.offload.simulators import fresh_state, run_compiled
from moeplan.sim.offload.workload import build_workload
from moeplan.sim.policies import state as ps
from moeplan.sim.policies.offload import begin_step, decide_layer_step
from moeplan.sim.policies.state import make_decision
from moeplan.sim.timeline import (
    LANE_NAMES,
    OP_CPU,
    OP_DENSE,
    OP_DISK,
    OP_EXPERT,
    ROW_END,
    ROW_LANE,
    ROW_OP,
    ROW_START,
    ROW_TOKENS,
)
from moeplan.specs.schedules.offload import OffloadSchedule, apply_settings
from strategies import capacities_of, config_of, make_costs, make_trace, runs

relaxed = settings(max_examples=examples(120), deadline=None, suppress_health_check=list(HealthCheck))


def outcome_of(case, **options):
    config, workload, costs, capacities, schedule, _ = case
    return run_compiled(config, workload, costs, capacities, serial=not schedule.copy.overlap, rows=True, **options)


@relaxed
@given(runs())
def test_makespan_lies_between_the_busiest_lane_and_the_sum_of_all_activities(case):
    outcome = outcome_of(case)
    busy = outcome.timeline.busy_ns()
    assert max(busy.values()) <= outcome.makespan_ns <= sum(busy.values())


@relaxed
@given(runs())
def test_busy_and_idle_fill_every_lane(case):
    outcome = outcome_of(case)
    outcome.timeline.check()
    rows = outcome.timeline.rows
    idle = 0
    for lane in range(len(LANE_NAMES)):
        mine = rows[rows[:, ROW_LANE] == lane]
        edges = np.r_[0, mine[:, [ROW_START, ROW_END]].ravel(), outcome.makespan_ns]
        idle += int((edges[1::2] - edges[::2]).sum())
    assert sum(outcome.timeline.busy_ns().values()) + idle == outcome.makespan_ns * len(LANE_NAMES)


@relaxed
@given(runs())
def test_bytes_are_misses_prefetches_and_whole_layer_fetches_times_expert_bytes(case):
    costs, outcome = case[2], outcome_of(case)
    count = outcome.counts
    moved = count.misses - count.cpu_runs + count.prefetches + count.extra_fetches
    assert outcome.clock.bytes_h2d == (
        (moved - count.low_fetches) * costs.expert_bytes[0] + count.low_fetches * costs.expert_bytes[-1]
    )
    rows = outcome.timeline.rows
    if case[4].experts.low_bits is None:
        assert outcome.clock.bytes_d2h == count.writebacks * costs.expert_bytes[0]
        assert outcome.clock.busy_disk == count.disk_reads * costs.disk_ns[0]
    assert np.count_nonzero(rows[:, ROW_OP] == OP_CPU) == count.cpu_runs
    assert np.count_nonzero(rows[:, ROW_OP] == OP_DISK) == count.disk_reads
    assert count.next_transfer == moved + count.cancelled


@relaxed
@given(runs())
def test_tokens_are_conserved(case):
    workload, trace, rows = case[1], case[5], outcome_of(case).timeline.rows
    expert = rows[np.isin(rows[:, ROW_OP], [OP_EXPERT, OP_CPU])]
    dense = rows[rows[:, ROW_OP] == OP_DENSE]
    assert expert[:, ROW_TOKENS].sum() == trace.num_tokens * trace.num_layers * trace.top_k
    assert dense[:, ROW_TOKENS].sum() == trace.num_tokens * trace.num_layers
    assert workload.num_tokens == trace.num_tokens


@relaxed
@given(runs())
def test_hits_and_misses_are_all_look_ups(case):
    count = outcome_of(case).counts
    assert count.hits + count.misses == case[1].num_expert_uses
    assert count.hits_guessed == count.prefetches_used <= count.prefetches + count.extra_fetches


@relaxed
@given(runs())
def test_capacity_is_never_exceeded_and_slots_are_never_shared(case):
    config, workload, _, capacities, _, _ = case
    state, decision = fresh_state(config, workload, capacities, case[2]), make_decision(config)
    for step in range(workload.num_steps):
        begin_step(config, workload.steps, state, step)
        for layer in range(config.num_layers):
            decide_layer_step(config, workload.steps, state, decision, step, layer)
            cached = np.flatnonzero(state.experts["where"] == ps.CACHED)
            pools = np.zeros(len(cached), int) if config.pooled else cached // config.num_experts
            assert np.all(
                np.bincount(pools, minlength=len(state.pools["capacity"][:-1])) <= state.pools["capacity"][:-1]
            )
            assert np.count_nonzero(state.experts["where"] == ps.STAGED) <= config.staging
            held = state.experts["slot"][(state.experts["where"] == ps.CACHED) | (state.experts["where"] == ps.STAGED)]
            assert len(np.unique(held)) == len(held)


@relaxed
@given(runs())
def test_same_inputs_give_a_byte_identical_timeline(case):
    assert outcome_of(case).timeline.to_csv() == outcome_of(case).timeline.to_csv()


@relaxed
@given(st.integers(0, 2**32), st.integers(1, 5), st.booleans(), st.integers(1, 4))
def test_renumbering_experts_leaves_recency_caches_unchanged(seed, slots, pooled, concurrency):
    rng = np.random.default_rng(seed)
    trace = make_trace(rng, num_layers=2, num_experts=5, top_k=2, requests=[(3, 4), (0, 5), (2, 3)], skew=0.4)
    size = "cache.pooled_experts" if pooled else "cache.experts_per_layer"
    schedule = apply_settings(OffloadSchedule(), {size: slots, "workload.concurrency": concurrency})
    renumbered = trace.__class__(
        **{name: getattr(trace, name) for name in trace.__slots__}
        | {"experts": rng.permutation(5).astype(np.uint8)[trace.experts]}
    )
    counts = []
    for each in (trace, renumbered):
        workload = build_workload(each, schedule.workload)
        costs = make_costs(np.random.default_rng(1), workload, schedule)
        outcome = run_compiled(config_of(schedule, each), workload, costs, capacities_of(schedule, each), serial=False)
        counts.append((outcome.counts.hits, outcome.counts.misses, outcome.clock.bytes_h2d))
    assert counts[0] == counts[1]


@relaxed
@given(runs())
def test_a_run_is_abandoned_only_when_it_would_exceed_its_limit(case):
    whole = outcome_of(case)
    last = int(whole.step_end[-1])
    config, workload, costs, capacities, schedule, _ = case
    for limit in (last - 1, last, last + 1):
        again = run_compiled(
            config, workload, costs, capacities, serial=not schedule.copy.overlap, limit_ns=max(limit, 1)
        )
        assert again.abandoned == (last > max(limit, 1))


@relaxed
@given(runs())
def test_belady_misses_no_more_than_lru(case):
    _, _, _, _, schedule, trace = case
    if schedule.cache.policy == "none" or schedule.workload.concurrency != 1:
        return
    size = "pooled_experts" if schedule.cache.pooled_experts is not None else "experts_per_layer"
    misses = {}
    for policy in ("belady", "lru"):
        plain = dataclasses.replace(OffloadSchedule(), workload=schedule.workload).with_options(
            **{"cache__policy": policy, f"cache__{size}": getattr(schedule.cache, size)}
        )
        workload = build_workload(trace, plain.workload, with_next_use=True)
        costs = make_costs(np.random.default_rng(0), workload, plain)
        config, capacities = config_of(plain, trace), capacities_of(plain, trace)
        sets = np.diff(workload.steps.layer_step_start)
        if int(capacities.min()) < sets.max():
            return  # a set larger than the cache streams through, in recorded order: no longer a paging problem
        misses[policy] = run_compiled(config, workload, costs, capacities, serial=True).counts.misses
    assert misses["belady"] <= misses["lru"]
