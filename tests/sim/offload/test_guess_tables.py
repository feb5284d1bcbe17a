"""Guesses that are found once for all runs are those that each run would find for itself, and so is all that follows from them."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, assume, given, settings

from long_runs import examples
from moeplan.base.records import records
from moeplan.sim.offload.simulators import fresh_state
from moeplan.sim.policies.offload import begin_step, decide_layer_step
from moeplan.sim.policies.prefetching import guesses_key, tabulate_guesses
from moeplan.sim.policies.records import GUESS, GUESSED
from moeplan.sim.policies.state import make_decision
from strategies import runs


@settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(runs())
def test_decisions_with_a_table_are_those_without(case):
    config, workload, costs, capacities, _, _ = case
    assume(guesses_key(config) is not None)
    tabulated = next(iter(workload.pieces(config)))
    assert len(tabulated.guessed_start) == workload.num_steps * config.num_layers * config.depth + 1
    decided = []
    for steps in (workload.steps, tabulated):
        state, out, found = fresh_state(config, workload, capacities, costs), make_decision(config), []
        for step in range(workload.num_steps):
            begin_step(config, steps, state, step)
            for layer in range(config.num_layers):
                decide_layer_step(config, steps, state, out, step, layer)
                size = out.size[0]
                found.append([out.items[: size.items].tolist(), out.moves[: size.moves].tolist(),
                              out.promotions[: size.promoted].tolist(), out.backs[: size.backs].tolist()])  # fmt: skip
        decided.append((found, state.counts.tolist()))
    assert decided[0] == decided[1]


@settings(max_examples=examples(30), deadline=None, suppress_health_check=list(HealthCheck))
@given(runs())
def test_what_else_a_schedule_is_changes_no_guess(case):
    config, workload, *_ = case
    key = guesses_key(config)
    assume(key is not None)
    room = workload.num_tokens * config.width * config.depth * config.num_layers
    lists = []
    for one in (key, config):
        start = np.zeros(workload.num_steps * config.num_layers * config.depth + 1, np.int64)
        guessed = records(GUESSED, room)
        tabulate_guesses(one, workload.steps, records(GUESS, config.num_experts), start, guessed)
        lists.append((start.tolist(), guessed[: start[-1]].tolist()))
    assert lists[0] == lists[1]
