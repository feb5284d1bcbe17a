"""The rules that the design notes write down are what is decided: a plain re-implementation of them decides alike, case by case."""

from __future__ import annotations

import dataclasses
import itertools
import os

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from moeplan.sim.offload.simulators import decided_layer_steps, fresh_state
from moeplan.sim.offload.workload import build_workload
from moeplan.specs.schedules.offload import OffloadSchedule, WorkloadOptions
from plain_decisions import Plain, covers, line_up
from strategies import capacities_of, config_of, make_costs, make_trace, runs

LONG = os.environ.get("MOEPLAN_LONG") == "1"
drawn = settings(
    max_examples=3000 if LONG else 250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=not LONG
)


@drawn
@given(runs())
def test_rules_in_words_decide_what_the_policies_decide(case):
    assume(covers(case[4]))
    same_decisions(*case)


def same_decisions(config, workload, costs, capacities, schedule, trace) -> None:
    state = fresh_state(config, workload, capacities, costs)
    passes = line_up(trace, schedule.workload.concurrency, schedule.workload.prefill_chunk_tokens)
    formats = costs.expert_format.tolist()
    mine = Plain(schedule, trace, capacities.tolist(), formats, workload.popularity).layer_steps(passes)
    for (step, layer, out), (_, _, plain) in zip(decided_layer_steps(config, workload, state), mine, strict=True):
        where = (step, layer)
        size = out.size[0]
        items = out.items[: size.items][["expert", "tokens", "format", "kernel", "transfer"]]
        assert lines(items) == plain.items, where
        assert lines(out.cores[: size.cores]) == plain.cores, where
        assert lines(out.moves[: size.moves]) == plain.moves, where
        assert lines(out.backs[: size.backs]) == plain.backs, where
        assert lines(out.promotions[: size.promoted]) == [list(pair) for pair in sorted(plain.demanded.items())], where
        assert size.kernels == plain.kernels, where


def lines(records: np.ndarray) -> list[list[int]]:
    return [list(line) for line in records.tolist()]


@drawn
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)).filter(any), min_size=1, max_size=6), st.integers(1, 4),
       st.sampled_from([None, 1, 3]))  # fmt: skip
def test_requests_line_up_as_the_notes_say(requests, concurrency, chunk):
    trace = make_trace(np.random.default_rng(0), num_layers=1, num_experts=3, top_k=1, requests=requests)
    workload = build_workload(trace, WorkloadOptions(concurrency=concurrency, prefill_chunk_tokens=chunk))
    passes = line_up(trace, concurrency, chunk)
    starts = workload.step_start
    found = [workload.step_token[low:high].tolist() for low, high in itertools.pairwise(starts)]
    assert found == [each.rows for each in passes]
    assert workload.step_first.tolist() == [int(each.starts) for each in passes]


@drawn
@given(st.integers(0, 2**32), st.sampled_from(["lfu", "lfuda", "lfuda", "belady", "least-stale"]), st.integers(1, 8), st.integers(0, 3),
       st.booleans(), st.booleans())  # fmt: skip
def test_rules_hold_where_experts_push_each_other_out(seed, policy, slots, staging, pooled, equal):
    """Many tokens, small caches and guesses of equal probability: what is kept and what comes first is decided at every layer step."""
    rng = np.random.default_rng(seed)
    requests = [(int(rng.integers(0, 4)), int(rng.integers(4, 12))) for _ in range(3)]
    trace = make_trace(rng, num_layers=2, num_experts=6, top_k=2, requests=requests, guesses=1, skew=0.4)
    if equal:
        prob = None if seed % 2 else np.full_like(trace.predicted_prob, 0.25)
        trace = dataclasses.replace(trace, predicted_prob=prob)
    size = {"cache__pooled_experts": slots} if pooled else {"cache__experts_per_layer": min(slots, 6)}
    schedule = OffloadSchedule().with_options(
        cache__policy=policy,
        predictor__kind="next-gate",
        predictor__staging=staging,
        predictor__width=2,
        workload__concurrency=3,
        **size,
    )
    workload = build_workload(trace, schedule.workload, with_next_use=policy == "belady")
    costs = make_costs(rng, workload, schedule)
    same_decisions(config_of(schedule, trace), workload, costs, capacities_of(schedule, trace), schedule, trace)
