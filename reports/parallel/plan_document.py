"""What a report makes of an expert-parallel plan document: placements, rows and links as arrays.

Modelled: that maps and matrices have the shape of the placement, so that a damaged plan.json is one clear complaint. Ignored:
presence and type of keys (`specs.plans`), and whether the figures make sense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from ...planner.parallel.case import plain_schedule
from ...planner.parallel.maps import placement_from_dict
from ...planner.placement.placement import Placement
from ...specs.plans.document import EXPERT_PARALLEL, check_plan
from ...specs.schedules.parallel import ExpertParallelSchedule, ep_schedule_from_dict

Document = Mapping[str, Any]
FloatArray = npt.NDArray[np.float64]

BEFORE, AFTER = "before", "after"
# How plans call plain expert parallelism among their baselines.
PLAIN = "ep"
_AGAIN = "make the plan again with moeplan plan --mode ep"


def check_parallel_document(document: Document) -> None:
    """Return nothing; raises InputError naming the first key of an expert-parallel plan that is absent or wrong."""
    check_plan(document, EXPERT_PARALLEL)
    if not any(one["name"] == PLAIN for one in document["baselines"]):
        raise InputError("plan: baselines", "(absent)", f"none is called {PLAIN!r}", _AGAIN)
    for state in (BEFORE, AFTER):
        placement = placement_of(document, state)
        ranks = placement.num_ranks
        shapes = {
            f"slot_rows.{state}": (document["slot_rows"][state], (placement.num_layers, placement.num_slots)),
            f"links.{state}": (document["links"][state], (ranks, ranks)),
            f"max_over_mean_by_layer.{state}": (document["max_over_mean_by_layer"][state], (placement.num_layers,)),
        }
        for name, (values, shape) in shapes.items():
            if _shape(values) != shape:
                raise InputError(f"plan: {name}", f"shape {_shape(values)}", f"the placement wants {shape}", _AGAIN)


def placement_of(document: Document, state: str) -> Placement:
    """Return the placement before or after; raises InputError where the document's is none."""
    return placement_from_dict(document["placement_before" if state == BEFORE else "placement"])


def plain_of(document: Document) -> Document:
    """Return the baseline that is plain expert parallelism."""
    found: Document = next(one for one in document["baselines"] if one["name"] == PLAIN)
    return found


def rank_rows(document: Document, state: str) -> FloatArray:
    """Return [layers, ranks]: rows each rank computes in the first reported step."""
    placement = placement_of(document, state)
    rows = np.array(document["slot_rows"][state], np.float64)
    return np.asarray(rows.reshape(placement.num_layers, placement.num_ranks, -1).sum(axis=2))


def schedule_of(document: Document, state: str) -> ExpertParallelSchedule:
    """Return plain expert parallelism (before) or the plan's schedule (after)."""
    best = ep_schedule_from_dict(document["best"]["schedule"])
    return plain_schedule(best.kernel.bits) if state == BEFORE else best


def link_bytes(document: Document, state: str) -> FloatArray:
    """Return [from rank, to rank]: bytes sent in a mean step, all layers, dispatch there and combine back together."""
    exchange = schedule_of(document, state).all_to_all
    dispatched = np.array(document["links"][state], np.float64)
    back = exchange.combine_bytes_per_value / exchange.dispatch_bytes_per_value
    return np.asarray(dispatched + dispatched.T * back)


def same_node(placement: Placement) -> npt.NDArray[np.bool_]:
    """Return [ranks, ranks]: whether two ranks sit in one node."""
    node = np.arange(placement.num_ranks) // placement.ranks_per_node
    return np.asarray(node[:, None] == node[None, :])


def _shape(values: list[Any]) -> tuple[int, ...]:
    """Return the shape of nested lists; (rows, -1) where rows differ in length."""
    if not values or not isinstance(values[0], list):
        return (len(values),)
    lengths = {len(row) for row in values}
    return (len(values), lengths.pop() if len(lengths) == 1 else -1)
