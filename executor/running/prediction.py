"""What is about to be run, as the simulator takes it, and the figure that a measurement is held against.

Modelled: runs of recordings at their full length or less; the mean step of those that decode. Ignored: how a run is predicted
(`sim.offload.forecast`).
"""

from __future__ import annotations

import numpy as np

from ...base.errors import InputError
from ...base.units import NS_PER_S
from ...sim.offload.drafting.draft import Drafting
from ...sim.offload.run_input import RunInput, bind
from ...sim.offload.simulators import Outcome
from ...sim.offload.workload import Workload, build_workload
from ...sim.policies.bundled import knows_future
from ...specs.schedules.offload import OffloadSchedule
from ...traces.recording import RoutingTrace


def run_input(
    schedule: OffloadSchedule, trace: RoutingTrace, *, window_steps: int | None = None, drafting: Drafting | None = None
) -> RunInput:  # fmt: skip
    """Return what running `schedule` on a recording takes; drafting: decode steps verify guesses, which nothing drafts.

    Raises InputError for a cache without a size, for more layers on the host than there are, or for guesses that the recording
    does not hold.
    """
    schedule = _with_whole_layers(schedule, trace)
    cache = schedule.cache
    if cache.policy != "none" and cache.experts_per_layer is None and cache.pooled_experts is None:
        raise InputError(
            "cache", "no size", "a run needs the number of slots", "set cache.experts_per_layer or cache.pooled_experts"
        )
    workload = build_workload(
        trace,
        schedule.workload,
        reset_per_request=cache.reset == "request",
        max_steps=window_steps,
        with_next_use=knows_future(cache.policy),
        drafting=drafting,
    )
    return bind(schedule, trace, workload)


def _with_whole_layers(schedule: OffloadSchedule, trace: RoutingTrace) -> OffloadSchedule:
    """Return a schedule that keeps whole layers off the device as one that says how many experts are on it."""
    away = schedule.cache.host_layers
    if away is None:
        return schedule
    if away >= trace.num_layers:
        raise InputError(
            "cache.host_layers",
            away,
            f"the recording has {trace.num_layers} MoE layers",
            "leave at least one on the device, or use cpu-moe",
        )
    return schedule.with_options(cache__pooled_experts=(trace.num_layers - away) * trace.num_experts)


def counted_steps(workload: Workload) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return which steps a run's speed is told by: those that decode, or all of them where none does."""
    decode: np.ndarray[tuple[int], np.dtype[np.bool_]] = workload.steps.step_phase == 1
    return decode if decode.any() else np.ones_like(decode)


def predicted_step_s(found: Outcome, workload: Workload) -> float:
    """Return the mean predicted duration of the steps that count."""
    steps = np.diff(np.concatenate(([0], found.step_end)))
    return float(steps[counted_steps(workload)].mean()) / NS_PER_S
