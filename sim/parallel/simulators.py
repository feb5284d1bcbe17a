"""Both expert-parallel engines behind one call: the same program and tables in, one comparable outcome out.

Ignored: how programs and tables come about.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...base.errors import Internal
from ..policies.state import Array
from . import compiled
from .program import Program
from .simpy_model import EpModel
from .tables import EpTables
from .timeline import EP_FIELDS, NUM_EP_LANES, EpTimeline, ep_canonical


@dataclass(frozen=True, slots=True, kw_only=True)
class EpOutcome:
    """What one step did. Times in whole nanoseconds."""

    makespan_ns: int
    busy_ns: Array
    """int64 [ranks, lanes]: how long each lane was busy."""
    op_end: Array
    """int64 [ops, ranks]: when each rank ended each operation."""
    ex_start: Array
    """int64 [exchanges]: when each exchange began."""
    ex_end: Array
    """int64 [exchanges]: when each exchange ended."""
    timeline: EpTimeline | None
    """Rows, where they were asked for."""
    engine: str


def busy_of(tables: EpTables) -> Array:
    """Return int64 [ranks, lanes]: how long each lane will be busy; every activity runs exactly once, undisturbed."""
    return np.stack([tables.work_ns.sum(0), tables.ex_ns[:, 0].sum(0), tables.ex_ns[:, 1].sum(0)], 1).astype(np.int64)


def run_ep_compiled(program: Program, tables: EpTables, *, rows: bool = False) -> EpOutcome:
    """Return the compiled simulator's outcome, with its timeline where `rows` asks for it."""
    num_rows = 0
    if rows:
        num_rows = int(np.count_nonzero(tables.work_ns) + np.count_nonzero(tables.ex_ns))
    num_exchanges = len(program.ex_kind)
    op_end = np.zeros(tables.work_ns.shape, np.int64)
    ex_start, ex_end = np.zeros(num_exchanges, np.int64), np.zeros(num_exchanges, np.int64)
    progress = np.zeros((num_exchanges, compiled.NUM_PROGRESS), np.int64)
    clock, found = np.zeros(compiled.NUM_EP_CLOCK, np.int64), np.zeros((num_rows, EP_FIELDS), np.int64)
    compiled.run_program(program, tables, op_end, ex_start, ex_end, progress, clock, found)
    if clock[compiled.CLOCK_STUCK]:
        raise Internal("the program deadlocked: an operation waits for an exchange that is never requested")
    if rows and clock[compiled.CLOCK_ROWS] != num_rows:
        raise Internal(f"{clock[compiled.CLOCK_ROWS]} timeline rows where {num_rows} activities take time")
    return EpOutcome(makespan_ns=int(clock[compiled.CLOCK_MAKESPAN]), busy_ns=busy_of(tables), op_end=op_end, ex_start=ex_start,
                     ex_end=ex_end, timeline=EpTimeline(rows=ep_canonical(found)) if rows else None, engine="compiled")  # fmt: skip


def run_ep_simpy(program: Program, tables: EpTables) -> EpOutcome:
    """Return the SimPy model's outcome, always with its timeline."""
    model = EpModel(program, tables)
    rows, makespan = model.run()
    busy = np.zeros((tables.work_ns.shape[1], NUM_EP_LANES), np.int64)
    if len(rows):
        np.add.at(busy, (rows[:, 0], rows[:, 1]), rows[:, 7] - rows[:, 6])
    return EpOutcome(makespan_ns=makespan, busy_ns=busy, op_end=model.op_end, ex_start=model.ex_start, ex_end=model.ex_end,
                     timeline=EpTimeline(rows=ep_canonical(rows)), engine="simpy")  # fmt: skip


def first_ep_difference(one: EpOutcome, other: EpOutcome) -> str | None:
    """Return None when two outcomes agree to the nanosecond, row by row; else the first thing that differs."""
    if one.makespan_ns != other.makespan_ns:
        return f"makespan: {one.engine} {one.makespan_ns}, {other.engine} {other.makespan_ns}"
    for name in ("busy_ns", "op_end", "ex_start", "ex_end"):
        left, right = getattr(one, name), getattr(other, name)
        if not np.array_equal(left, right):
            at = tuple(int(i) for i in np.argwhere(left != right)[0])
            return f"{name}{list(at)}: {one.engine} {left[at]}, {other.engine} {right[at]}"
    if one.timeline is not None and other.timeline is not None:
        mine, theirs = one.timeline.rows, other.timeline.rows
        if mine.shape != theirs.shape:
            return f"rows: {one.engine} {mine.shape[0]}, {other.engine} {theirs.shape[0]}"
        different = np.flatnonzero(np.any(mine != theirs, axis=1))
        if len(different):
            at_row = int(different[0])
            return f"row {at_row}: {one.engine} {mine[at_row].tolist()}, {other.engine} {theirs[at_row].tolist()}"
    return None
