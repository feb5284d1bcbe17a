"""Predict one expert-parallel schedule: the function behind `moeplan simulate --mode ep`.

Modelled: one configuration of one's own: nodes and devices, a preset with any of its options changed, settings of machine, model and
request. Ignored: which schedule is best (`plan`), and printing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..base.errors import UnknownName
from ..planner.parallel.case import ParallelRequest
from ..planner.parallel.simulate import ParallelAnswer, answer_ep, preset_for, shared_attention
from ..sim.parallel.timeline import EpTimeline
from ..specs.machines.profile import Profile
from ..specs.machines.serving import serving_machine
from ..specs.models import ModelSpec
from ..specs.schedules.parallel import ExpertParallelSchedule, apply_ep_settings, parse_ep_setting
from .load import Recording, as_cluster_machine, as_model, rank_recording
from .settings import SettingsLike, open_settings
from .subject import rank_budget

SIMULATORS = ("compiled", "simpy", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelResult:
    """What one expert-parallel schedule is predicted to do."""

    answer: ParallelAnswer
    simulator: str
    described: dict[str, Any]
    """Model, machine and recording, for the document."""
    set_by_user: tuple[Mapping[str, Any], ...] = ()
    """The settings of machine, model and request that were made, each with what stood there before."""

    @property
    def timeline(self) -> EpTimeline | None:
        """Rows of the first step, where they were asked for."""
        return self.answer.prediction.outcome.timeline

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `moeplan simulate --mode ep --json` prints."""
        return (
            self.answer.to_dict()
            | self.described
            | {"simulator": self.simulator, "set_by_user": list(self.set_by_user)}
        )


def simulate_parallel(
    model: str | os.PathLike[str] | ModelSpec,
    hardware: str | Profile,
    *,
    trace: str | os.PathLike[str] | Recording | None = None,
    request: ParallelRequest,
    schedule: str | ExpertParallelSchedule = "ep",
    settings: SettingsLike = None,
    engine: str | None = None,
    memory: int | str | None = None,
    reserve: int | str | None = None,
    simulator: str = "compiled",
    timeline: bool = False,
) -> ParallelResult:
    """Return the prediction of one schedule of a model on `request.num_nodes` servers of a machine.

    trace: a recording, or loads; None: the bundled recording where it is of this model, else loads as unevenly popular as published
    ones. schedule: a preset's name, in the formats of the request, or a schedule as it is. settings:
    `{"placement.num_redundant": 32}` for the schedule; `machine.`, `model.` and `request.` as elsewhere. engine: whose kernels, measured on
    this card, count. memory: the whole budget of each device; reserve: what something else uses of it. simulator: "compiled", "simpy" or
    "both" (compared to the nanosecond). timeline: keep the rows of the first step.

    Raises InputError for what does not belong together or what no engine can run, DoesNotFit where a batch does not fit.
    """
    if simulator not in SIMULATORS:
        raise UnknownName("--simulator", simulator, SIMULATORS)
    changes = open_settings(settings)
    spec, profile = changes.changed_model(as_model(model)), changes.changed_machine(as_cluster_machine(hardware))
    budget = rank_budget(memory, reserve, request.memory_bytes, profile)
    request = changes.changed_request(dataclasses.replace(request, memory_bytes=budget))
    options = dict(parse_ep_setting(text) for text in changes.schedule)
    if isinstance(schedule, ExpertParallelSchedule):
        chosen = apply_ep_settings(schedule, shared_attention(request, options) | options)
    else:
        chosen = preset_for(schedule, request, spec, options)
    recording = rank_recording(trace, spec, prefill=request.prefill)
    answer = answer_ep(
        spec, serving_machine(profile, engine), recording, request, chosen, engine=simulator, rows=timeline
    )
    described = {"model": spec.name, "hardware": profile.name, "trace": recording.source}
    return ParallelResult(answer=answer, simulator=simulator, described=described, set_by_user=tuple(changes.made))
