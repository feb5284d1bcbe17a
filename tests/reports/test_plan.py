"""A real plan through to its page and its timeline: the documents that planner and reports exchange must not drift apart."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moeplan.planner.offload.make import make_plan
from moeplan.planner.offload.plan import OffloadRequest, plan_to_dict
from moeplan.reports.offload.hit_curves import hit_curves
from moeplan.reports.offload.page import plan_report
from moeplan.reports.timelines.occupancy import cache_occupancy
from moeplan.reports.timelines.perfetto import timeline_events
from moeplan.sim.offload.simulate import Simulation
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models.load import load_model
from report_pages import Page
from strategies import make_trace


def test_a_plan_becomes_a_page_and_a_timeline() -> None:
    model = load_model("tiny-moe")
    trace = make_trace(
        np.random.default_rng(5), num_layers=model.num_moe_layers, num_experts=model.num_experts, top_k=model.top_k,
        requests=[(2, 6)], skew=0.1,
    )  # fmt: skip
    profile = load_hardware("t4")
    budget = int(profile.device.runtime_bytes.value) + 40 * 2**20
    simulation = Simulation(model=model, profile=profile, trace=trace, memory_bytes=budget)
    plan = make_plan(simulation, OffloadRequest(bits=("16",)))
    document = json.loads(json.dumps(plan_to_dict(plan)))
    lru, belady = hit_curves(simulation, plan.best.schedule)
    rows = plan.best.outcome.timeline
    page = Page(plan_report(document, timeline=rows, lru_curve=lru, belady_curve=belady, profile=profile))
    names = [row[0].removesuffix(" †") for row in page.rows["speed"]]
    assert (
        names[1:3] == ["Chosen", "best"]
        and {one.schedule.name for one in plan.baselines} <= set(names)
        and set(plan.left_out) <= set(names)
    )
    assert page.plots["plot-speed"]["data"][0]["x"][0] == plan.best.metrics.decode_tokens_per_s
    assert page.plots["plot-front"]["data"][0]["x"][-1] <= budget / 2**20
    held = cache_occupancy(simulation, plan.best.schedule)
    events = timeline_events(rows, occupancy=held)
    counts = [event["args"]["experts"] for event in events if event.get("name") == "cache"]
    assert counts[-1] == held.experts[-1, -1] and max(counts) == held.experts.max()
    copied = sum(event["args"].get("bytes", 0) for event in events if event["ph"] == "X")
    assert copied == pytest.approx(plan.best.metrics.bytes_copied)
