"""A plan run for real beside its prediction: the chosen schedule and its fastest rivals, taking turns.

Modelled: model, memory, window and schedules are the plan's; costs come from a profile of this machine, measured on the spot
where none is given. The plan's own figures stay what they were: what is compared is the prediction for this device. Ignored:
plans of many devices; models that this machine cannot hold, which are refused with what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ..calibrate.device import open_device
from ..calibrate.measure import QUICK, Extent
from ..errors import DoesNotFit, InputError
from ..hardware import Profile
from ..schedule import schedule_from_dict
from ..specs import ModelSpec, weight_format
from ..traces.recording import RoutingTrace
from .calibration import Calibration, calibrate_device
from .execute import Progress, open_stage, silent
from .prediction import run_input, stored_format
from .supported import check_runnable
from .validate import Validation, check_profile, costs_of, dense_format, validate_cases
from .validation_grid import Case, Shape

_MAX_STEPS = 64


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
    rivals = sorted(_listed(document), key=lambda one: -float(one.get("tokens_per_s", 0.0)))
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
        found.append(Case(name=name, shape=shape, schedule=schedule, group=stored_format(schedule, model).name))
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
    progress: Progress = silent,
) -> Validation:
    """Return predicted and measured of a plan's best schedule, first, and of its fastest rivals.

    steps: forward passes to run, of those that were planned; 64 at most by default. Raises InputError for a plan of another kind
    or of another dense format than this device runs, for a profile of another device or schedules that are only simulated,
    MissingCalibration where the profile does not reach, DoesNotFit where the plan exceeds the device.
    """
    began = time.monotonic()
    cases = planned_cases(document, model, num_baselines)
    provenance = document.get("provenance")
    planned = provenance if isinstance(provenance, Mapping) else {}
    _check_device(planned, device)
    if profile is not None:
        check_profile(profile, device)
    window = min(_MAX_STEPS if steps is None else steps, int(planned.get("window_steps") or _MAX_STEPS))
    inputs = {case.name: run_input(case.schedule, trace, window_steps=window) for case in cases}
    calibration: Calibration | None = None
    if profile is None:
        bits = list(dict.fromkeys(stored_format(case.schedule, model).name for case in cases))
        calibration = calibrate_device(
            device, models=[model], bits=bits, extent=extent, seconds=calibrate_seconds, progress=progress
        )
    used = profile if calibration is None else calibration.fit.profile
    if used is None:
        raise InputError("profile", "none", "nothing was calibrated", "give a profile")
    costs = costs_of(used, model, device)
    with open_stage(model, [given.workload for given in inputs.values()], device=device, distinct_experts=4) as stage:
        pairs = [(case, inputs[case.name]) for case in cases]
        validated = validate_cases(pairs, stage, costs, repeats=repeats, progress=progress)
    return Validation(
        validated=tuple(validated),
        calibration=calibration,
        profile=used,
        notes=(
            f"{model.name} with random weights",
            f"the first {window} forward passes of {trace.model} are replayed; step times are those of decode steps",
            f"each schedule ran {repeats} times after a warm-up, in turns; noise compares two halves of these runs",
            "a step's measured time adds up its layers' medians over the runs; parts interrupted by other programs do not count",
        ),
        seconds=time.monotonic() - began,
    )


def _check_device(planned: Mapping[str, Any], device: str) -> None:
    """Return nothing; raises where the plan is for another device than the one at hand."""
    opened = open_device(device)
    try:
        wanted = int(planned.get("memory_bytes") or 0)
        if wanted > opened.limit_bytes:
            raise DoesNotFit(
                f"a plan for {wanted} bytes on a device that gives {opened.limit_bytes}", wanted - opened.limit_bytes
            )
        runs = dense_format(device).name
        stored = str(planned.get("dense_bits", "16"))
        if weight_format(stored).name != runs:
            raise InputError(
                "plan.dense_bits", stored, f"this device runs {runs} bits", f"plan with --dense-bits {runs}"
            )
    finally:
        opened.close()


def _listed(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    rivals = document.get("baselines")
    return [one for one in rivals if isinstance(one, dict)] if isinstance(rivals, list) else []
