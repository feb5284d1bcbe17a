"""LFU with ageing: what was popular once leaves, plain LFU keeps it; both simulators and the rules in words agree."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.sim.offload.simulators import decided_layer_steps, first_difference, fresh_state, run_compiled, run_simpy
from moeplan.sim.offload.workload import build_workload
from moeplan.specs.schedules.offload import OffloadSchedule
from moeplan.traces.recording import RoutingTrace
from strategies import capacities_of, config_of, make_costs, make_trace


def one_layer(chosen: list[int]) -> RoutingTrace:
    """Return a recording of one request that decodes one token after another, each choosing one expert of one layer."""
    trace = make_trace(np.random.default_rng(0), num_layers=1, num_experts=4, top_k=1, requests=[(0, len(chosen))])
    experts = np.array(chosen, trace.experts.dtype).reshape(-1, 1, 1)
    return RoutingTrace(
        experts=experts, request=trace.request, position=trace.position, phase=trace.phase, num_experts=4, model="",
        layer_ids=(0,), source="", licence="",
    )  # fmt: skip


def hits(chosen: list[int], policy: str) -> int:
    trace = one_layer(chosen)
    schedule = OffloadSchedule().with_options(cache__policy=policy, cache__experts_per_layer=2)
    workload = build_workload(trace, schedule.workload)
    costs = make_costs(np.random.default_rng(0), workload, schedule)
    config = config_of(schedule, trace)
    state = fresh_state(config, workload, capacities_of(schedule, trace), costs)
    for _ in decided_layer_steps(config, workload, state):
        pass
    return int(state.counts[0].hits)


def test_what_was_popular_once_leaves() -> None:
    # Expert 0 is used six times at first; then 1 and 2 take turns in the two places that there are.
    chosen = [0] * 6 + [1, 2] * 8
    # LFU: 0 stays for good and 1 and 2 push each other out until their counts reach its six.
    assert hits(chosen, "lfu") < hits(chosen, "lfuda")
    # With ageing each that comes in is worth one more than the one it pushed out: 1, 2, 3, 4, 5, 6. The seventh finds 0 and its rival
    # worth 6 alike; 0 is the least recent and leaves, and the nine uses that follow are hits, as 0's five were.
    assert hits(chosen, "lfuda") == 5 + 9


@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), slots=st.integers(1, 8), staging=st.integers(0, 2), pooled=st.booleans(), back=st.booleans(),
       overlap=st.booleans())  # fmt: skip
def test_both_simulators_agree_to_the_nanosecond(
    seed: int, slots: int, staging: int, pooled: bool, back: bool, overlap: bool
) -> None:
    rng = np.random.default_rng(seed)
    requests = [(int(rng.integers(0, 4)), int(rng.integers(4, 12))) for _ in range(3)]
    trace = make_trace(rng, num_layers=2, num_experts=6, top_k=2, requests=requests, guesses=1, skew=0.4)
    size = {"cache__pooled_experts": slots} if pooled else {"cache__experts_per_layer": min(slots, 6)}
    schedule = OffloadSchedule().with_options(
        cache__policy="lfuda", predictor__kind="next-gate", predictor__staging=staging, copy__write_back=back, copy__overlap=overlap,
        **size,
    )  # fmt: skip
    workload = build_workload(trace, schedule.workload)
    costs = make_costs(rng, workload, schedule)
    config, capacities = config_of(schedule, trace), capacities_of(schedule, trace)
    readable = run_simpy(config, workload, costs, capacities, serial=not overlap, rows=True)
    compiled = run_compiled(config, workload, costs, capacities, serial=not overlap, rows=True)
    assert first_difference(readable, compiled) is None
