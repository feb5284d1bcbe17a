"""One schedule with everything that its decisions depend on: what engines, forecasts and real runs all take.

Modelled: the compiled options, the forward passes, the slots of each pool, and the predicted costs that decisions weigh where
they weigh any. Ignored: what the run costs (`forecast`), and files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...base.errors import InputError
from ...specs.schedules.offload import OffloadSchedule
from ...traces.recording import RoutingTrace
from ..policies.state import Array, PolicyConfig, Prices, make_config
from .costs import CostTables
from .workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInput:
    """One schedule with everything that its decisions depend on."""

    schedule: OffloadSchedule
    config: PolicyConfig
    workload: Workload
    capacities: Array
    weighed: CostTables | Prices | None = None
    """The predicted costs that decisions weigh, where the schedule weighs any (`forecast.with_costs`): whole tables, or the prices
    alone that a run was given before its forward passes were known."""


def bind(schedule: OffloadSchedule, trace: RoutingTrace, workload: Workload) -> RunInput:
    """Return a run of `schedule`, whose cache has a size, over forward passes of a recording.

    Raises InputError where the recording lacks the guesses that the schedule needs.
    """
    capacities = np.array(schedule.cache.slots_by_cache(trace.num_layers))
    return RunInput(schedule=schedule, config=run_config(schedule, trace), workload=workload, capacities=capacities)


def run_config(schedule: OffloadSchedule, trace: RoutingTrace) -> PolicyConfig:
    """Return the compiled form of a schedule's decisions; raises InputError where the recording lacks guesses."""
    predictor = schedule.predictor
    distances, width = (0, 0) if trace.predicted is None else trace.predicted.shape[2:]
    if predictor.kind == "next-gate":
        if (
            (predictor.threshold > 0 or predictor.benefit)
            and trace.predicted is not None
            and trace.predicted_prob is None
        ):
            raise InputError(
                "predictor.threshold",
                predictor.threshold,
                "the recording's guesses have no probabilities",
                "leave it at 0 and predictor.benefit false",
            )
        if distances == 0:
            raise InputError(
                "predictor.kind",
                "next-gate",
                "the recording holds no guesses",
                "use predictor.kind=synthetic with a predictor.recall",
            )
        if predictor.depth > distances:
            raise InputError(
                "predictor.depth",
                predictor.depth,
                f"the recording's guesses reach {distances} layers",
                f"set it to at most {distances}, or use predictor.kind=synthetic",
            )
    return make_config(
        schedule,
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        guess_distances=distances,
        guess_width=width,
    )
