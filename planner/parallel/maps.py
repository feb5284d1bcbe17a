"""What a plan moves, in numbers that can be drawn: rows of every slot and the balance of every layer, before and after.

Modelled: before is plain expert parallelism, after the plan's best; slots are those of the first reported step, the balance
is the mean over all reported steps. The table of a static router is given for experts with copies, the only ones for which
it decides anything. Ignored: time, and links (`ep_links`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from ...specs.schedules.parallel import ExpertParallelSchedule
from ..placement.placement import Placement
from ..placement.replica_choice import nearest_table
from .evidence import REPORT
from .search import EpSearch


def plan_maps(
    search: EpSearch,
    before: ExpertParallelSchedule,
    after: ExpertParallelSchedule,
    dispatch: npt.NDArray[np.int32] | None,
) -> dict[str, Any]:
    """Return the plan document's keys `placement_before`, `slot_rows`, `max_over_mean_by_layer` and `dispatch`.

    slot_rows: [layers, slots] before and after. dispatch: int32 [layers, experts, ranks], a static router's table, or None.
    """
    found: dict[str, Any] = {"slot_rows": {}, "max_over_mean_by_layer": {}}
    for name, schedule in (("before", before), ("after", after)):
        loads = search.evidence.loads(REPORT, search.placements.candidate(schedule), schedule)
        found["slot_rows"][name] = loads[0].slot_rows.sum(axis=1).tolist()
        found["max_over_mean_by_layer"][name] = np.mean([_balance(load.rank_rows()) for load in loads], axis=0).tolist()
    found["placement_before"] = placement_to_dict(search.placements.candidate(before).placement)
    placement = search.placements.candidate(after).placement
    found["dispatch"] = None if dispatch is None else copies_of_table(dispatch, placement)
    return found


def placement_to_dict(placement: Placement) -> dict[str, Any]:
    """Return a placement as plain values, as plan documents hold it."""
    return {
        "physical_to_logical": placement.physical_to_logical.tolist(), "num_logical": placement.num_logical,
        "num_ranks": placement.num_ranks, "num_nodes": placement.num_nodes,
    }  # fmt: skip


def placement_from_dict(values: dict[str, Any]) -> Placement:
    """Return the placement of plain values; raises InputError where they are none."""
    try:
        slots = np.array(values["physical_to_logical"], np.int32)
    except (ValueError, TypeError, OverflowError):  # rows of different lengths, text, numbers without end
        rule = "not rows of equally many expert numbers"
        raise InputError(
            "placement.physical_to_logical", values["physical_to_logical"], rule, "make the plan again"
        ) from None
    return Placement(
        physical_to_logical=slots, num_logical=int(values["num_logical"]),
        num_ranks=int(values["num_ranks"]), num_nodes=int(values["num_nodes"]),
    )  # fmt: skip


def copies_of_table(table: npt.NDArray[np.int32], placement: Placement) -> list[list[Any]]:
    """Return (layer, expert, slot for each source rank) of every expert that sits in several slots."""
    layers, experts = np.nonzero(placement.replica_counts() > 1)
    found: list[list[Any]] = [
        [layer, expert, table[layer, expert].tolist()]
        for layer, expert in zip(layers.tolist(), experts.tolist(), strict=True)
    ]
    return found


def table_of_copies(copies: list[list[Any]], placement: Placement) -> npt.NDArray[np.int32]:
    """Return the whole table [layers, experts, ranks] of what `copies_of_table` gave."""
    table = np.array(nearest_table(placement), np.int32)
    for layer, expert, slots in copies:
        table[layer, expert] = slots
    return table


def _balance(rank_rows: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Return [layers]: the fullest rank's rows over the mean rank's; 1 where a layer has none."""
    rows = rank_rows.astype(np.float64)
    mean = rows.mean(axis=1)
    return np.asarray(np.divide(rows.max(axis=1), mean, out=np.ones_like(mean), where=mean > 0))
