"""A plan run for real beside its prediction: the chosen schedule and its fastest rivals, taking turns.

Modelled: model, memory, window and schedules are the plan's; costs come from a profile of this machine, measured on the spot
where none is given. The plan's own figures stay what they were: what is compared is the prediction for this device. A model
that this machine cannot hold is reduced until it fits (`reduction`), and as many passes run as end in time; the prediction is
for what ran. Ignored: plans of many devices.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...base.errors import InputError
from ...base.units import NS_PER_S, format_bytes
from ...calibrate.costs.cost_model import CostModel
from ...calibrate.microbenchmarks.measure import QUICK, Extent
from ...devices.device import open_device
from ...sim.offload.drafting.draft import drafting_from_dict
from ...sim.offload.forecast import forecast, stored_format
from ...sim.offload.run_input import RunInput
from ...specs.machines.profile import Profile
from ...specs.models import ModelSpec, weight_format
from ...specs.schedules.offload import schedule_from_dict
from ...traces.recording import RoutingTrace
from ..calibration.calibrate import Calibration, calibrate_device
from ..calibration.reference_runs import reference_runs
from ..running.execute import Progress, open_stage, silent
from ..running.prediction import counted_steps, run_input
from ..running.supported import check_runnable
from .grid import Case, Shape
from .reduction import DISTINCT, Reduced, reduced_to, room_of
from .validate import as_it_is_now, check_profile, costs_of, dense_format, validate_cases
from .validated import Validation

_MAX_STEPS = 64
_SECONDS = 120.0
"""About how long the runs of a plan may take where nobody says so."""
_LEAST_DECODES = 4


def planned_cases(document: Mapping[str, Any], model: ModelSpec, num_baselines: int) -> list[Case]:
    """Return the plan's best schedule and its fastest `num_baselines` rivals that can run; raises InputError for no such plan."""
    if document.get("kind") != "offload":
        raise InputError(
            "plan.kind", document.get("kind"), "only plans for one device can be run", "plan --mode offload"
        )
    shape = Shape(
        name=model.name,
        hidden=model.hidden_size,
        intermediate=model.expert_intermediate_size,
        vocab=model.vocab_size,
    )
    origin = document.get("provenance")
    drafting = drafting_from_dict(origin.get("drafting") if isinstance(origin, Mapping) else None)
    rivals = sorted(_listed(document), key=lambda one: float(one.get("window_s", math.inf)))
    found: list[Case] = []
    for one in [document.get("best"), *rivals]:
        if not isinstance(one, dict) or not isinstance(one.get("schedule"), dict):
            raise InputError("plan.best", "(absent)", "no schedule", "give a plan.json written by moeplan plan")
        schedule = schedule_from_dict(one["schedule"])
        if found:
            try:
                check_runnable(schedule)
            except InputError:
                continue  # a rival that is only simulated
        check_runnable(schedule)
        name = str(one.get("name", schedule.name))
        group = stored_format(schedule, model).name
        found.append(Case(name=name, shape=shape, schedule=schedule, group=group, drafting=drafting))
        if len(found) > num_baselines:
            break
    return found


def validate_plan(
    document: Mapping[str, Any],
    model: ModelSpec,
    trace: RoutingTrace,
    *,
    profile: Profile | None = None,
    device: str = "cpu",
    num_baselines: int = 2,
    steps: int | None = None,
    repeats: int = 3,
    extent: Extent = QUICK,
    calibrate_seconds: float = 12.0,
    seconds: float = _SECONDS,
    memory_bytes: int | None = None,
    check_drift: bool = True,
    progress: Progress = silent,
) -> Validation:
    """Return predicted and measured of a plan's best schedule, first, and of its fastest rivals.

    steps: forward passes to run, of those that were planned; by default as many as end in about `seconds`, 64 at most.
    memory_bytes: use at most so much of the device's memory (on a CPU: of all memory); None takes most of what is free. What does
    not fit is reduced, and said so. check_drift: find out what the machine has become since `profile` was measured.
    Raises InputError for a plan of another kind, for a profile of another device or schedules that are only simulated,
    MissingCalibration where the profile does not reach, DoesNotFit where not even the smallest excerpt fits.
    """
    began = time.monotonic()
    cases = planned_cases(document, model, num_baselines)
    provenance = document.get("provenance")
    planned = provenance if isinstance(provenance, Mapping) else {}
    if profile is not None:
        check_profile(profile, device)
    window = min(_MAX_STEPS if steps is None else steps, int(planned.get("window_steps") or _MAX_STEPS))
    reduced = _reduced(device, memory_bytes, model, trace, cases, window)
    small = reduced.model
    calibration: Calibration | None = None
    if profile is None:
        bits = list(dict.fromkeys(stored_format(case.schedule, small).name for case in reduced.cases))
        calibration = calibrate_device(
            device, models=[small], bits=bits, extent=extent, seconds=calibrate_seconds, progress=progress
        )
    used = profile if calibration is None else calibration.fit.profile
    if used is None:
        raise InputError("profile", "none", "nothing was calibrated", "give a profile")
    costs = costs_of(used, small, device)
    inputs = [
        run_input(case.schedule, reduced.trace, window_steps=window, drafting=case.drafting) for case in reduced.cases
    ]
    if steps is None:
        fewer = _steps_within(seconds, inputs, small, costs, repeats + 1)
        if fewer < window:
            reduced = dataclasses.replace(reduced, changes={**reduced.changes, "steps": (window, fewer)})
            inputs = [
                run_input(case.schedule, reduced.trace, window_steps=fewer, drafting=case.drafting)
                for case in reduced.cases
            ]
            window = fewer
    with open_stage(
        small,
        [given.workload for given in inputs],
        device=device,
        memory_bytes=memory_bytes,
        distinct_experts=DISTINCT,
        places=reduced.places,
    ) as stage:
        pairs = list(zip(reduced.cases, inputs, strict=True))
        references = None
        if check_drift and profile is not None:
            formats = [stored_format(case.schedule, small).name for case in reduced.cases]
            references = reference_runs(profile, [small], formats, device)
        validated = validate_cases(pairs, stage, costs, repeats=repeats, references=references, progress=progress)
    drift, without_drift = as_it_is_now([(one, small) for one in validated], used, references)
    return Validation(
        validated=tuple(validated),
        calibration=calibration,
        profile=used,
        notes=(
            *reduced.notes(),
            *_differences(planned, device),
            *_drafted(cases),
            f"{small.name} with random weights",
            f"the first {window} forward passes of {trace.model} are replayed; step times are those of decode steps",
            f"each schedule ran {repeats} times after a warm-up, in turns; noise compares two halves of these runs",
            "a step's measured time adds up its layers' medians over the runs; parts interrupted by other programs do not count",
        ),
        seconds=time.monotonic() - began,
        reduced=reduced.to_dict(),
        drift=drift,
        without_drift=without_drift,
    )


def _reduced(
    device: str, memory_bytes: int | None, model: ModelSpec, trace: RoutingTrace, cases: Sequence[Case], window: int
) -> Reduced:
    """Return as much of the plan as the device holds; raises DoesNotFit where that is nothing."""
    opened = open_device(device)
    try:
        dtype = torch.float32 if opened.kind == "cpu" else torch.bfloat16
        return reduced_to(room_of(opened, memory_bytes), model, trace, cases, window=window, dtype=dtype)
    finally:
        opened.close()


def _steps_within(seconds: float, inputs: Sequence[RunInput], model: ModelSpec, costs: CostModel, rounds: int) -> int:
    """Return how many forward passes end within `seconds` when all inputs run `rounds` times, by their predictions.

    At least as many as hold a few decode steps: fewer would measure nothing.
    """
    ends, least = [], 1
    for given in inputs:
        ends.append(forecast(given, model, costs).outcome.step_end)
        counted = np.flatnonzero(counted_steps(given.workload))
        least = max(least, int(counted[min(_LEAST_DECODES, len(counted)) - 1]) + 1)
    longest = max(len(one) for one in ends)  # requests decoded together make fewer passes of the same tokens
    total_ns = rounds * np.sum([np.pad(one, (0, longest - len(one)), mode="edge") for one in ends], axis=0)
    return max(least, int(np.searchsorted(total_ns / NS_PER_S, seconds, side="right")))


def _differences(planned: Mapping[str, Any], device: str) -> list[str]:
    """Return in what the plan was made for another machine than the one at hand."""
    found = []
    stored, runs = str(planned.get("dense_bits", "16")), dense_format(device).name
    if weight_format(stored).name != runs:
        found.append(
            f"the plan stores everything but routed experts in {stored} bits; this device runs {runs}, and so does the prediction"
        )
    memory = int(planned.get("memory_bytes") or 0)
    found.append(
        f"cache sizes are those planned for {format_bytes(memory)} on {planned.get('hardware')}"
        if memory
        else "cache sizes are the plan's"
    )
    return found


def _drafted(cases: Sequence[Case]) -> list[str]:
    """Return what of drafting is run."""
    drafting = cases[0].drafting
    if drafting is None:
        return []
    return [f"drafted: {drafting.words}; what drafts is not run, and its time is in neither figure"]


def _listed(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    rivals = document.get("baselines")
    return [one for one in rivals if isinstance(one, dict)] if isinstance(rivals, list) else []
