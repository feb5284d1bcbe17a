"""The expert-parallel plan: the best schedule, what each rival and each ingredient is worth, and whether moving there pays.

Modelled: placements made on one part of the recording, chosen by a second, reported on a third; presets as baselines at
their own settings; the ingredients of the best added one after another and taken away one by one; the cost of moving experts
from the order in which engines load them; how the plan fares on another recording than it was made for. Ignored:
serving (arrivals, queues), and re-planning while running.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ...base.errors import DoesNotFit, Internal
from ...base.units import GIB, NS_PER_S
from ...base.version import __version__
from ...sim.parallel.program import OP_EXPERT
from ...sim.parallel.simulate import EpPrediction
from ...specs.machines.bundled_kernels import kernel_machines, with_kernels
from ...specs.machines.profile import Profile
from ...specs.models import ModelSpec, weight_format
from ...specs.plans.document import EXPERT_PARALLEL, SCHEMA_VERSION
from ...specs.provenance import made_of
from ...specs.schedules.parallel import EP_PRESETS, ExpertParallelSchedule, load_ep_preset
from ...traces.content import recording_sha256
from ...traces.recording import RoutingTrace
from ..placement.placement import Placement
from .candidates import Placements
from .case import ParallelRequest, Recording, check_ep_match, evidence_of, plain_schedule, prepare_ep
from .evidence import CHOOSE, PLAN, REPORT, CountEvidence, TokenEvidence
from .links import link_tokens
from .maps import placement_to_dict, plan_maps
from .migration import Migration, migration
from .search import EpProgress, EpSearch, describe

# Presets that stand for themselves: they change the model or cannot be run without loss.
_REFERENCES = ("comet", "scmoe")
# A change below this is not worth an operator's trouble: the noise of step times in serving.
_WORTH_FRACTION = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """A finished plan."""

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
    set_by_user: tuple[dict[str, Any], ...] = ()
    """What settings have changed, each with what stood there before."""

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
    progress: EpProgress | None = None,
    engine: str | None = None,
) -> ParallelPlan:
    """Return the plan for a recording on `request.num_nodes` servers of `profile`.

    engine: whose measured kernels the plan is predicted with, on machines that have some; None: the usual one's. others: further
    recordings, by name, on which the finished plan is evaluated. Raises InputError where recording, model, ranks and engine do not
    belong together, DoesNotFit where no schedule fits, MissingCalibration where the profile lacks a tier.
    """
    request = request.of_model(model)
    check_ep_match(model, recording, request)
    profile = with_kernels(profile, engine)
    evidence = evidence_of(model, recording, request)
    search, base = _first_that_fits(model, profile, evidence, request, progress)
    ranked = search.best(base, request.num_redundant, CHOOSE)
    chosen = ranked[0].schedule.with_options(name="best")
    best = search.predict(chosen, REPORT, engine="both", rows=True)
    rivals, references, left_out = _baselines(search, base, request)
    plain = next(each for each in rivals if each.schedule.name == "ep")
    candidate = search.placements.candidate(chosen)
    # Only placement needs weights moved; the rest of the gain is configuration.
    unmoved = search.predict(_with_copies(search, chosen, "contiguous", 0), REPORT)
    moved = migration(
        search.placements.placement("contiguous", 0), candidate.placement, before_s=unmoved.step_s, after_s=best.step_s,
        expert_bytes=model.expert_bytes(weight_format(base.kernel.bits)), constants=search.simulation.costing.constants,
    )  # fmt: skip
    bound = _lower_bound_s(search, chosen)
    planned = search.predict(chosen, PLAN).step_s
    return ParallelPlan(
        request=request, best=best, placement=candidate.placement, dispatch=getattr(candidate.router, "table", None),
        baselines=tuple(rivals), references=tuple(references), left_out=left_out, ablation=tuple(_ablation(search, base, chosen)),
        migration=moved, staleness=tuple(_staleness(search, chosen, base, request, model, others or {})),
        overfit_fraction=best.step_s / planned - 1 if evidence.exact else 0.0, num_candidates=len(ranked),
        lower_bound_step_s=bound, optimality_gap=best.step_s / bound - 1 if bound else float("inf"),
        verdict=ep_verdict(best, plain, rivals, moved), assumptions=_assumptions(search, evidence, base, chosen),
        provenance=_provenance(model, profile, recording, search), made_of=made_of(model, profile), search=search,
        links={name: _links(search, evidence, each) for name, each in (("before", base), ("after", chosen))},
        rank_rows={name: _rank_rows(search, each) for name, each in (("before", base), ("after", chosen))},
    )  # fmt: skip


def _first_that_fits(
    model: ModelSpec,
    profile: Profile,
    evidence: TokenEvidence | CountEvidence,
    request: ParallelRequest,
    progress: EpProgress | None,
) -> tuple[EpSearch, ExpertParallelSchedule]:
    """Return the search and the plain schedule it starts from, in the first weight format that fits."""
    misfit: DoesNotFit | None = None
    for bits in (request.bits,) if request.bits else ("16", "8"):
        base = plain_schedule(bits)
        search = prepare_ep(model, profile, evidence, request, base, progress)
        try:
            search.predict(base, CHOOSE)
        except DoesNotFit as reason:
            misfit = misfit or reason
            continue
        return search, base
    raise misfit or Internal("no weight format was tried")


def _baselines(search: EpSearch, base: ExpertParallelSchedule,
               request: ParallelRequest) -> tuple[list[EpPrediction], list[EpPrediction], dict[str, str]]:  # fmt: skip
    """Return every preset's prediction on the reporting part, the references', and who is left out and why."""
    rivals: list[EpPrediction] = []
    references: list[EpPrediction] = []
    left_out: dict[str, str] = {}
    for name in EP_PRESETS:
        preset = load_ep_preset(name)
        copies = request.num_redundant if preset.placement.num_redundant else 0
        schedule = preset.with_options(
            placement__num_redundant=copies, kernel__bits=base.kernel.bits,
            exchange__dispatch_bytes_per_value=base.exchange.dispatch_bytes_per_value,
        )  # fmt: skip
        if not search.placements.available(schedule.placement.policy):
            left_out[name] = "needs the routing of single tokens; the recording holds counts only"
            continue
        slots = search.placements.num_slots(copies) // search.simulation.num_ranks
        if schedule.pipeline.split == "expert" and schedule.num_groups > slots:
            schedule = schedule.with_options(pipeline__num_groups=slots)
        try:
            found = search.predict(schedule, REPORT, engine="both")
        except DoesNotFit as reason:
            left_out[name] = str(reason)
            continue
        (references if name in _REFERENCES else rivals).append(found)
    if not any(each.schedule.name == "ep" for each in rivals):
        rivals.insert(0, search.predict(base, REPORT))
    return rivals, references, left_out


def _ablation(search: EpSearch, base: ExpertParallelSchedule, chosen: ExpertParallelSchedule) -> list[dict[str, Any]]:
    """Return the step after each ingredient is added to plain expert parallelism, and without each in the best."""
    bare = {"placement__policy": chosen.placement.policy if chosen.placement.policy != "metro" else "eplb",
            "placement__num_redundant": 0}  # fmt: skip
    ingredients: dict[str, dict[str, Any]] = {
        "parallelism": {f"parallel__{key}": value for key, value in asdict(chosen.parallel).items()},
        "exchange": {"exchange__kind": chosen.exchange.kind, "exchange__tiers": chosen.exchange.tiers},
        "placement": bare,
        "replication": {
            "placement__policy": chosen.placement.policy,
            "placement__num_redundant": chosen.placement.num_redundant,
        },
        "routing": {"replica__choice": chosen.replica.choice, "replica__load_cap": chosen.replica.load_cap},
        "pipeline": {f"pipeline__{key}": value for key, value in asdict(chosen.pipeline).items()},
        "kernels": {"kernel__choice": chosen.kernel.choice},
    }
    plain = base.with_options(pipeline__shared_overlap=chosen.pipeline.shared_overlap)
    before = search.predict(plain, REPORT).step_s
    found: list[dict[str, Any]] = [{"kind": "added", "ingredient": "none", "step_s": before, "change_fraction": 0.0}]
    schedule = plain
    for name, options in ingredients.items():
        schedule = schedule.with_options(**options)
        step_s = search.predict(schedule, REPORT).step_s
        found.append({"kind": "added", "ingredient": name, "step_s": step_s, "change_fraction": step_s / before - 1})
        before = step_s
    whole = search.predict(chosen, REPORT).step_s
    defaults: dict[str, dict[str, Any]] = {
        "parallelism": {"parallel__attention": "data", "parallel__experts": "expert"},
        "placement": {"placement__policy": "contiguous", "placement__num_redundant": 0},
        "replication": bare,
        "exchange": {"exchange__kind": "per-rank", "exchange__tiers": "together"},
        "kernels": {"kernel__choice": "grouped"},
        "routing": {"replica__choice": "nearest"},
        "pipeline": {f"pipeline__{key}": value for key, value in asdict(plain.pipeline).items()},
    }
    for name in ingredients:
        without = chosen.with_options(**defaults[name])
        if name in ("placement", "replication"):
            placement = defaults[name]
            without = _with_copies(
                search, chosen, placement["placement__policy"], placement["placement__num_redundant"]
            )
        step_s = search.predict(without, REPORT).step_s
        found.append({"kind": "removed", "ingredient": name, "step_s": step_s, "change_fraction": step_s / whole - 1})
    return found


def _with_copies(
    search: EpSearch, schedule: ExpertParallelSchedule, policy: str, redundant: int
) -> ExpertParallelSchedule:
    """Return the schedule on another placement, with no more expert groups than a rank then has experts."""
    changed = schedule.with_options(placement__policy=policy, placement__num_redundant=redundant)
    if changed.pipeline.split != "expert":
        return changed
    slots = search.placements.num_slots(redundant) // search.simulation.num_ranks
    return changed.with_options(pipeline__num_groups=min(changed.num_groups, slots))


def _staleness(search: EpSearch, chosen: ExpertParallelSchedule, base: ExpertParallelSchedule, request: ParallelRequest, model: ModelSpec,
            others: Mapping[str, Recording]) -> list[dict[str, Any]]:  # fmt: skip
    """Return, for every other recording, the plan as it is there beside plain expert parallelism and a fresh EPLB."""
    found = []
    for name, recording in others.items():
        check_ep_match(model, recording, request)
        evidence = evidence_of(model, recording, request)
        candidate = search.placements.candidate(chosen)
        fresh = Placements(evidence, model.num_experts, search.simulation.num_ranks, request.num_nodes,
                           search.placements.layer_costs, search.placements.search, request.num_groups)  # fmt: skip
        there = EpSearch(search.simulation, evidence, fresh)
        stale = search.simulation.predict(chosen, evidence.loads(REPORT, candidate, chosen))
        # Where every rank already holds the tokens of its node, nothing is copied.
        copies = request.num_redundant if chosen.parallel.experts in ("expert", "sharded") else 0
        slots = fresh.num_slots(copies)
        groups = min(chosen.num_groups, slots // search.simulation.num_ranks)
        replica = chosen.replica.choice if chosen.replica.choice in ("nearest", "capped", "even") else "nearest"
        options: dict[str, Any] = {"placement__policy": "eplb", "placement__num_redundant": copies}
        options["replica__choice"] = replica
        if chosen.pipeline.split != "none":
            options["pipeline__num_groups"] = max(1, groups)
        renewed = there.predict(chosen.with_options(name="eplb planned here", **options), REPORT)
        plain = there.predict(base, REPORT)
        found.append({
            "recording": name, "plain_step_s": plain.step_s, "plan_step_s": stale.step_s, "replanned_eplb_step_s": renewed.step_s,
            "plan_max_over_mean_load": stale.max_over_mean_load, "replanned_eplb_max_over_mean_load": renewed.max_over_mean_load,
            "change_fraction": stale.step_s / plain.step_s - 1, "replan": renewed.step_s < stale.step_s * (1 - _WORTH_FRACTION),
        })  # fmt: skip
    return found


def _links(
    search: EpSearch, evidence: TokenEvidence | CountEvidence, schedule: ExpertParallelSchedule
) -> list[list[int]]:
    tokens = link_tokens(evidence, search.placements.candidate(schedule), schedule)
    each = search.simulation.model.expert_hidden * schedule.exchange.dispatch_bytes_per_value
    return [[round(value) for value in row] for row in (tokens * each).tolist()]


def _rank_rows(search: EpSearch, schedule: ExpertParallelSchedule) -> list[list[int]]:
    found: list[list[int]] = (
        search.evidence.loads(REPORT, search.placements.candidate(schedule), schedule)[0].rank_rows().tolist()
    )
    return found


def _lower_bound_s(search: EpSearch, chosen: ExpertParallelSchedule) -> float:
    """Return what no placement or overlap can beat: dense parts, and experts level over all ranks.

    A layer's experts take at least their operations at the fastest precision, and at least the reading of every active
    expert's weights once.
    """
    simulation, costing, model = search.simulation, search.simulation.costing, search.simulation.model
    plain = chosen.with_options(
        pipeline__split="none", pipeline__num_groups=1, pipeline__micro_batches=1, kernel__choice="grouped"
    )
    candidate = search.placements.candidate(plain)
    device, constants = simulation.profile.device, costing.constants
    peak = max(constant.value for constant in device.peak_flops_per_s.values())
    if simulation.profile.kernels is None:  # measured kernels may come nearer to the data sheet than its usual share
        peak *= device.compute_efficiency.value
    peak *= max(1.0, constants.grouped_rate, constants.dense_rate)
    read_s = float(
        costing.item_s(np.array([1]), weight_format(chosen.kernel.bits), rate=max(1.0, constants.grouped_rate))[0]
    )
    found = []
    for load in search.evidence.loads(REPORT, candidate, plain):
        program, tables = simulation.program(plain), simulation.tables(plain, load)
        total = float(tables.work_ns[program.op_kind != OP_EXPERT].sum(axis=0).max()) / NS_PER_S
        counted = load.slot_rows if load.expected is None else load.expected.rows
        rows_of, runs = counted.sum(axis=(1, 2)), load.active_slots()
        for layer, rows in enumerate(rows_of.tolist()):
            idle = np.ones(model.num_experts)
            np.multiply.at(idle, candidate.placement.physical_to_logical[layer], 1 - runs[layer])
            active = float((1 - idle).sum())
            total += max(rows * model.expert_flops_per_token / peak, active * read_s) / simulation.num_ranks
        found.append(total)
    return float(np.mean(found))


def ep_verdict(best: EpPrediction, plain: EpPrediction, rivals: list[EpPrediction], moved: Migration) -> str:
    """Return in one line what to do."""
    gain = best.step_s / plain.step_s - 1
    rival = min(rivals, key=lambda each: each.step_s)
    beside = f"; the fastest baseline is {rival.schedule.name} with {rival.step_s / plain.step_s - 1:+.1%}"
    if gain > -_WORTH_FRACTION:
        what = f"the best found ({describe(best.schedule)}) changes a step by {gain:+.1%}"
        return f"stay with plain expert parallelism: {what}{beside}"
    if moved.num_experts == 0:
        return f"{describe(best.schedule)}: {gain:+.1%} step time, nothing to move; do it{beside}"
    do = "do it" if moved.steps_to_pay_back is not None else "do it without moving experts"
    alone = moved.saved_s_per_step / (best.step_s + moved.saved_s_per_step)
    pays = (
        f"pays back after {moved.steps_to_pay_back} steps" if moved.steps_to_pay_back is not None else "never pays back"
    )
    return (
        f"{describe(best.schedule)}: {gain:+.1%} step time, placement alone {-alone:+.1%}; moving {moved.num_bytes / GIB:.0f} GiB "
        f"stalls {moved.stall_s:.2f} s and {pays}; {do}{beside}"
    )


def _assumptions(
    search: EpSearch,
    evidence: TokenEvidence | CountEvidence,
    base: ExpertParallelSchedule,
    chosen: ExpertParallelSchedule,
) -> tuple[str, ...]:
    """Return, in words, what a reader must know before trusting the plan."""
    dense = search.simulation.costing.costs.dense_format.name
    found = [*evidence.notes, f"experts are stored in {base.kernel.bits} bits, all other weights in {dense}"]
    found.append("costs: " + search.simulation.sources() + "; kernels are issued ahead, so the host costs nothing")
    kernels = search.simulation.profile.kernels
    if kernels is not None:
        found.append(
            f"kernels and exchanges as measured on this card: those of {kernels.engine} {kernels.version}, of NCCL and DeepEP"
        )
    elif search.simulation.profile.name in kernel_machines():
        found.append(
            "the card's rates are not those its kernels were measured at: a roofline takes their place, faster than kernels are"
        )
    found.append(f"hierarchical EPLB keeps {search.placements.expert_groups()} expert groups together")
    if chosen.parallel != base.parallel:
        found.append(
            "the best divides the model in another way: the engine starts anew, which moving experts does not count"
        )
    if chosen.placement.policy == "search":
        ours = search.placements.searched_for(chosen)
        names = ", ".join(f"{name} {ours.layers_from.count(name)}" for name in sorted(set(ours.layers_from)))
        found.append(f"layers of the searched placement by what did best on other requests: {names}")
    if isinstance(evidence, TokenEvidence):
        counts = [len(evidence.parts[part]) for part in (PLAN, CHOOSE, REPORT)]
        found.append(f"planned on {counts[0]}, chosen by {counts[1]} and reported on {counts[2]} steps of {evidence.step_tokens} "
                     "tokens, from disjoint requests")  # fmt: skip
    return tuple(found)


def _provenance(model: ModelSpec, profile: Profile, recording: Recording, search: EpSearch) -> dict[str, Any]:
    tokens = recording.num_tokens if isinstance(recording, RoutingTrace) else None
    return {
        "produced_by": f"moeplan {__version__}", "model": model.name, "hardware": profile.name,
        "trace": {"model": recording.model, "source": recording.source, "sha256": recording_sha256(recording),
                  "num_tokens": tokens, "num_layers": recording.num_layers,
                  "num_experts": recording.num_experts, "layer_ids": list(model.moe_layers),
                  "kind": "routing" if tokens is not None else "counts"},
        "num_evaluated": search.num_evaluated, "step_tokens": search.evidence.step_tokens,
    }  # fmt: skip


def _rival(prediction: EpPrediction) -> dict[str, Any]:
    return prediction.to_dict() | {
        "schedule": prediction.schedule.to_dict(),
        "description": describe(prediction.schedule),
    }


def ep_plan_to_dict(plan: ParallelPlan) -> dict[str, Any]:
    """Return a plan as plain values, as written to plan.json."""
    best = plan.best.to_dict() | {"schedule": plan.best.schedule.to_dict(), "description": describe(plan.best.schedule),
                                  "engine": "twin, checked by simpy"}  # fmt: skip
    return {
        "schema_version": SCHEMA_VERSION, "kind": EXPERT_PARALLEL, "provenance": plan.provenance, **plan.made_of,
        "request": {key: value for key, value in asdict(plan.request).items() if key != "workers"}, "best": best,
        "placement": placement_to_dict(plan.placement),
        "baselines": [_rival(each) for each in plan.baselines],
        "references": [_rival(each) for each in plan.references],
        "baselines_left_out": plan.left_out, "ablation": list(plan.ablation), "migration": plan.migration.to_dict(),
        "staleness": list(plan.staleness), "links": plan.links, "rank_rows": plan.rank_rows,
        **plan_maps(plan.search, plain_schedule(plan.best.schedule.kernel.bits), plan.best.schedule, plan.dispatch),
        "overfit_fraction": plan.overfit_fraction, "num_candidates": plan.num_candidates,
        "lower_bound_step_s": plan.lower_bound_step_s, "optimality_gap": plan.optimality_gap, "verdict": plan.verdict,
        "assumptions": list(plan.assumptions), "set_by_user": list(plan.set_by_user),
    }  # fmt: skip
