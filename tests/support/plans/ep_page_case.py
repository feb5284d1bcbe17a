"""One small expert-parallel plan, made once, for the tests of its page and of its replay."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import numpy as np

from moeplan.planner.parallel.case import ParallelRequest, plain_schedule
from moeplan.planner.parallel.evidence import REPORT
from moeplan.planner.parallel.links import link_tokens
from moeplan.planner.parallel.plan import ParallelPlan, ep_plan_to_dict, make_ep_plan
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models.load import load_model
from moeplan.traces.recording import LoadProfile
from strategies import make_trace

MODEL = dataclasses.replace(load_model("deepseek-v2-lite"), num_layers=3, moe_layers=(1, 2), num_experts=16, top_k=3)
HARDWARE = load_hardware("h800-sxm")
REQUEST = ParallelRequest(
    num_nodes=2,
    ranks_per_node=2,
    num_redundant=4,
    prefill=True,
    context_tokens=40,
    tokens_per_rank=128,
    search_moves=500,
    bits=None,
)


def recording(seed: int = 1):
    """Return routing of forty prompts, some experts far more popular than others."""
    trace = make_trace(
        np.random.default_rng(seed), num_layers=2, num_experts=16, top_k=3, requests=[(60, 0)] * 40, skew=0.15
    )
    return dataclasses.replace(trace, layer_ids=(1, 2))


def counts() -> LoadProfile:
    """Return counts of two layers, popular at opposite ends."""
    load = np.round(1000 * np.exp(-0.15 * np.arange(16))).astype(np.int64)
    return LoadProfile(
        counts=np.stack([load, load[::-1]]), model="", layer_ids=(1, 2), source="made up", licence="", top_k=3
    )


@cache
def plan() -> ParallelPlan:
    """Return a plan from tokens, evaluated on counts too, whose best is made to use all that a page can show.

    It copies experts, crosses nodes once and pipelines three groups of experts, whatever is fastest in so small a case.
    """
    made = make_ep_plan(MODEL, HARDWARE, recording(), REQUEST, others={"flat <b>": counts()})
    search, base = made.search, plain_schedule("16")
    best = base.with_options(
        name="best", placement__policy="eplb", placement__num_redundant=4, all_to_all__kind="hierarchical", pipeline__split="expert",
        pipeline__num_groups=3, pipeline__all_to_all_sm_fraction=0.125, kernel__choice="best",
    )  # fmt: skip
    candidate = search.placements.candidate(best)
    links, rows = {}, {}
    for name, schedule in (("before", base), ("after", best)):
        there = search.placements.candidate(schedule)
        num_bytes = MODEL.hidden_size * schedule.all_to_all.dispatch_bytes_per_value
        links[name] = np.rint(link_tokens(search.evidence, there, schedule) * num_bytes).astype(int).tolist()
        rows[name] = search.evidence.loads(REPORT, there, schedule)[0].rank_rows().tolist()
    return dataclasses.replace(
        made, best=search.predict(best, REPORT, engine="both", rows=True), placement=candidate.placement, links=links,
        dispatch=getattr(candidate.router, "table", None), rank_rows=rows, verdict="copies: -1.0% step time; do it",
    )  # fmt: skip


@cache
def plan_of_counts() -> ParallelPlan:
    """Return a plan from counts alone."""
    return make_ep_plan(MODEL, HARDWARE, counts(), REQUEST)


def document(made: ParallelPlan | None = None) -> dict:
    """Return a plan document as it is read back from plan.json, a copy of its own."""
    return json.loads(json.dumps(ep_plan_to_dict(made or plan()), allow_nan=False))
