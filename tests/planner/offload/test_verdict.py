"""What a plan says in one line: beside the best there is today, and of what would really help."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from moeplan.base.terminal import print_plan
from moeplan.planner.offload import make as module
from moeplan.planner.offload.make import make_plan
from moeplan.planner.offload.plan import OffloadRequest, plan_to_dict
from moeplan.planner.offload.space import Candidate, candidates
from moeplan.planner.offload.verdict import need_nothing, run_ns, verdict
from moeplan.sim.offload.simulate import Prediction, Simulation
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.presets import NEEDS, load_preset
from strategies import make_trace

MIB = 2**20


def simulation(memory_bytes: int = 440 * MIB) -> Simulation:
    trace = make_trace(
        np.random.default_rng(5), num_layers=6, num_experts=16, top_k=2, requests=[(4, 12)], skew=0.1, guesses=2
    )
    return Simulation(model=load_model("tiny-moe"), profile=load_hardware("t4"), trace=trace, window_steps=10,
                     memory_bytes=memory_bytes)  # fmt: skip


def predicted(name: str = "best", **changes: Any) -> Prediction:
    return simulation().predict(load_preset("on-demand").with_options(name=name, experts__bits="32", **changes))


def lasting(prediction: Prediction, times: float, name: str) -> Prediction:
    """Return a prediction of a run that takes so many times as long."""
    outcome = dataclasses.replace(prediction.outcome, step_end=(prediction.outcome.step_end * times).astype(np.int64))
    return dataclasses.replace(prediction, outcome=outcome, schedule=prediction.schedule.with_options(name=name))


def test_the_verdict_compares_with_the_fastest_that_needs_nothing_special() -> None:
    best = predicted()
    rivals = [
        lasting(best, 5, "naive"),
        lasting(best, 1.25, "fiddler"),
        lasting(best, 0.5, "pre-gated"),
        lasting(best, 0.9, "lookahead"),
    ]
    assert [one.schedule.name for one in need_nothing(rivals)] == ["naive", "fiddler"]
    said = verdict(best, rivals, {})
    assert "1.25 times as fast as fiddler" in said
    assert not any(name in said for name in ("naive", "pre-gated", "lookahead"))


def test_a_reference_that_is_no_faster_is_not_offered_as_a_gain() -> None:
    best = predicted(cache__policy="lru", cache__pooled_experts=8)
    for policy in (0.9, 1.0, 1.089):
        said = verdict(
            best, [], {"belady": lasting(best, policy, "belady"), "memory x1.5": lasting(best, 0.8, "memory x1.5")}
        )
        assert "half as much memory again would make it 25.0% faster" in said
        assert ("knows the future would be" in said) == (policy < 1)
        assert "-" not in re.sub(r"[a-z]-[a-z]", "", said)
    said = verdict(
        best, [], {"belady": lasting(best, 1.1, "belady"), "memory x1.5": lasting(best, 1.01, "memory x1.5")}
    )
    assert "no more memory and no knowledge of the future" in said


@pytest.mark.parametrize("objective", ["tokens_per_s", "p99_step_s", "least_memory"])
def test_nothing_slower_than_a_row_that_needs_nothing_special_is_the_best(monkeypatch, capsys, objective: str) -> None:
    """A search that sees only poor schedules hands its place to the published one that is better."""

    def poor(*arguments: Any, **options: Any) -> list[Candidate]:
        found = candidates(*arguments, **options)
        return [one for one in found if one.schedule.kernel.miss == "fetch" and one.schedule.cache.policy == "lfu"][:2]

    for place in ("search", "least_memory"):
        monkeypatch.setattr(f"moeplan.planner.offload.{place}.candidates", poor)
    monkeypatch.setattr(module, "references_of", lambda *_: {})
    floor = 300.0 if objective == "least_memory" else None
    plan = make_plan(simulation(), OffloadRequest(bits=("32",), objective=objective, floor_tokens_per_s=floor))
    fair = need_nothing(plan.baselines)
    if objective == "p99_step_s":
        assert plan.best.metrics.step_s["p99"] <= min(one.metrics.step_s["p99"] for one in fair)
    else:
        assert run_ns(plan.best) == min(map(run_ns, fair))
    assert "it is " in plan.verdict
    assert plan.best.schedule.name == "best"
    assert plan.best.memory_breakdown.device_bytes == plan.front[-1].device_bytes
    assert (
        all(one.memory_breakdown.device_bytes <= plan.best.memory_breakdown.device_bytes for one in fair)
        or objective != "least_memory"
    )
    assert plan.optimality_gap >= 0
    document = plan_to_dict(plan)
    assert {one["name"] for one in document["baselines_that_need_more"]} <= set(NEEDS)
    print_plan(document, "p.json")
    shown = capsys.readouterr().out
    assert ("apart, since they need more" in shown) == bool(document["baselines_that_need_more"])
    if objective != "least_memory":  # next to nothing fits in the memory of one expert
        assert shown.index("fiddler") < shown.index("apart, since they need more") < shown.index("pre-gated")
