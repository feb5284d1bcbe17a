"""A real model run under a plan's schedules, beside what the simulator predicts for each run's own routing.

Modelled: the plan's best schedule and its fastest rivals that a model can run, taking turns, each continuing the same prompts; a
prediction replays the routing that the run itself recorded, so that hits, misses and bytes must be equal exactly and only times
can be wrong. Costs come from a profile of this machine, or from runs of this model on the spot, under other schedules than those
that are validated. Ignored: whether the routing that a plan was made from is like the model's own here (hit rates say it).
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...base.errors import InputError
from ...sim.offload.forecast import stored_format
from ...sim.offload.run_input import RunInput
from ...sim.policies.state import Array
from ...specs.machines.profile import Profile
from ...specs.models import ModelSpec
from ..calibration.calibrate import Calibration
from ..model.calibrate import calibrate_model
from ..model.figures import differences, replayed
from ..model.guesses import Gates
from ..model.outcome import ModelRun
from ..model.prices import prices_for
from ..model.session import Loaded, open_model, run_model
from ..model.supported import check_runs_live
from ..running.execute import Progress, silent, walk_decisions
from ..running.execution import Execution
from .grid import Case
from .validate import check_profile, compare, costs_of
from .validate_plan import planned_cases
from .validated import Validated, Validation

_FROM_RECORDING = ("guesses_true", "truths")


def validate_model(
    document: Mapping[str, Any],
    folder: str | os.PathLike[str],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    model: ModelSpec,
    profile: Profile | None = None,
    device: str = "cpu",
    num_baselines: int = 2,
    repeats: int = 3,
    memory_bytes: int | None = None,
    gates: Gates | None = None,
    popularity: Array | None = None,
    stop: frozenset[int] = frozenset(),
    calibrate_seconds: float = 12.0,
    progress: Progress = silent,
) -> Validation:
    """Return predicted and measured of the model in `folder` under a plan's best schedule, first, and under its fastest rivals.

    prompts: ids that are continued by at most `max_new_tokens` tokens each. popularity: tokens per expert [num_layers, num_experts],
    which static caches are filled by. Raises InputError for a plan, profile or prompt that cannot be used, DoesNotFit where memory
    does not suffice, MissingCalibration where the profile does not reach, ExecutionFailed where a run breaks off.
    """
    began = time.monotonic()
    cases = runnable_cases(document, model, num_baselines, popularity is not None)
    if profile is not None:
        check_profile(profile, device)
    calibration: Calibration | None = None
    runs: dict[str, list[ModelRun]] = {case.name: [] for case in cases}
    rounds = repeats + 1
    with open_model(folder, device=device, memory_bytes=memory_bytes, gates=gates, progress=progress) as loaded:
        if profile is None:
            calibration = _calibrated(loaded, cases, prompts, max_new_tokens, calibrate_seconds, progress)
        used = profile if calibration is None else calibration.fit.profile
        if used is None:
            raise InputError("profile", "none", "nothing was calibrated", "give a profile")
        costs = costs_of(used, model, device)
        context = max(map(len, prompts)) + max_new_tokens // 2
        prices = {case.name: prices_for(case.schedule, model, costs, context_tokens=context) for case in cases}
        for number in range(rounds):
            for place, case in enumerate(cases):
                run = run_model(loaded, case.schedule, prompts, max_new_tokens=max_new_tokens, popularity=popularity,
                                prices=prices[case.name], stop=stop)  # fmt: skip
                if number:
                    runs[case.name].append(run)
                progress(number * len(cases) + place + 1, rounds * len(cases), case.name)
    validated = []
    for case in cases:
        given = replayed(runs[case.name][0], case.schedule)
        executions = [with_truths(run, given) for run in runs[case.name]]
        found = compare(case, given, model, costs, executions)
        validated.append(_with_differences(found, _unequal(runs[case.name], case)))
    lengths = ", ".join(str(len(ids)) for ids in prompts)
    generated = sum(map(len, runs[cases[0].name][0].tokens))
    return Validation(
        validated=tuple(validated),
        calibration=calibration,
        profile=used,
        notes=(
            f"{model.name} itself ran: prompts of {lengths} tokens, {generated} tokens generated",
            "cache sizes are the plan's",
            "every prediction replays the routing that its own run recorded; step times are those of decode steps",
            f"each schedule ran {repeats} times after a warm-up, in turns; noise compares two halves of these runs",
            "a step's measured time adds up its layers' medians over the runs; parts interrupted by other programs do not count",
            *(
                ("costs are from runs of this model on the spot, under other schedules",)
                if calibration is not None
                else ()
            ),
        ),
        seconds=time.monotonic() - began,
        generated=runs[cases[0].name][0].tokens,
    )


def runnable_cases(
    document: Mapping[str, Any], model: ModelSpec, num_baselines: int, popularity_is_known: bool
) -> list[Case]:
    """Return the plan's best schedule and its fastest rivals that a model can run by; raises InputError where the best is none."""
    best, *rivals = planned_cases(document, model, 1 << 30)
    check_runs_live(best.schedule, popularity_is_known, True)
    found = [best]
    for one in rivals:
        if len(found) > num_baselines:
            break
        try:
            check_runs_live(one.schedule, popularity_is_known, True)
        except InputError:
            continue  # it knows the future, or needs what a model's run is not given
        found.append(one)
    return found


def with_truths(run: ModelRun, given: RunInput) -> Execution:
    """Return a run with the counts that only its recording can tell: how many guesses were true. No decision depends on them."""
    found = run.execution()
    walked = walk_decisions(given).counts[0]
    counts = found.counts.copy()
    for name in _FROM_RECORDING:
        counts[name] = walked[name]
    return dataclasses.replace(found, counts=counts)


def _calibrated(
    loaded: Loaded,
    cases: Sequence[Case],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    seconds: float,
    progress: Progress,
) -> Calibration:
    longest = max(map(len, prompts))
    chunks = [case.schedule.workload.prefill_chunk_tokens or longest for case in cases]
    return calibrate_model(
        loaded, prompts, list(dict.fromkeys(stored_format(case.schedule, loaded.spec).name for case in cases)),
        longest_prompt=min(longest, max(chunks)), longest_context=longest + max_new_tokens, quick=True,
        cores=any(case.schedule.kernel.miss != "fetch" for case in cases),
        disk=any(case.schedule.copy.host_experts is not None for case in cases), seconds=seconds, progress=progress,
    )  # fmt: skip


def _unequal(runs: Sequence[ModelRun], case: Case) -> list[str]:
    """Return in what runs differ from the replays of their own recordings, and from each other."""
    if case.schedule.timing_dependent:
        return []
    found = [line for run in runs for line in differences(run, case.schedule)]
    if not all(np.array_equal(run.recording.experts, runs[0].recording.experts) for run in runs):
        found.append("experts: chosen otherwise when the same prompts were run again")
    return list(dict.fromkeys(found))


def _with_differences(one: Validated, found: Sequence[str]) -> Validated:
    every = tuple(dict.fromkeys((*one.compared.count_differences, *found)))
    return dataclasses.replace(one, compared=dataclasses.replace(one.compared, count_differences=every))
