"""A finished expert-parallel plan run again on its recording: what happens when, before and after, without a new search.

Modelled: the plan's own placement and, where its router is a table, that table; any other router is made anew by name. The
replay must end at the very step time that the plan states, or the recording is not the plan's. Ignored: everything that
the plan document already says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...base.errors import InputError
from ...sim.parallel.simulate import EpPrediction
from ...specs.machines.profile import Profile
from ...specs.models import ModelSpec
from ...specs.schedules.parallel import ExpertParallelSchedule, ep_schedule_from_dict
from ..placement.comparison import Candidate
from ..placement.replica_choice import CappedChoice, ReplicaChoice, StaticChoice, WeightedChoice
from .case import ParallelRequest, Recording, check_ep_match, evidence_of, plain_schedule, prepare_ep
from .evidence import REPORT
from .maps import placement_from_dict, table_of_copies
from .plan import ParallelPlan
from .search import EpSearch

# Replays are deterministic; only the file's decimals lie between.
_SAME_FRACTION = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class EpReplay:
    """Predictions with timelines of the first reported step."""

    before: EpPrediction
    """Plain expert parallelism."""
    after: EpPrediction
    """The plan's best."""


def replay_of(plan: ParallelPlan) -> EpReplay:
    """Return the replay of a plan just made."""
    before = plan.search.predict(plain_schedule(plan.best.schedule.kernel.bits), REPORT, rows=True)
    return EpReplay(before=before, after=plan.best)


def replay_ep_plan(document: Mapping[str, Any], model: ModelSpec, profile: Profile, recording: Recording) -> EpReplay:
    """Return the replay of a plan document on its recording.

    Raises InputError where the recording is not of this model, or is another than the plan was made from.
    """
    given = document["request"]
    request = ParallelRequest(**{each.name: given[each.name] for each in fields(ParallelRequest) if each.name in given})
    check_ep_match(model, recording, request)
    schedule = ep_schedule_from_dict(document["best"]["schedule"])
    base = plain_schedule(schedule.kernel.bits)
    search = prepare_ep(model, profile, evidence_of(model, recording, request), request, base)
    loads = search.evidence.loads(REPORT, planned_candidate(search, schedule, document), schedule)
    after = search.simulation.predict(schedule, loads, rows=True)
    stated = float(document["best"]["step_s"])
    if not math.isclose(after.step_s, stated, rel_tol=_SAME_FRACTION):
        raise InputError(
            "--trace", recording.source, f"replays to a step of {after.step_s:.6g} s where the plan states {stated:.6g} s",
            "give the recording and machine that the plan was made from",
        )  # fmt: skip
    return EpReplay(before=search.predict(base, REPORT, rows=True), after=after)


def planned_candidate(search: EpSearch, schedule: ExpertParallelSchedule, document: Mapping[str, Any]) -> Candidate:
    """Return the plan's placement with its router; a searched placement is taken from the document, not searched again."""
    placement = placement_from_dict(document["placement"])
    router: ReplicaChoice
    if document.get("dispatch") is not None:
        router = StaticChoice(table=table_of_copies(document["dispatch"], placement))
    elif schedule.placement.policy != "search":
        return search.placements.candidate(schedule)
    elif schedule.replica.choice == "capped":
        router = CappedChoice(load_cap=schedule.replica.load_cap)
    else:
        router = WeightedChoice(seed=schedule.replica.seed, nearest_first=schedule.replica.choice == "weighted")
    return Candidate(placement=placement, router=router)
