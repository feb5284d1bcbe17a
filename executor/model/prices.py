"""What decisions that weigh costs go by while a model runs: prices of copies and layer steps, known before any token is.

Modelled: prices of copies and layer steps, those of decode steps with routing made up at random: a simulated run takes them from its own
forward passes, but a model's are not known before it has run. A guess is fetched where its probability times the part of the copy
that hides behind earlier layers exceeds what a wrong guess takes from others' time on the link
(`sim/policies/prefetching.worth_fetching`). A replay of the run is given the same prices, and therefore decides the same. Ignored: what
the host's cores take.
"""

from __future__ import annotations

from ...calibrate.costs.cost_model import CostModel
from ...sim.offload.forecast import usual_tables
from ...sim.offload.simulators import prices_of
from ...sim.offload.workload import build_workload
from ...sim.policies.state import Prices
from ...specs.models import ModelSpec
from ...specs.schedules.offload import OffloadSchedule
from ..calibration.host_overheads import random_routing

_STEPS = 4


def prices_for(schedule: OffloadSchedule, model: ModelSpec, costs: CostModel, *, context_tokens: int) -> Prices | None:
    """Return the prices of a machine for decode steps at a context; None for a schedule that weighs none.

    Raises MissingCalibration where the profile does not reach.
    """
    if not schedule.predictor.benefit:
        return None
    workload = build_workload(random_routing(model, steps=_STEPS, context=context_tokens), schedule.workload)
    tables, _ = usual_tables(schedule, workload, model, costs)
    return prices_of(tables, workload)
