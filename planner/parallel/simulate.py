"""One expert-parallel schedule on one recording: from files' nouns to a prediction.

Modelled: the schedule as it is given, its placement made on the planning part of the recording and its steps taken from the
reporting part. Ignored: whether another schedule is better (`ep_plan`).
"""

from __future__ import annotations

import dataclasses

from ...sim.parallel.simulate import EpPrediction
from ...specs.machines.profile import Profile
from ...specs.models import ModelSpec
from ...specs.schedules.parallel import ExpertParallelSchedule
from .case import ParallelRequest, Recording, check_ep_match, evidence_of, prepare_ep
from .evidence import REPORT


def simulate_ep(
    model: ModelSpec,
    profile: Profile,
    recording: Recording,
    request: ParallelRequest,
    schedule: ExpertParallelSchedule,
    *,
    engine: str = "both",
    rows: bool = False,
) -> EpPrediction:
    """Return the prediction of a schedule, under one engine ("twin", "simpy") or both, compared.

    The schedule's weight format and redundant slots are its own; `request.num_redundant` and `request.bits` are not used.
    Raises InputError where recording, model, ranks and schedule do not belong together, DoesNotFit where memory is too small.
    """
    request = dataclasses.replace(request, bits=None).of_model(model)  # the schedule says how experts are stored
    check_ep_match(model, recording, request)
    search = prepare_ep(model, profile, evidence_of(model, recording, request), request, schedule)
    return search.predict(schedule, REPORT, engine=engine, rows=rows)
