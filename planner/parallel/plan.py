"""The expert-parallel plan: the best schedule, what each rival and each ingredient is worth, and whether moving there pays.

Modelled: placements made on one part of the recording, chosen by a second, reported on a third; presets as baselines at
their own settings; the ingredients of the best added one after another and taken away one by one; the cost of moving experts
from the order in which engines load them; how the plan fares on another recording than it was made for. Ignored:
serving (arrivals, queues), and re-planning while running.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

from ...base.errors import DoesNotFit, Internal
from ...base.frames import Tabular, flat
from ...base.version import __version__
from ...sim.parallel.runnable import as_run_on_cores
from ...sim.parallel.simulate import EpPrediction
from ...specs.machines.profile import Profile
from ...specs.machines.serving import serving_machine
from ...specs.memory import MemoryBreakdown
from ...specs.models import ModelSpec, weight_format
from ...specs.plans.document import EXPERT_PARALLEL, SCHEMA_VERSION
from ...specs.provenance import made_of
from ...specs.schedules.parallel import ExpertParallelSchedule
from ...traces.content import recording_sha256
from ...traces.recording import RoutingTrace
from ..placement.placement import Placement
from ..trials import Progress
from .bound import lower_bound_s
from .case import (
    Ask,
    ParallelRequest,
    Recording,
    batch_that_fits,
    check_ep_match,
    evidence_of,
    plain_schedule,
    prepare_ep,
    redundant_counts,
)
from .evidence import CHOOSE, PLAN, REPORT, CountEvidence, TokenEvidence
from .factors import FactorTable, check_told, factor_table, fixed_by, levels_of
from .headline import Headline, headline, rival_of
from .latency import Latency, latency
from .links import link_tokens
from .maps import placement_to_dict, plan_maps
from .migration import Migration, migration
from .period.study import Asked, PeriodStudy, period_study
from .period.windows import windows_of
from .rivals import ablation, baselines, staleness, with_copies
from .search import EpSearch, Scored, describe
from .words import assumptions, ep_verdict

_FORMATS_TRIED = ("16", "8")
"""Of experts, where a request leaves them open: the first that fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan(Tabular):
    """A finished plan."""

    SHOWN: ClassVar[tuple[str, ...]] = (
        "role",
        "name",
        "step_s",
        "tokens_per_s",
        "exposed_s",
        "max_over_mean_load",
        "bound",
    )

    request: ParallelRequest
    best: EpPrediction
    placement: Placement
    dispatch: np.ndarray[Any, np.dtype[np.int32]] | None
    """int32 [layers, experts, ranks]: the planned slot per source rank, where the best router is a static table."""
    baselines: tuple[EpPrediction, ...]
    references: tuple[EpPrediction, ...]
    left_out: dict[str, str]
    """Presets that are not among the baselines, and why."""
    ablation: tuple[dict[str, Any], ...]
    """Steps from plain expert parallelism to the best, and the best without each ingredient."""
    migration: Migration
    staleness: tuple[dict[str, Any], ...]
    overfit_fraction: float
    """The best's step on unseen requests over its step on those it was planned on, less one; 0 from counts."""
    num_candidates: int
    lower_bound_step_s: float
    optimality_gap: float
    headline: Headline
    """The best beside what engines do today, or what was named."""
    factors: FactorTable
    """What each decision is worth, from plain expert parallelism, alone and together."""
    memory: MemoryBreakdown
    """Of a rank under the best."""
    largest_tokens_per_rank: int
    """Most tokens of a rank in a step that fit under the best."""
    latency: Latency
    """What users of the best wait for."""
    target: str | None
    """The engine that the plan is for."""
    verdict: str
    assumptions: tuple[str, ...]
    provenance: dict[str, Any]
    made_of: dict[str, Any]
    """Model and machine, whole, as the plan document holds them."""
    links: dict[str, list[list[int]]]
    """Bytes dispatched in a step from rank to rank, all layers: plain expert parallelism (before) and the best (after)."""
    rank_rows: dict[str, list[list[int]]]
    """Rows of each rank in each layer in the first reported step, before and after."""
    search: EpSearch = field(repr=False)
    period: PeriodStudy | None = None
    """Whether rebalancing pays over a served period, where one was given."""
    drafting: dict[str, Any] | None = None
    """How many tokens are drafted and what became of other lengths; None: nothing was asked of it."""
    set_by_user: tuple[dict[str, Any], ...] = ()
    """What settings have changed, each with what stood there before."""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row for the best, for every published schedule, and for every reference that is out of reach."""
        found = [("best", self.best), *(("published", one) for one in self.baselines)]
        found += [("reference", one) for one in self.references]
        return [{"role": role} | flat(_rival(one)) for role, one in found]

    def table_title(self) -> str:
        """Return the verdict."""
        return self.verdict

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, as plan.json holds it."""
        return ep_plan_to_dict(self)


def make_ep_plan(
    model: ModelSpec,
    profile: Profile,
    recording: Recording,
    request: ParallelRequest,
    *,
    others: Mapping[str, Recording] | None = None,
    progress: Progress | None = None,
    engine: str | None = None,
    ask: Ask | None = None,
    period: Asked | None = None,
) -> ParallelPlan:
    """Return the plan for a recording on `request.num_nodes` servers of `profile`.

    ask: what else is asked of the search. engine: whose measured kernels the plan is predicted with, on machines that have some;
    None: the usual one's. others: further recordings, by name, on which the finished plan is evaluated. period: what is served
    afterwards, over which policies of rebalancing are compared under the plan's schedule.

    Raises InputError where recording, model, ranks and engine do not belong together, DoesNotFit where no schedule fits,
    MissingCalibration where the profile lacks a tier.
    """
    began = time.monotonic()
    if period is not None:
        windows_of(
            model, period.recordings, request, period.window_steps
        )  # what is wrong with it is said before the search
    request, ask = request.of_model(model), ask or Ask()
    on_cores = ask.runs is None and profile.device.kind == "cpu"
    if on_cores:
        ask = dataclasses.replace(ask, runs=lambda schedule, placement: as_run_on_cores(schedule, model))
    check_ep_match(model, recording, request)
    profile = serving_machine(profile, engine)
    asked, plain_ones = (
        request,
        [plain_schedule(bits) for bits in ((request.bits,) if request.bits else _FORMATS_TRIED)],
    )
    request, fewer = batch_that_fits(model, profile, recording, request, plain_ones)
    evidence = evidence_of(model, recording, request)
    search, base, ranked = _ranked(model, profile, evidence, request, progress, ask, began)
    fitted = _batch_within(search, recording, asked, ranked[0])
    if fitted is not None:
        request = dataclasses.replace(request, tokens_per_rank=fitted)
        evidence = evidence_of(model, recording, request)
        search, base, ranked = _ranked(model, profile, evidence, request, progress, ask, began)
    counts = redundant_counts(request, model.num_experts)
    chosen, told = ranked[0].schedule.with_options(name="best"), search.told(base) or base
    copies = chosen.placement.num_redundant or (
        request.num_redundant if request.num_redundant is not None else _best_copies(ranked, counts)
    )
    best = search.predict(chosen, REPORT, engine="both", rows=True, parts=True)
    levels = levels_of(chosen, told, ask.factors, replicas=copies or _usual_copies(request, model), prefill=request.prefill,
                       nodes=request.num_nodes, fixed_exchange=ask.runs is not None and not on_cores)  # fmt: skip
    if ask.target is not None:
        check_told(search, told, levels, ask.factors, ask.target)
    request = dataclasses.replace(request, num_redundant=copies)
    rivals, references, left_out = baselines(search, base, request)
    plain = next(each for each in rivals if each.schedule.name == "ep")
    table = factor_table(search, told, levels, fixed_by(search, told, levels, ask.factors) if ask.target else None)
    rival, why = rival_of(search, told, against=ask.against, copies=copies, engine=ask.target)
    beside = headline(search, rival, why, best)
    candidate = search.placements.candidate(chosen)
    # Only placement needs weights moved; the rest of the gain is configuration.
    unmoved = search.predict(with_copies(search, chosen, "contiguous", 0), REPORT)
    moved = migration(
        search.placements.placement("contiguous", 0), candidate.placement, before_s=unmoved.step_s, after_s=best.step_s,
        expert_bytes=model.expert_bytes(weight_format(base.kernel.bits)), constants=search.simulation.costing.constants,
    )  # fmt: skip
    memory, most = search.memory(chosen)
    waits = latency(search, recording, request, chosen, best.step_s, most)
    waits.check(request, describe(chosen))
    # Where the best divides experts so that none are placed, rebalancing is of the best that places them.
    placing = next((one.schedule for one in ranked if one.schedule.parallel.experts not in ("tensor", "node")), chosen)
    study = None if period is None else period_study(search, placing, recording, request, period, copies)
    bound = lower_bound_s(search, chosen)
    planned = search.predict(chosen, PLAN).step_s
    return ParallelPlan(
        request=request, best=best, placement=candidate.placement, dispatch=getattr(candidate.router, "table", None),
        baselines=tuple(rivals), references=tuple(references), left_out=left_out, ablation=tuple(ablation(search, base, chosen)),
        migration=moved, staleness=tuple(staleness(search, chosen, base, request, model, others or {})),
        overfit_fraction=best.step_s / planned - 1 if evidence.exact else 0.0, num_candidates=len(ranked),
        lower_bound_step_s=bound, optimality_gap=best.step_s / bound - 1 if bound else float("inf"),
        headline=beside, factors=table, memory=memory, largest_tokens_per_rank=most, latency=waits, target=ask.target,
        verdict=ep_verdict(best, plain, beside, moved), assumptions=(*fewer, *assumptions(search, evidence, base, chosen)),
        provenance=_provenance(model, profile, recording, search), made_of=made_of(model, profile), search=search, period=study,
        links={name: _links(search, evidence, each) for name, each in (("before", base), ("after", chosen))},
        rank_rows={name: _rank_rows(search, each) for name, each in (("before", base), ("after", chosen))},
    )  # fmt: skip


def _ranked(
    model: ModelSpec, profile: Profile, evidence: TokenEvidence | CountEvidence, request: ParallelRequest,
    progress: Progress | None, ask: Ask, began: float,
) -> tuple[EpSearch, ExpertParallelSchedule, list[Scored]]:  # fmt: skip
    """Return a search, the plain schedule that it starts from, and every schedule that fits, best first."""
    search, base = _first_that_fits(model, profile, evidence, request, progress)
    search.engine_runs = ask.runs
    search.trials.until = math.inf if ask.seconds is None else began + ask.seconds
    return search, base, search.best(base, redundant_counts(request, model.num_experts), CHOOSE)


def _batch_within(search: EpSearch, recording: Recording, request: ParallelRequest, best: Scored) -> int | None:
    """Return the sequences on a rank with which the best so far just keeps --tpot, where the request leaves the batch open; else None."""
    if (
        request.tpot_s is None
        or request.prefill
        or request.tokens_per_rank is not None
        or request.concurrency is not None
    ):
        return None
    found = latency(search, recording, request, best.schedule, best.prediction.step_s, search.memory(best.schedule)[1])
    return found.largest_within or None


def _first_that_fits(
    model: ModelSpec,
    profile: Profile,
    evidence: TokenEvidence | CountEvidence,
    request: ParallelRequest,
    progress: Progress | None,
) -> tuple[EpSearch, ExpertParallelSchedule]:
    """Return the search and the plain schedule it starts from, in the first weight format that fits."""
    misfit: DoesNotFit | None = None
    for bits in (request.bits,) if request.bits else _FORMATS_TRIED:
        base = plain_schedule(bits)
        search = prepare_ep(model, profile, evidence, request, base, progress)
        try:
            search.predict(base, CHOOSE)
        except DoesNotFit as reason:
            misfit = misfit or reason
            continue
        return search, base
    raise misfit or Internal("no weight format was tried")


def _best_copies(ranked: Sequence[Scored], counts: Sequence[int]) -> int:
    """Return the number of copies with which a schedule that has any does best; the least where none was tried."""
    found = (each.schedule.placement.num_redundant for each in ranked)
    return next((count for count in found if count), counts[0])


def _usual_copies(request: ParallelRequest, model: ModelSpec) -> int:
    """Return the copies that the table of factors adds where the plan has none: one slot more on every rank."""
    return redundant_counts(dataclasses.replace(request, num_redundant=None), model.num_experts)[0]


def _links(
    search: EpSearch, evidence: TokenEvidence | CountEvidence, schedule: ExpertParallelSchedule
) -> list[list[int]]:
    tokens = link_tokens(evidence, search.placements.candidate(schedule), schedule)
    each = search.simulation.model.expert_hidden * schedule.all_to_all.dispatch_bytes_per_value
    return [[round(value) for value in row] for row in (tokens * each).tolist()]


def _rank_rows(search: EpSearch, schedule: ExpertParallelSchedule) -> list[list[int]]:
    found: list[list[int]] = (
        search.evidence.loads(REPORT, search.placements.candidate(schedule), schedule)[0].rank_rows().tolist()
    )
    return found


def _provenance(model: ModelSpec, profile: Profile, recording: Recording, search: EpSearch) -> dict[str, Any]:
    tokens = recording.num_tokens if isinstance(recording, RoutingTrace) else None
    return {
        "produced_by": f"moeplan {__version__}", "model": model.name, "hardware": profile.name,
        "trace": {"model": recording.model, "source": recording.source, "sha256": recording_sha256(recording),
                  "num_tokens": tokens, "num_layers": recording.num_layers,
                  "num_experts": recording.num_experts, "layer_ids": list(model.moe_layers),
                  "kind": "routing" if tokens is not None else "counts"},
        "num_evaluated": search.trials.tally.num_evaluated, "step_tokens": search.evidence.step_tokens,
    }  # fmt: skip


def _rival(prediction: EpPrediction) -> dict[str, Any]:
    return prediction.to_dict() | {
        "schedule": prediction.schedule.to_dict(),
        "description": describe(prediction.schedule),
    }


def ep_plan_to_dict(plan: ParallelPlan) -> dict[str, Any]:
    """Return a plan as plain values, as written to plan.json."""
    best = plan.best.to_dict() | {"schedule": plan.best.schedule.to_dict(), "description": describe(plan.best.schedule),
                                  "engine": "compiled, checked by simpy"}  # fmt: skip
    return {
        "schema_version": SCHEMA_VERSION, "kind": EXPERT_PARALLEL, "provenance": plan.provenance, **plan.made_of,
        "request": {key: value for key, value in asdict(plan.request).items() if key != "workers"}, "best": best,
        "placement": placement_to_dict(plan.placement),
        "baselines": [_rival(each) for each in plan.baselines],
        "references": [_rival(each) for each in plan.references],
        "baselines_left_out": plan.left_out, "ablation": list(plan.ablation), "migration": plan.migration.to_dict(),
        "period": None if plan.period is None else plan.period.to_dict(),
        "headline": plan.headline.to_dict(), "factors": plan.factors.to_dict(), "target": plan.target,
        "memory": plan.memory.to_dict(), "memory_budget_bytes": plan.search.simulation.budget_bytes,
        "largest_tokens_per_rank": plan.largest_tokens_per_rank, "latency": plan.latency.to_dict(),
        "tokens_a_step": plan.request.tokens_a_step, "num_skipped": plan.search.trials.tally.num_skipped,
        "staleness": list(plan.staleness), "links": plan.links, "rank_rows": plan.rank_rows,
        **plan_maps(plan.search, plain_schedule(plan.best.schedule.kernel.bits), plan.best.schedule, plan.dispatch),
        "overfit_fraction": plan.overfit_fraction, "num_candidates": plan.num_candidates,
        "lower_bound_step_s": plan.lower_bound_step_s, "optimality_gap": plan.optimality_gap, "verdict": plan.verdict,
        "assumptions": list(plan.assumptions), "set_by_user": list(plan.set_by_user), "drafting": plan.drafting,
    }  # fmt: skip
