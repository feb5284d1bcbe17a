"""The plan: model, machine, recording, memory and objective in; the chosen schedule with its proof and its rivals out.

Modelled: one search per weight format the user allows; the best overall; every preset as baseline at the same memory and
bits; what binds; and the verdict whether a better policy or only more memory would help: the same memory with Belady's
cache beside the best, and the best with more memory. Ignored: expert parallelism (its own planner).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .. import __version__
from ..errors import DoesNotFit, InputError, Internal
from ..presets import FAMILIES, NEEDS
from ..provenance import made_of
from ..schedule import OffloadSchedule, schedule_from_dict
from ..sim.simulate import Prediction, Rehearsal
from ..traces.content import recording_sha256
from ..units import NS_PER_S
from .baselines import CheckedRuns
from .scoring import FrontPoint, Progress, SearchResult
from .search import search

PLAN_SCHEMA_VERSION = 1
RANKED_BY = {"tokens_per_s": "window_s", "p99_step_s": "step_s.p99", "least_memory": "ledger.device_bytes"}
"""Objectives, with the figure of a schedule that is to be least."""
# How much more device memory the verdict asks about: half as much again, and twice as much.
MORE_MEMORY = (1.5, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What a plan is asked for."""

    bits: tuple[str, ...]
    objective: str = "tokens_per_s"
    floor_tokens_per_s: float | None = None
    concurrency: int = 1
    prefill_chunk_tokens: int | None = None
    exhaustive: bool = False
    """Let no candidate be outrun: every one is simulated until it cannot win."""

    def __post_init__(self) -> None:
        floor = self.floor_tokens_per_s
        if floor is not None and not 0 < floor < math.inf:
            raise InputError("floor_tokens_per_s", floor, "not a speed above zero", "give tokens per second")
        if floor is not None and self.objective != "least_memory":
            rule = "only the objective least_memory has a floor"
            raise InputError("floor_tokens_per_s", floor, rule, "leave it out, or choose that objective")


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadPlan:
    """A finished plan."""

    request: PlanRequest
    best: Prediction
    baselines: tuple[Prediction, ...]
    left_out: dict[str, str]
    """Presets that do not fit, and by how much."""
    front: tuple[FrontPoint, ...]
    references: dict[str, Prediction]
    """belady: the best with a cache that knows the future; more memory: the best given more."""
    num_candidates: int
    num_evaluated: int
    num_abandoned: int
    num_pruned: int
    num_outrun: int
    lower_bound_step_s: float
    optimality_gap: float
    """How much slower the best is than the lower bound, as a fraction of the bound."""
    verdict: str
    provenance: dict[str, Any]
    made_of: dict[str, Any]
    """Model and machine, whole, as the plan document holds them."""


def make_plan(rehearsal: Rehearsal, request: PlanRequest, *, progress: Progress | None = None) -> OffloadPlan:
    """Return the plan for `request` on the rehearsal's window.

    Raises DoesNotFit when no weight format leaves room for any schedule.
    """
    bases = [base_schedule(request, rehearsal.model.native_bits if bits == "native" else bits) for bits in request.bits]
    rehearsal.warm(bases[0])  # compile before forking, so that the workers need not
    with CheckedRuns(rehearsal) as checked:
        if len(bases) == 1:
            checked.submit_presets(bases[0])
        results = _search_each(rehearsal, bases, request, progress)
        base, result = min(results, key=lambda pair: _merit(pair[1], request.objective))
        if len(bases) > 1:
            checked.submit_presets(base)
        winner = result.best.candidate.schedule.with_options(name="best")
        checked.submit(winner)
        predictions, left_out = checked.collect()
    rivals = predictions[:-1]
    best = rehearsal.predict(winner, rows=True)
    if (
        best.outcome.makespan_ns != predictions[-1].outcome.makespan_ns
        or int(best.outcome.step_end[-1]) != result.best.total_ns
    ):
        raise Internal("the winner's re-run differs from its score")
    best = dataclasses.replace(best, engine=predictions[-1].engine)
    references = references_of(rehearsal, best)
    steps = best.metrics.num_steps
    least_ns = min(r.lower_bound_ns for _, r in results)
    if result.best.total_ns < least_ns:
        words = result.best.candidate.words()
        raise Internal(f"a schedule took {result.best.total_ns} ns, below the bound of {least_ns} ns for all: {words}")
    bound_s = least_ns / NS_PER_S / steps
    mean_s = result.best.total_ns / NS_PER_S / steps
    return OffloadPlan(
        request=request,
        best=best,
        baselines=tuple(rivals),
        left_out=left_out,
        front=tuple(result.front),
        references=references,
        num_candidates=sum(r.num_evaluated + r.num_abandoned + r.num_pruned + r.num_outrun for _, r in results),
        num_evaluated=sum(r.num_evaluated for _, r in results),
        num_abandoned=sum(r.num_abandoned for _, r in results),
        num_pruned=sum(r.num_pruned for _, r in results),
        num_outrun=sum(r.num_outrun for _, r in results),
        lower_bound_step_s=bound_s,
        optimality_gap=mean_s / bound_s - 1 if bound_s else float("inf"),
        verdict=_verdict(best, rivals, references),
        provenance=_provenance(rehearsal),
        made_of=made_of(rehearsal.model, rehearsal.profile),
    )


def _search_each(rehearsal: Rehearsal, bases: list[OffloadSchedule], request: PlanRequest, progress: Progress | None,
                 ) -> list[tuple[OffloadSchedule, SearchResult]]:  # fmt: skip
    """Return one search per weight format that leaves room for any schedule; raises DoesNotFit when none does."""
    results, misfits = [], []
    for base in bases:
        try:
            found = search(
                rehearsal,
                base,
                objective=request.objective,
                floor_tokens_per_s=request.floor_tokens_per_s,
                low_bits=_smaller(rehearsal, base, bases),
                exhaustive=request.exhaustive,
                progress=progress,
            )
            results.append((base, found))
        except DoesNotFit as reason:
            misfits.append(reason)
    if not results:
        raise min(misfits, key=lambda reason: reason.missing_bytes)
    return results


def _smaller(rehearsal: Rehearsal, base: OffloadSchedule, bases: list[OffloadSchedule]) -> str | None:
    """Return the largest allowed weight format smaller than the base's own, for experts that may have two."""
    smaller = [other for other in bases if rehearsal.expert_bytes(other) < rehearsal.expert_bytes(base)]
    return max(smaller, key=rehearsal.expert_bytes).experts.bits if smaller else None


def base_schedule(request: PlanRequest, bits: str) -> OffloadSchedule:
    """Return what the search may not change: bits and batching."""
    return OffloadSchedule(name="search").with_options(
        experts__bits=bits,
        workload__concurrency=request.concurrency,
        workload__prefill_chunk_tokens=request.prefill_chunk_tokens,
    )


def _merit(result: SearchResult, objective: str) -> float:
    if objective == "p99_step_s":
        return result.best.p99_ns
    if objective == "least_memory":
        return float(result.front[-1].device_bytes)
    return float(result.best.total_ns)


def references_of(rehearsal: Rehearsal, best: Prediction) -> dict[str, Prediction]:
    """Return the same schedule with a cache that knows the future, and with more memory for the cache."""
    found: dict[str, Prediction] = {}
    cache = best.schedule.cache
    if cache.policy == "none":
        return found
    # A cache that changes has no fixed places, and one whose misses all stay on the cores would never change.
    changing = {"cache__placement": "popularity", "cache__host_layers": None}
    if best.schedule.kernel.miss == "cpu":
        changing["kernel__miss"] = "cheaper"
    found["belady"] = rehearsal.predict(best.schedule.with_options(name="belady", cache__policy="belady", **changing))
    size = "pooled_experts" if cache.pooled_experts is not None else "experts_per_layer"
    slots = getattr(cache, size)
    most = rehearsal.num_experts if size == "pooled_experts" else rehearsal.trace.num_experts
    for factor in MORE_MEMORY:
        budget = int(rehearsal.budget_bytes * factor)
        roomier = Rehearsal(model=rehearsal.model, profile=rehearsal.profile, trace=rehearsal.trace,
                            window_steps=rehearsal.window_steps, memory_bytes=budget,
                            dense_format=rehearsal.dense_format)  # fmt: skip
        more = (budget - rehearsal.budget_bytes) // rehearsal.expert_bytes(best.schedule)
        more = more if size == "pooled_experts" else more // rehearsal.trace.num_layers
        bigger = best.schedule.with_options(
            name=f"memory x{factor:g}", **{f"cache__{size}": min(most, slots + int(more))}
        )
        found[f"memory x{factor:g}"] = roomier.predict(bigger)
    return found


def _verdict(best: Prediction, rivals: Sequence[Prediction], references: dict[str, Prediction]) -> str:
    """Return in one line whether the policy or the working set limits the best schedule."""
    window_s = best.metrics.window_s
    if not references:
        return f"nothing is cached: {best.metrics.bound} binds"
    policy = window_s / references["belady"].metrics.window_s - 1
    memory = window_s / references[f"memory x{MORE_MEMORY[0]:g}"].metrics.window_s - 1
    which = "working set" if memory > policy else "policy"
    fair = [one for one in rivals if one.schedule.name not in NEEDS]
    fastest = min(fair, key=lambda one: one.metrics.window_s, default=None)
    beside = (
        f"; {fastest.metrics.window_s / window_s:.2f} times as fast as the fastest baseline ({fastest.schedule.name})"
        if fastest
        else ""
    )
    future = "a cache that knows the future"
    if best.schedule.cache.policy == "static":
        future += " but starts empty"  # what is fixed is there when the window begins
    return (
        f"{which}: {best.metrics.bound} binds; {future} would give {policy:+.1%}, "
        f"half as much memory again {memory:+.1%}{beside}"
    )


def _provenance(rehearsal: Rehearsal) -> dict[str, Any]:
    return {
        "produced_by": f"moeplan {__version__}",
        "model": rehearsal.model.name,
        "hardware": rehearsal.profile.name,
        "memory_bytes": rehearsal.budget_bytes,
        "window_steps": rehearsal.window_steps,
        "dense_bits": rehearsal.dense_format.name if rehearsal.dense_format is not None else "16",
        "trace": {
            "model": rehearsal.trace.model,
            "source": rehearsal.trace.source,
            "sha256": recording_sha256(rehearsal.trace),
            "num_tokens": rehearsal.trace.num_tokens,
            "num_layers": rehearsal.trace.num_layers,
            "num_experts": rehearsal.trace.num_experts,
            "top_k": rehearsal.trace.top_k,
        },
    }


def prediction_to_dict(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as plain values, flat for the keys others rely on."""
    metrics = asdict(prediction.metrics)
    return {
        "name": prediction.schedule.name,
        "schedule": prediction.schedule.to_dict(),
        **metrics,
        "ledger": prediction.ledger.to_dict(),
        "assumptions": list(prediction.assumptions),
        "engine": prediction.engine,
    }


def plan_to_dict(plan: OffloadPlan) -> dict[str, Any]:
    """Return a plan as plain values, as written to plan.json."""
    return {
        "schema_version": PLAN_SCHEMA_VERSION,
        "kind": "offload",
        "provenance": plan.provenance,
        **plan.made_of,
        "request": asdict(plan.request),
        "ranked_by": RANKED_BY[plan.request.objective],
        "best": prediction_to_dict(plan.best),
        "baselines": [
            prediction_to_dict(one) | {"family": FAMILIES[one.schedule.name], "needs": NEEDS.get(one.schedule.name)}
            for one in plan.baselines
        ],
        "baselines_that_do_not_fit": plan.left_out,
        "references": {name: prediction_to_dict(one) for name, one in plan.references.items()},
        "front": [
            {
                "level": p.level,
                "device_bytes": p.device_bytes,
                **p.figures,
                "schedule": p.schedule.to_dict(),
            }
            for p in plan.front
        ],
        "num_candidates": plan.num_candidates,
        "num_evaluated": plan.num_evaluated,
        "num_abandoned": plan.num_abandoned,
        "num_pruned": plan.num_pruned,
        "num_outrun": plan.num_outrun,
        "lower_bound_step_s": plan.lower_bound_step_s,
        "optimality_gap": plan.optimality_gap,
        "verdict": plan.verdict,
    }


def plan_to_json(plan: OffloadPlan) -> str:
    """Return plan.json's text: sorted nowhere, rounded nowhere, byte-identical for equal plans."""
    return json.dumps(plan_to_dict(plan), indent=1, allow_nan=False) + "\n"


def planned_schedule(document: dict[str, Any]) -> OffloadSchedule:
    """Return the chosen schedule of a plan.json that was read back."""
    return schedule_from_dict(document["best"]["schedule"])
