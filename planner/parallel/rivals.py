"""What stands beside an expert-parallel plan: every preset at its own settings, the best built up and taken apart, the plan elsewhere.

Modelled: presets with the plan's formats and copies; the ingredients of the best added one after another and taken away one by one; the
plan on another recording than it was made for, beside a fresh EPLB. Ignored: what each decision is worth whatever the order
(`factors`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ...base.errors import DoesNotFit
from ...sim.parallel.runnable import as_run_on_cores
from ...sim.parallel.simulate import EpPrediction
from ...specs.models import ModelSpec
from ...specs.schedules.parallel import EP_PRESETS, ExpertParallelSchedule, load_ep_preset
from .candidates import Placements
from .case import ParallelRequest, Recording, check_ep_match, evidence_of
from .difference import WORTH_FRACTION
from .evidence import REPORT
from .search import EpSearch

# Presets that stand for themselves: they change the model or cannot be run without loss.
_REFERENCES = ("comet", "scmoe")


def baselines(search: EpSearch, base: ExpertParallelSchedule,
               request: ParallelRequest) -> tuple[list[EpPrediction], list[EpPrediction], dict[str, str]]:  # fmt: skip
    """Return every preset's prediction on the reporting part, the references', and who is left out and why."""
    rivals: list[EpPrediction] = []
    references: list[EpPrediction] = []
    left_out: dict[str, str] = {}
    for name in EP_PRESETS:
        preset = load_ep_preset(name)
        copies = (request.num_redundant or 0) if preset.placement.num_redundant else 0
        schedule = preset.with_options(
            placement__num_redundant=copies, kernel__bits=base.kernel.bits,
            all_to_all__dispatch_bytes_per_value=base.all_to_all.dispatch_bytes_per_value,
        )  # fmt: skip
        if not search.placements.available(schedule.placement.policy):
            left_out[name] = "needs the routing of single tokens; the recording holds counts only"
            continue
        simulation = search.simulation
        if simulation.costing.constants.ranks is not None and as_run_on_cores(schedule, simulation.model) is None:
            left_out[name] = "ranks of this machine do not run it, so what it costs them was not measured"
            continue
        slots = search.placements.num_slots(copies) // simulation.num_ranks
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


def ablation(search: EpSearch, base: ExpertParallelSchedule, chosen: ExpertParallelSchedule) -> list[dict[str, Any]]:
    """Return the step after each ingredient is added to plain expert parallelism, and without each in the best."""
    bare = {"placement__policy": chosen.placement.policy if chosen.placement.policy != "metro" else "eplb",
            "placement__num_redundant": 0}  # fmt: skip
    ingredients: dict[str, dict[str, Any]] = {
        "parallelism": {f"parallel__{key}": value for key, value in asdict(chosen.parallel).items()},
        "all-to-all": {"all_to_all__kind": chosen.all_to_all.kind, "all_to_all__tiers": chosen.all_to_all.tiers},
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
        "all-to-all": {"all_to_all__kind": "per-rank", "all_to_all__tiers": "together"},
        "kernels": {"kernel__choice": "grouped"},
        "routing": {"replica__choice": "nearest"},
        "pipeline": {f"pipeline__{key}": value for key, value in asdict(plain.pipeline).items()},
    }
    for name in ingredients:
        without = chosen.with_options(**defaults[name])
        if name in ("placement", "replication"):
            placement = defaults[name]
            without = with_copies(search, chosen, placement["placement__policy"], placement["placement__num_redundant"])
        step_s = search.predict(without, REPORT).step_s
        found.append({"kind": "removed", "ingredient": name, "step_s": step_s, "change_fraction": step_s / whole - 1})
    return found


def with_copies(
    search: EpSearch, schedule: ExpertParallelSchedule, policy: str, redundant: int
) -> ExpertParallelSchedule:
    """Return the schedule on another placement, with no more expert groups than a rank then has experts."""
    changed = schedule.with_options(placement__policy=policy, placement__num_redundant=redundant)
    if changed.pipeline.split != "expert":
        return changed
    slots = search.placements.num_slots(redundant) // search.simulation.num_ranks
    return changed.with_options(pipeline__num_groups=min(changed.num_groups, slots))


def staleness(search: EpSearch, chosen: ExpertParallelSchedule, base: ExpertParallelSchedule, request: ParallelRequest, model: ModelSpec,
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
        copies = (request.num_redundant or 0) if chosen.parallel.experts in ("expert", "sharded") else 0
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
            "change_fraction": stale.step_s / plain.step_s - 1, "replan": renewed.step_s < stale.step_s * (1 - WORTH_FRACTION),
        })  # fmt: skip
    return found
