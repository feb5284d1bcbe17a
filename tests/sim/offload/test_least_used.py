"""The queue of a pool's experts by their tokens gives up whom a look through the whole pool would."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.sim.offload.simulators import fresh_state
from moeplan.sim.offload.workload import build_workload
from moeplan.sim.policies import caching, offload
from moeplan.sim.policies.least_used import least_used
from moeplan.sim.policies.seen import FREE_ROUND, may_leave
from moeplan.sim.policies.state import PolicyState, make_config, make_decision
from moeplan.specs.schedules.offload import OffloadSchedule
from strategies import make_trace

LAYERS, EXPERTS = 3, 6


def looked_through(state: PolicyState, layer_step: int) -> int:
    """Return the least used of those that may leave, the least recent of equals."""
    keys, found = state.keys, -1
    key = int(keys[state.num_keys].prev)
    while key != state.num_keys:
        fewer = found < 0 or keys[key].frequency < keys[found].frequency
        if fewer and may_leave(keys, key, layer_step, FREE_ROUND):
            found = key
        key = int(keys[key].prev)
    return found


@settings(max_examples=examples(12), suppress_health_check=list(HealthCheck), deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 14), st.sampled_from([("none", 0), ("oracle", 0), ("synthetic", 0), ("synthetic", 2)]),
       st.booleans())  # fmt: skip
def test_the_queue_gives_up_whom_a_look_through_the_pool_would(
    seed: int, slots: int, guesses: tuple[str, int], reset: bool
) -> None:
    trace = make_trace(np.random.default_rng(seed), num_layers=LAYERS, num_experts=EXPERTS, top_k=2, requests=[(3, 9), (2, 6)],
                       skew=0.3, guesses=0)  # fmt: skip
    schedule = OffloadSchedule().with_options(
        cache__policy="lfu", cache__pooled_experts=slots, cache__reset="request" if reset else "never",
        predictor__kind=guesses[0], predictor__depth=1, predictor__staging=guesses[1],
    )  # fmt: skip
    workload = build_workload(trace, schedule.workload, reset_per_request=reset)
    config = make_config(schedule, num_layers=LAYERS, num_experts=EXPERTS, top_k=2, guess_distances=0, guess_width=0)
    state = fresh_state(config, workload, np.array([slots]))
    decision, victims = make_decision(config), []

    def both(state: PolicyState, layer_step: int) -> int:
        expected = looked_through(state, layer_step)
        assert least_used(state, layer_step) == expected
        victims.append(expected)
        return expected

    plain: Any = lambda function: getattr(function, "py_func", function)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "least_used", both)
        for step in range(workload.num_steps):
            plain(offload.begin_step)(config, workload.steps, state, step)
            for layer in range(LAYERS):
                plain(offload.decide_layer_step)(config, workload.steps, state, decision, step, layer)
    assert state.pools[0].queued <= state.num_keys
    assert victims or slots >= 12
