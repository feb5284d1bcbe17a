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
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from ...base.errors import DoesNotFit, InputError, Internal
from ...base.frames import Tabular, flat
from ...base.units import NS_PER_S
from ...base.version import __version__
from ...sim.offload.simulate import Prediction, Simulation
from ...specs.plans.document import OFFLOAD, SCHEMA_VERSION
from ...specs.provenance import made_of
from ...specs.schedules.offload import OffloadSchedule, schedule_from_dict
from ...specs.schedules.presets import ENGINE_FAMILY, FAMILIES, NEEDS
from ...traces.content import recording_sha256
from .baselines import CheckedRuns
from .bounds import Bounds
from .objective import RANKED_BY, Limits, out_of_reach
from .scoring import FrontPoint, Progress, Scored, SearchResult, front_point, is_better, merit, score
from .search import search
from .space import Candidate
from .verdict import need_nothing, references_of, run_ns, verdict, with_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadRequest:
    """What is asked of a plan for one device."""

    bits: tuple[str, ...] = ("native",)
    """Weight formats that experts may have; native: the checkpoint's."""
    objective: str = "tokens_per_s"
    floor_tokens_per_s: float | None = None
    concurrency: int = 1
    prefill_chunk_tokens: int | None = None
    exhaustive: bool = False
    """Let no candidate be eliminated by racing: every one is simulated until it cannot win."""
    ttft_s: float | None = None
    """Most that the first token of a request may take."""
    tpot_s: float | None = None
    """Most that each further token may take."""
    seconds: float | None = None
    """After so long the search begins no further candidate (several weight formats share it); None: all are looked at."""

    @property
    def limits(self) -> Limits:
        """What every schedule must keep."""
        return Limits(ttft_s=self.ttft_s, tpot_s=self.tpot_s)

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            limit = getattr(self, name)
            if limit is not None and not 0 < limit < math.inf:
                raise InputError(name, limit, "not a time above zero", "give seconds")
            if limit is not None and self.objective == "least_memory":
                rule = "least memory has a floor, no limits"
                raise InputError(name, limit, rule, "give floor_tokens_per_s, or choose another objective")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise InputError("seconds", self.seconds, "not a time above zero", "give seconds")
        floor = self.floor_tokens_per_s
        if floor is not None and not 0 < floor < math.inf:
            raise InputError("floor_tokens_per_s", floor, "not a speed above zero", "give tokens per second")
        if floor is not None and self.objective != "least_memory":
            rule = "only the objective least_memory has a floor"
            raise InputError("floor_tokens_per_s", floor, rule, "leave it out, or choose that objective")


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadPlan(Tabular):
    """A finished plan."""

    SHOWN: ClassVar[tuple[str, ...]] = (
        "role",
        "name",
        "decode_tokens_per_s",
        "decode_tokens_per_s_low",
        "decode_tokens_per_s_high",
        "prefill_tokens_per_s",
        "ttft_s",
        "request_s",
        "hit_rate",
        "bound",
    )
    request: OffloadRequest
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
    num_raced_out: int
    num_skipped: int
    """Not looked at: time was up."""
    lower_bound_step_s: float
    optimality_gap: float
    """How much slower the best is than the lower bound, as a fraction of the bound."""
    verdict: str
    provenance: dict[str, Any]
    made_of: dict[str, Any]
    """Model and machine, whole, as the plan document holds them."""
    simulation: Simulation = field(repr=False)
    """What the search ran on."""
    served: dict[str, Any] | None = None
    """The engine that the plan is for, and how its own settings compare; None: whatever can run it."""
    asked: dict[str, Any] = field(default_factory=dict)
    """What was asked for: what makes the plan, and routing that was made up for it, again."""
    notes: tuple[str, ...] = ()
    """What was taken where nothing was said."""
    set_by_user: tuple[dict[str, Any], ...] = ()
    """What settings have changed, each with what stood there before."""
    policy: dict[str, str] | None = None
    """The policy file whose rules were tried beside the bundled ones."""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row for the best, for every published schedule, and for every reference that is out of reach."""
        found = [("best", prediction_to_dict(self.best))]
        found += [("published", prediction_to_dict(one)) for one in self.baselines]
        found += [("reference", prediction_to_dict(one) | {"name": name}) for name, one in self.references.items()]
        return [{"role": role} | flat(one) for role, one in found]

    def table_title(self) -> str:
        """Return the verdict."""
        return self.verdict

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, as plan.json holds it."""
        return plan_to_dict(self)


def make_plan(simulation: Simulation, request: OffloadRequest, *, progress: Progress | None = None) -> OffloadPlan:
    """Return the plan for `request` on the simulation's window.

    Raises DoesNotFit when no weight format leaves room for any schedule.
    """
    bases = [
        base_schedule(request, simulation.model.native_bits if bits == "native" else bits) for bits in request.bits
    ]
    simulation.warm(bases[0])  # compile before forking, so that the workers need not
    results: list[tuple[OffloadSchedule, SearchResult]] = []
    compared = simulation
    if request.objective == "least_memory":  # what the answer has to beat, it has to beat with the answer's memory
        results = _search_each(simulation, bases, request, progress)
        _, result = min(results, key=lambda pair: _merit(pair[1], request))
        compared = with_memory(simulation, result.front[-1].device_bytes)
    with CheckedRuns(compared) as checked:
        if len(bases) == 1:
            checked.submit_presets(bases[0])
        results = results or _search_each(simulation, bases, request, progress)
        base, result = min(results, key=lambda pair: _merit(pair[1], request))
        if request.limits.excess(result.best.figures):
            nearest = result.best.candidate.words()
            raise out_of_reach(request.limits, nearest or "the plainest schedule", result.best.figures)
        if len(bases) > 1:
            checked.submit_presets(base)
        winner = result.best.candidate.schedule.with_options(name="best")
        checked.submit(winner)
        predictions, left_out = checked.collect()
    rivals, confirmed = predictions[:-1], predictions[-1]
    if confirmed.schedule.name != winner.name or run_ns(confirmed) != result.best.total_ns:
        raise Internal(f"the winner's re-run differs from its score: {result.best.candidate.words()}")
    same_as = _better_rival(simulation, base, request, result, rivals)
    if same_as is not None:
        confirmed = same_as
        winner = same_as.schedule.with_options(name="best")
    best = simulation.predict(winner, rows=True)
    if best.outcome.makespan_ns != confirmed.outcome.makespan_ns or run_ns(best) != result.best.total_ns:
        raise Internal("the winner's re-run differs from its score")
    best = dataclasses.replace(best, engine=confirmed.engine)
    references = references_of(compared, best)
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
        num_candidates=sum(
            r.num_evaluated + r.num_abandoned + r.num_pruned + r.num_raced_out + r.num_skipped for _, r in results
        ),
        num_evaluated=sum(r.num_evaluated for _, r in results),
        num_abandoned=sum(r.num_abandoned for _, r in results),
        num_pruned=sum(r.num_pruned for _, r in results),
        num_raced_out=sum(r.num_raced_out for _, r in results),
        num_skipped=sum(r.num_skipped for _, r in results),
        lower_bound_step_s=bound_s,
        optimality_gap=mean_s / bound_s - 1 if bound_s else float("inf"),
        verdict=verdict(
            best,
            rivals,
            references,
            same_as=same_as.schedule.name if same_as is not None else None,
            floor_tokens_per_s=request.floor_tokens_per_s,
            objective=request.objective,
        ),
        provenance=provenance_of(simulation),
        made_of=made_of(simulation.model, simulation.profile),
        simulation=simulation,
    )


def _search_each(simulation: Simulation, bases: list[OffloadSchedule], request: OffloadRequest, progress: Progress | None,
                 ) -> list[tuple[OffloadSchedule, SearchResult]]:  # fmt: skip
    """Return one search per weight format that leaves room for any schedule; raises DoesNotFit when none does."""
    results, misfits = [], []
    for base in bases:
        try:
            found = search(
                simulation,
                base,
                objective=request.objective,
                floor_tokens_per_s=request.floor_tokens_per_s,
                low_bits=_smaller(simulation, base, bases),
                exhaustive=request.exhaustive,
                limits=request.limits,
                seconds=None if request.seconds is None else request.seconds / len(bases),
                progress=progress,
            )
            results.append((base, found))
        except DoesNotFit as reason:
            misfits.append(reason)
    if not results:
        raise min(misfits, key=lambda reason: reason.missing_bytes)
    return results


def _smaller(simulation: Simulation, base: OffloadSchedule, bases: list[OffloadSchedule]) -> str | None:
    """Return the largest allowed weight format smaller than the base's own, for experts that may have two."""
    smaller = [other for other in bases if simulation.expert_bytes(other) < simulation.expert_bytes(base)]
    return max(smaller, key=simulation.expert_bytes).experts.bits if smaller else None


def base_schedule(request: OffloadRequest, bits: str) -> OffloadSchedule:
    """Return what the search may not change: bits and batching."""
    return OffloadSchedule(name="search").with_options(
        experts__bits=bits,
        workload__concurrency=request.concurrency,
        workload__prefill_chunk_tokens=request.prefill_chunk_tokens,
    )


def _merit(result: SearchResult, request: OffloadRequest) -> tuple[float, ...]:
    if request.objective == "least_memory":
        return (float(result.front[-1].device_bytes),)
    return merit(result.best, request.objective, request.limits)


def _better_rival(simulation: Simulation, base: OffloadSchedule, request: OffloadRequest, result: SearchResult,
                  rivals: Sequence[Prediction]) -> Prediction | None:  # fmt: skip
    """Return the published schedule that needs nothing special and is better than the search's best, which it then replaces in
    `result`; None where there is none.
    """
    found: tuple[Prediction, Scored] | None = None
    best = result.best
    for rival in need_nothing(rivals):
        cache = rival.schedule.cache
        each = cache.experts_per_layer or 0
        slots = cache.pooled_experts if cache.pooled_experts is not None else each * simulation.trace.num_layers
        candidate = Candidate(schedule=rival.schedule, level=result.front[-1].level, cached_slots=slots)
        if request.objective == "tokens_per_s" and run_ns(rival) >= best.total_ns:
            continue
        bound = Bounds(simulation, base).of(candidate)
        scored = score(simulation, candidate, bound, simulation.workload(base))
        if scored is None or run_ns(rival) != scored.total_ns:
            raise Internal(f"a published schedule's re-run differs from its score: {candidate.words()}")
        if request.objective == "least_memory":
            # With no more memory than the search's best; a faster one reaches the floor all the more.
            better = scored.total_ns < best.total_ns
        else:
            better = is_better(scored, best, request.objective, request.limits)
        if better:
            found, best = (rival, scored), scored
            result.lower_bound_ns = min(result.lower_bound_ns, bound.whole_ns)
    if found is None:
        return None
    result.best = best
    result.front[-1] = front_point(simulation, result.front[-1].level, best)
    return found[0]


def provenance_of(simulation: Simulation) -> dict[str, Any]:
    """Return what a plan document says of where it comes from."""
    return {
        "produced_by": f"moeplan {__version__}",
        "model": simulation.model.name,
        "hardware": simulation.profile.name,
        "memory_bytes": simulation.budget_bytes,
        "window_steps": simulation.window_steps,
        "dense_bits": simulation.dense_format.name if simulation.dense_format is not None else "16",
        "kv_bytes_per_value": simulation.kv_bytes_per_value,
        "context_tokens": simulation.context_tokens,
        "upload_tokens": simulation.upload_tokens,
        **(
            {}
            if simulation.split is None
            else {"split": simulation.split.to_dict(), "card_budgets": list(simulation.budgets)}
        ),
        "trace": {
            "model": simulation.trace.model,
            "source": simulation.trace.source,
            "sha256": recording_sha256(simulation.trace),
            "num_tokens": simulation.trace.num_tokens,
            "num_layers": simulation.trace.num_layers,
            "num_experts": simulation.trace.num_experts,
            "top_k": simulation.trace.top_k,
        },
    }


def prediction_to_dict(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as plain values, flat for the keys others rely on."""
    metrics = asdict(prediction.metrics)
    return {
        "name": prediction.schedule.name,
        "schedule": prediction.schedule.to_dict(),
        **metrics,
        "memory_breakdown": prediction.memory_breakdown.to_dict(),
        **({"cards": [one.to_dict() for one in prediction.cards]} if prediction.cards else {}),
        "assumptions": list(prediction.assumptions),
        "engine": prediction.engine,
    }


def _rival_to_dict(rival: Prediction) -> dict[str, Any]:
    name = rival.schedule.name
    return prediction_to_dict(rival) | {"family": FAMILIES.get(name, ENGINE_FAMILY), "needs": NEEDS.get(name)}


def plan_to_dict(plan: OffloadPlan) -> dict[str, Any]:
    """Return a plan as plain values, as written to plan.json."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": OFFLOAD,
        "provenance": plan.provenance,
        **plan.made_of,
        "request": asdict(plan.request),
        "ranked_by": RANKED_BY[plan.request.objective],
        "best": prediction_to_dict(plan.best),
        "baselines": [_rival_to_dict(one) for one in need_nothing(plan.baselines)],
        "baselines_that_need_more": [_rival_to_dict(one) for one in plan.baselines if one.schedule.name in NEEDS],
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
        "num_raced_out": plan.num_raced_out,
        "num_skipped": plan.num_skipped,
        "lower_bound_step_s": plan.lower_bound_step_s,
        "optimality_gap": plan.optimality_gap,
        "verdict": plan.verdict,
        **({} if plan.served is None else {"for": plan.served}),
        **({} if plan.policy is None else {"policy": plan.policy}),
        "asked": plan.asked,
        "notes": list(plan.notes),
        "set_by_user": list(plan.set_by_user),
    }


def plan_to_json(plan: OffloadPlan) -> str:
    """Return plan.json's text: sorted nowhere, rounded nowhere, byte-identical for equal plans."""
    return json.dumps(plan_to_dict(plan), indent=1, allow_nan=False) + "\n"


def planned_schedule(document: dict[str, Any]) -> OffloadSchedule:
    """Return the chosen schedule of a plan.json that was read back."""
    return schedule_from_dict(document["best"]["schedule"])
