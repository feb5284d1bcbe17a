"""The example of a policy of one's own: it beats LRU on the bundled recording, and all three that run it count alike."""

from __future__ import annotations

import pytest

from executor_stages import expert_tokens, run_input, small_model, small_trace, tables_of
from house import ROOT
from moeplan import simulate
from moeplan.executor.running.execute import execute, open_stage
from moeplan.executor.running.execution import count_differences
from moeplan.sim.offload.simulators import run_compiled
from moeplan.sim.policies.policy_file import load_policy
from moeplan.specs.schedules.offload import OffloadSchedule, apply_settings

FOLDER = ROOT / "examples/custom_policy"
# Hits of 5029 look-ups with so many experts of each layer cached.
GOLDEN = {3: {"lru": 1618, "fading": 1836}, 6: {"lru": 2760, "fading": 2989}}


@pytest.mark.parametrize("slots", GOLDEN)
def test_the_example_beats_lru_on_the_bundled_recording(slots: int) -> None:
    hits = {}
    for policy in (None, FOLDER / "fading_policy.py"):
        found = simulate(
            "tiny-moe", "t4", trace="bundled", schedule="mixtral-offloading-code", window=400, simulator="both",
            settings={"cache.experts_per_layer": str(slots)}, policy=policy,
        )  # fmt: skip
        hits[found.schedule.cache.policy] = found.metrics.hits
    assert hits == GOLDEN[slots] and hits["fading"] > hits["lru"]


@pytest.mark.parametrize("name", ["fading_policy.py", "three_rules.py"])
def test_the_executor_does_what_the_simulators_say(name: str) -> None:
    base = {"cache.experts_per_layer": 3, "predictor.kind": "next-gate", "predictor.width": 2}
    schedule = apply_settings(OffloadSchedule(), base | dict(load_policy(FOLDER / name).settings()))
    run = run_input(schedule, small_trace())
    with open_stage(small_model(), [run.workload]) as stage:
        found = execute(stage, run)
    tables = tables_of(run, *found.expert_bytes)
    outcome = run_compiled(run.config, run.workload, tables, run.capacities, serial=False, weighed=run.weighed)
    assert count_differences(found, outcome, expert_tokens(run.workload)) == []
    assert found.counts.evictions > 0
