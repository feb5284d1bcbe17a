"""Predicted against measured over a grid: run every configuration for real, several times, taking turns, and say how
far off it was.

Modelled: rounds; in each, every configuration runs once and, where no profile is given, a part of the calibration runs
too, so that a machine that drifts drifts for both. A step's measured time is the median over rounds (it does the same
work in each); the first round warms up and is not counted when there are others. Noise is what two halves of the
rounds differ by. The calibrated shapes and the validated ones are apart. Ignored: what the figures are called on the
command line and how they are drawn.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from ...base.errors import InputError, MoeplanError
from ...base.units import NS_PER_S
from ...calibrate.costs.cost_model import CostModel
from ...calibrate.costs.load import check_profile_matches, load_costs
from ...calibrate.fitting.drift import drifted
from ...calibrate.microbenchmarks.measure import QUICK, Extent
from ...calibrate.samples import SampleSet, merge
from ...devices.device import metadata_of, open_device
from ...sim.offload.forecast import forecast, stored_format, with_costs
from ...sim.offload.metrics import figures_of, speeds_of
from ...sim.offload.run_input import RunInput
from ...sim.policies.state import Array
from ...specs.machines.profile import Profile
from ...specs.models import ModelSpec, WeightFormat, weight_format
from ...traces.recording import RoutingTrace
from ..calibration.calibrate import calibrate_device, write_calibration
from ..calibration.reference_runs import ReferenceRuns, reference_runs
from ..running.execute import Progress, Stage, execute, open_stage, silent
from ..running.execution import Execution, count_differences, median_steps
from ..running.prediction import counted_steps, predicted_step_s, run_input
from ..running.supported import check_runnable
from .agreement import Compared
from .error_budget import error_budget
from .grid import Case, Grid
from .validated import Validated, Validation

T = TypeVar("T")


def validate_grid(
    grid: Grid,
    trace: RoutingTrace,
    *,
    profile: Profile | None = None,
    device: str = "cpu",
    extent: Extent | None = None,
    calibrate_seconds: float = 12.0,
    seed: int = 0,
    progress: Progress = silent,
) -> Validation:
    """Return predicted and measured of every configuration of a grid.

    profile: None calibrates in the same run, on the grid's own calibration shapes, a part in each round of about
    `calibrate_seconds` beside the engine's own runs; `extent` says how much of it, None what the grid needs.
    Raises InputError for a grid that does not go with the recording, MissingCalibration where the profile does not
    reach, DoesNotFit where a configuration exceeds the device.
    """
    began = time.monotonic()
    if profile is None and not grid.calibrate_shapes:
        raise InputError(
            "grid: calibrate", "no shapes", "no profile is given and nothing to calibrate with", "give either"
        )
    if profile is not None:
        check_profile(profile, device)
    for case in grid.cases:
        _named(case, partial(check_runnable, case.schedule))
    shapes = {case.shape: case.shape.model(trace) for case in grid.cases}
    inputs = {case.name: run_input(case.schedule, trace, window_steps=grid.steps) for case in grid.cases}
    measured: dict[str, list[Execution]] = {case.name: [] for case in grid.cases}
    parts: list[SampleSet] = []
    rng = np.random.default_rng(seed)
    rounds = grid.repeats + (1 if grid.repeats > 1 else 0)
    total = rounds * len(grid.cases)
    calibrated = [shape.model(trace) for shape in grid.calibrate_shapes]
    extent = extent or _extent_for(grid)
    stages = _open_stages(grid, shapes, inputs, device)
    references = None
    if profile is not None:
        formats = [stored_format(case.schedule, shapes[case.shape]).name for case in grid.cases]
        references = reference_runs(profile, list(shapes.values()), formats, device)
    try:
        for number in range(rounds):
            if profile is None:
                part = calibrate_device(
                    device, models=calibrated, bits=grid.calibrate_bits, extent=extent, seconds=calibrate_seconds,
                    progress=partial(_calibrating, progress, f"round {number + 1} of {rounds}"),
                )  # fmt: skip
                parts.append(part.samples)
            if number == 0:  # what a profile does not reach is known before anything long is run
                for case in grid.cases:
                    costs = costs_of(profile if profile is not None else part.fit.profile, shapes[case.shape], device)
                    # What decisions weigh is settled now: every run of a configuration decides alike.
                    inputs[case.name] = _named(case, partial(_foresee, shapes, inputs, case, costs))
            for place, at in enumerate(rng.permutation(len(grid.cases)).tolist()):
                case = grid.cases[at]
                found = execute(stages[shapes[case.shape].name], inputs[case.name])
                if number > 0 or rounds == 1:
                    measured[case.name].append(found)
                    if references is not None:
                        references.run_beside(place, len(grid.cases))
                progress(number * len(grid.cases) + place + 1, total, f"round {number + 1} of {rounds}: {case.name}")
    finally:
        for stage in stages.values():
            stage.close()
    calibration = write_calibration(merge(parts), None, meanwhile=True) if parts else None
    used = calibration.fit.profile if calibration is not None else profile
    if used is None:
        raise InputError("profile", "none", "nothing was calibrated", "give a profile")
    validated = []
    for case in grid.cases:
        model, runs = shapes[case.shape], measured[case.name]
        costs = costs_of(used, model, device)
        validated.append(_named(case, partial(compare, case, inputs[case.name], model, costs, runs)))
    drift, without_drift = as_it_is_now([(one, shapes[one.case.shape]) for one in validated], used, references)
    return Validation(
        validated=tuple(validated),
        calibration=calibration,
        profile=used,
        notes=_notes(grid, trace, shapes),
        drift=drift,
        without_drift=without_drift,
        seconds=time.monotonic() - began,
    )


def validate_cases(
    cases: Sequence[tuple[Case, RunInput]],
    stage: Stage,
    costs: CostModel,
    *,
    repeats: int = 3,
    references: ReferenceRuns | None = None,
    progress: Progress = silent,
) -> list[Validated]:
    """Return predicted and measured of runs on one open stage, with given costs: what one plan's validation takes.

    references: runs to be made in each round too.
    """
    cases = [(case, with_costs(given, stage.model, costs)) for case, given in cases]
    measured: dict[str, list[Execution]] = {case.name: [] for case, _ in cases}
    rounds = repeats + 1
    for number in range(rounds):
        for place, (case, given) in enumerate(cases):
            found = execute(stage, given)
            if number:
                measured[case.name].append(found)
            progress(number * len(cases) + place + 1, rounds * len(cases), case.name)
        if references is not None and number:
            for place in range(len(references.bits)):
                references.run(place)
    return [compare(case, given, stage.model, costs, measured[case.name]) for case, given in cases]


def as_it_is_now(
    validated: Sequence[tuple[Validated, ModelSpec]], profile: Profile, references: ReferenceRuns | None
) -> tuple[Mapping[str, float] | None, tuple[Compared, ...]]:
    """Return (drift, every configuration predicted for the machine as it is now); (None, none) where no runs were made again."""
    if references is None or not (drift := references.drift()):
        return None, ()
    now, found = drifted(profile, drift), []
    for one, model in validated:
        costs = costs_of(now, model, references.device)
        found.append(one.predicted_as(forecast(one.given, model, costs)))
    return drift, tuple(found)


def compare(
    case: Case, given: RunInput, model: ModelSpec, costs: CostModel, executions: Sequence[Execution]
) -> Validated:
    """Return one configuration's prediction beside its measurements."""
    if not executions:
        raise InputError("repeats", 0, "nothing was measured", "run at least once")
    predicted = forecast(given, model, costs, rows=True)
    tokens = int(given.workload.steps.layer_step_tokens.sum())
    differences = [
        line
        for execution in executions
        for line in count_differences(execution, predicted.outcome, tokens, timing_dependent=given.schedule.copy.cancel)
    ]
    first, second = executions[0::2], executions[1::2]
    measured_s = _mean_step_s(executions, given)
    steps = counted_steps(given.workload)
    counts = executions[0].counts
    compared = Compared(
        name=case.name,
        group=case.group,
        predicted_s=predicted_step_s(predicted.outcome, given.workload),
        relative_uncertainty=predicted.metrics.relative_uncertainty,
        measured_s=measured_s,
        measured_half_s=_mean_step_s(first, given),
        measured_again_s=_mean_step_s(second, given) if second else None,
        tokens_per_step=float(given.workload.step_tokens[steps].mean()),
        count_differences=tuple(dict.fromkeys(differences)),
        hit_rate_predicted=predicted.metrics.hit_rate,
        hit_rate_measured=float(counts.hits / max(1, counts.hits + counts.misses)),
        predicted=speeds_of(predicted.metrics),
        measured=figures_of(np.cumsum(median_steps(list(executions))), given.workload),
    )
    return Validated(
        case=case,
        given=given,
        forecast=predicted,
        executions=tuple(executions),
        compared=compared,
        budget=error_budget(given, predicted.tables, executions, measured_s),
    )


def check_profile(profile: Profile, device: str) -> None:
    """Return nothing; raises InputError where a profile was not measured, or on another device or with other numbers than this one's."""
    opened = open_device(device)
    try:
        name, kind = str(metadata_of(opened)["name"]), opened.kind
    finally:
        opened.close()
    check_profile_matches(profile, kind=kind, name=name)
    dense = profile.curves.get("dense")
    if dense is None:
        raise InputError("profile", profile.name, "it was not measured here", "calibrate this device")
    measured, runs = int(dense.arguments["value_bytes"][0]), int(dense_format(device).bits // 8)
    if measured != runs:
        raise InputError(
            "profile: dense",
            f"{measured} bytes a value",
            f"this device runs the dense part with {runs}",
            "calibrate this device",
        )


def dense_format(device: str) -> WeightFormat:
    """Return how a device of this kind stores and runs everything but routed experts."""
    return weight_format("32" if device == "cpu" else "16")


def costs_of(profile: Profile, model: ModelSpec, device: str) -> CostModel:
    """Return a profile's costs for a model whose dense part is stored as this device runs it."""
    return load_costs(profile, model, dense_format=dense_format(device))


def _extent_for(grid: Grid) -> Extent:
    """Return a quick calibration with runs of every shape, and with cores and disk where a schedule uses them."""
    schedules = [case.schedule for case in grid.cases]
    cores = any(schedule.kernel.miss != "fetch" for schedule in schedules)
    disk = any(schedule.copy.host_experts is not None for schedule in schedules)
    return dataclasses.replace(QUICK, run_shapes=None, host_cores=cores, disk=disk)


def _calibrating(progress: Progress, which: str, done: int, total: int, note: str) -> None:
    progress(done, total, f"{which}: calibrating, {note}")


def _named(case: Case, work: Callable[[], T]) -> T:
    """Return what `work` returns; an error it raises begins with the configuration's name."""
    try:
        return work()
    except MoeplanError as error:
        error.args = (f"{case.name}: {error}",)
        raise


def _foresee(
    shapes: Mapping[Any, ModelSpec],
    inputs: Mapping[str, RunInput],
    case: Case,
    costs: CostModel,
) -> RunInput:
    """Return a configuration with what its decisions weigh; raises MissingCalibration where its costs do not reach."""
    model = shapes[case.shape]
    given = with_costs(inputs[case.name], model, costs)
    forecast(given, model, costs)
    return given


def _mean_step_s(executions: Sequence[Execution], given: RunInput) -> float:
    """Return the mean over the steps that count of each step's median over runs."""
    steps: Array = median_steps(list(executions))[counted_steps(given.workload)]
    return float(steps.mean()) / NS_PER_S


def _open_stages(
    grid: Grid, shapes: Mapping[Any, ModelSpec], inputs: Mapping[str, RunInput], device: str
) -> dict[str, Stage]:
    """Return one open stage for each shape, large enough for all of its configurations."""
    stages: dict[str, Stage] = {}
    try:
        for shape, model in shapes.items():
            workloads = [inputs[case.name].workload for case in grid.cases if case.shape == shape]
            stages[model.name] = open_stage(model, workloads, device=device, distinct_experts=4)
    except BaseException:
        for stage in stages.values():
            stage.close()
        raise
    return stages


def _notes(grid: Grid, trace: RoutingTrace, shapes: Mapping[Any, ModelSpec]) -> tuple[str, ...]:
    """Return what is not as a real model's run would be."""
    sizes = ", ".join(f"{model.hidden_size}x{model.expert_intermediate_size}" for model in shapes.values())
    return (
        f"models are made up (hidden x intermediate {sizes}) with the layers, experts and choices of {trace.model}; weights are random",
        f"the first {grid.steps} forward passes of the recording are replayed; step times are those of decode steps",
        f"each configuration ran {grid.repeats} times after a warm-up, in turns; noise compares two halves of these runs",
        "a step's measured time adds up its layers' medians over the runs; parts interrupted by other programs do not count",
        *(
            f"{case.name} drops guesses by how far copies have come: of its counts only tokens and steps are compared"
            for case in grid.cases
            if case.schedule.copy.cancel
        ),
    )
