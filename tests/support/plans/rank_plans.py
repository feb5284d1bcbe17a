"""Expert-parallel plans of a small model for ranks of this machine, made on a profile of lawful samples that says it was measured here."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

from calibration_samples import lawful_samples
from moeplan.api.load import load_trace
from moeplan.calibrate.fitting.fit import fit_profile
from moeplan.calibrate.samples import Sample
from moeplan.devices.device import cpu_name
from moeplan.planner.parallel.case import Ask, ParallelRequest
from moeplan.planner.parallel.plan import ep_plan_to_dict, make_ep_plan
from moeplan.specs.machines.profile import Profile
from moeplan.specs.models.load import load_model
from moeplan.traces.recording import RoutingTrace


def rank_profile(ranks: int = 2, *, name: str | None = None) -> Profile:
    """Return a profile with exchanges between so many ranks of one node."""
    samples = lawful_samples()
    exchanges = [
        Sample(
            kind="all_to_all", labels={"backend": "gloo", "pattern": "balanced", "companion": "none"},
            arguments={"ranks": ranks, "bytes": size, "per_rank_bytes": size}, seconds=(1e-4 + size / 1e9,) * 3,
        )
        for size in (1e3, 1e4, 1e5, 1e6, 1e7)
    ]  # fmt: skip
    device = dict(samples.device) | {"name": name or cpu_name()}
    return fit_profile(dataclasses.replace(samples, samples=(*samples.samples, *exchanges), device=device)).profile


@cache
def rank_plan() -> tuple[dict[str, Any], RoutingTrace]:
    """Return (a plan's document, its recording) of the bundled model on two ranks; made once, so not to be changed."""
    profile, nodes, ranks, tokens = rank_profile(), 1, 2, 200
    recording = load_trace("bundled")
    assert isinstance(recording, RoutingTrace)
    request = ParallelRequest(
        num_nodes=nodes, ranks_per_node=ranks // nodes, tokens_per_rank=tokens, context_tokens=16, num_redundant=ranks, bits="32",
        dense_bits="32", search_moves=20,
    )  # fmt: skip
    plan = make_ep_plan(load_model("tiny-moe"), profile, recording, request, ask=Ask(seconds=1.0))
    document: dict[str, Any] = json.loads(json.dumps(ep_plan_to_dict(plan)))
    return document, recording
