"""Which rows one rank sends to whom: for every token and choice, decided from what the rank itself knows.

    header slots [rows, top_k], -1 for none ── split ──► rows to send, sorted by unit; their headers; how many to each unit

Modelled: a unit is a rank or a node; a row goes once to every unit that it needs, or once for every choice, and carries the
choices that the unit is to answer. The rule is the simulator's (`sim.parallel.traffic`), which counts it for all ranks at
once; here each rank applies it to its own rows, and tests compare the two. Ignored: payloads and time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...sim.parallel.traffic import Topology, slot_groups, token_chunks
from ...specs.schedules.parallel import ExpertParallelSchedule

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Rows on their way to units."""

    rows: IntArray
    """[sent]: which of the given rows each one is, sorted by unit."""
    slots: IntArray
    """[sent, top_k]: the choices that its unit answers, -1 elsewhere."""
    counts: IntArray
    """[units]: rows to each unit."""


def split(slots: IntArray, unit_of_slot: IntArray, num_units: int, *, every_choice: bool = False) -> Split:
    """Return what becomes of rows with these choices; every_choice: a row is sent once for each of them."""
    units = np.where(slots >= 0, unit_of_slot[slots], -1)
    if every_choice:
        row, choice = np.nonzero(slots >= 0)
        order = np.argsort(units[row, choice], kind="stable")
        row, choice = row[order], choice[order]
        kept = np.full((len(row), slots.shape[1]), -1, np.int64)
        kept[np.arange(len(row)), choice] = slots[row, choice]
        counts = np.bincount(units[row, choice], minlength=num_units)
        return Split(rows=row, slots=kept, counts=counts)
    needed = (units[:, :, None] == np.arange(num_units)).any(axis=1)  # [rows, units]
    unit, row = np.nonzero(needed.T)
    kept = np.where(units[row] == unit[:, None], slots[row], -1)
    return Split(rows=row, slots=kept, counts=needed.sum(axis=0))


def parts_of_tokens(num_tokens: int, schedule: ExpertParallelSchedule) -> tuple[IntArray, IntArray]:
    """Return (batch, chunk of it) of each of a rank's tokens."""
    by_token = schedule.num_groups if schedule.pipeline.split == "token" else 1
    chunks = token_chunks(np.zeros(num_tokens, np.int64), 1, schedule.pipeline.micro_batches * by_token)
    return chunks // by_token, chunks % by_token


def slots_of_group(slots: IntArray, topology: Topology, schedule: ExpertParallelSchedule, group: int) -> IntArray:
    """Return choices `[rows, top_k]` with -1 for those that belong to other groups of experts."""
    if schedule.pipeline.split != "expert":
        return slots
    of_slot = slot_groups(topology, schedule.num_groups)
    return np.where((slots >= 0) & (of_slot[slots] == group), slots, -1)
