"""The search finds what exhaustive simulation finds, its answer beats the baselines, and it says so honestly."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moeplan.base.errors import DoesNotFit, InputError
from moeplan.planner.offload.make import make_plan
from moeplan.planner.offload.plan import OffloadRequest, base_schedule, plan_to_dict, plan_to_json, planned_schedule
from moeplan.planner.offload.search import search
from moeplan.planner.offload.space import candidates, levels
from moeplan.planner.offload.verdict import need_nothing, references_of, run_ns
from moeplan.sim.offload.simulate import Simulation
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.presets import FAMILIES, NEEDS, PRESETS, load_preset
from strategies import make_trace

MIB = 2**20


def simulation(memory_bytes: int = 440 * MIB, steps: int = 30) -> Simulation:
    rng = np.random.default_rng(5)
    trace = make_trace(rng, num_layers=6, num_experts=16, top_k=2, requests=[(4, 40)], skew=0.1, guesses=2)
    return Simulation(
        model=load_model("tiny-moe"),
        profile=load_hardware("t4"),
        trace=trace,
        window_steps=steps,
        memory_bytes=memory_bytes,
    )


def test_search_loses_nothing_by_pruning():
    this = simulation(steps=8)
    base = base_schedule(OffloadRequest(bits=("32",)), "32")
    found = search(this, base)
    every = [(c, this.run(c.schedule)) for level in levels(this, base) for c in candidates(this, base, level)]
    fitting = [(c, o) for c, o in every if o.counts.peak_transient <= c.level]
    assert fitting
    assert found.best.total_ns == min(int(o.step_end[-1]) for _, o in fitting)
    assert found.tally.num_evaluated + found.tally.num_abandoned + found.tally.num_pruned == len(every)
    assert found.lower_bound_ns <= found.best.total_ns


def test_a_plan_beats_every_baseline_and_adds_up():
    this = simulation()
    plan = make_plan(this, OffloadRequest(bits=("32",)))
    document = plan_to_dict(plan)
    fair, apart = document["baselines"], document["baselines_that_need_more"]
    assert {b["name"] for b in (*fair, *apart)} | set(document["baselines_that_do_not_fit"]) == set(PRESETS)
    assert {b["name"] for b in apart} <= set(NEEDS) and all(b["needs"] for b in apart)
    assert not {b["name"] for b in fair} & set(NEEDS)
    assert all(run_ns(plan.best) <= run_ns(one) for one in need_nothing(plan.baselines))
    fastest = min(need_nothing(plan.baselines), key=run_ns)
    assert f"{run_ns(fastest) / run_ns(plan.best):.2f} times as fast as {fastest.schedule.name}" in plan.verdict
    assert all(b["engine"].startswith("compiled, checked by simpy") for b in document["baselines"])
    parts = ("num_evaluated", "num_abandoned", "num_pruned", "num_raced_out")
    assert document["num_candidates"] == sum(document[part] for part in parts)
    assert {b["family"] for b in document["baselines"]} <= set(FAMILIES.values())
    assert document["optimality_gap"] >= 0
    assert document["best"]["memory_breakdown"]["device_bytes"] <= 440 * MIB
    speeds = [1 / point["window_s"] for point in document["front"]]
    assert speeds == sorted(speeds)
    assert {name: document["front"][-1][name] for name in plan.front[-1].figures if name != "step_s"} == {
        name: document["best"][name] for name in plan.front[-1].figures if name != "step_s"
    }
    assert planned_schedule(json.loads(plan_to_json(plan))) == plan.best.schedule
    assert plan_to_json(plan) == plan_to_json(make_plan(this, OffloadRequest(bits=("32",))))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_any_schedule_may_turn_out_best_and_has_its_references(name: str) -> None:
    here = simulation()
    schedule = here.resolve(load_preset(name).with_options(experts__bits="16"))
    if schedule.experts.low_bits is not None:
        schedule = schedule.with_options(experts__low_bits="4")
    best = here.predict(schedule.with_options(name="best"))
    found = references_of(here, best)
    if schedule.cache.policy == "none":
        assert found == {}
        return
    assert set(found) == {"belady", "memory x1.5", "memory x2"}
    belady = found["belady"].schedule
    assert (belady.cache.policy, belady.cache.placement) == ("belady", "popularity")
    if best.schedule.cache.policy in ("lru", "lfu") and best.schedule.kernel.miss == "fetch":
        assert found["belady"].metrics.hit_rate >= best.metrics.hit_rate
    # What stays on the cores never enters a cache: one that changes may fetch instead.
    assert belady.kernel.miss != "cpu"
    assert found["memory x2"].metrics.hit_rate >= best.metrics.hit_rate


def test_the_race_finds_what_running_all_to_the_end_finds():
    this = simulation()
    base = base_schedule(OffloadRequest(bits=("32",)), "32")
    raced, whole = search(this, base), search(this, base, exhaustive=True)
    assert whole.tally.num_raced_out == 0
    assert raced.best.total_ns <= 1.005 * whole.best.total_ns
    count = [
        one.tally.num_evaluated + one.tally.num_abandoned + one.tally.num_pruned + one.tally.num_raced_out
        for one in (raced, whole)
    ]
    assert count[0] == count[1]


def test_a_budget_too_small_says_how_much_is_missing():
    with pytest.raises(DoesNotFit) as caught:
        make_plan(simulation(300 * MIB), OffloadRequest(bits=("32",)))
    assert caught.value.missing_bytes > 0
    assert f"{caught.value.missing_bytes} bytes are missing" in str(caught.value)


def test_objectives_are_checked():
    this, base = simulation(), base_schedule(OffloadRequest(bits=("32",)), "32")
    with pytest.raises(InputError, match="tokens_per_s"):
        search(this, base, objective="speed")
    with pytest.raises(InputError, match="floor"):
        search(this, base, objective="least_memory")
