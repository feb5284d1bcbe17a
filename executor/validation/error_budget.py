"""Where a prediction's error comes from: measured durations put into the simulator, one class at a time.

    copy         how long a transfer takes alone, or a read from disk
    compute      how long kernels take alone
    cores        how long experts take on the host's cores alone
    contention   how much they slow each other down
    host         what the host does between them
    scheduling   what is left when all of these are measured

Modelled: a row's measured duration is its duration alone plus what companions cost it, in proportion to how long they
ran beside it; a straight line over many rows separates the two. Ratios of measured to predicted durations then scale
the tables. Ignored: how durations vary around their middle, which is part of what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...sim.offload.costs import CostTables
from ...sim.offload.forecast import simulate
from ...sim.offload.run_input import RunInput
from ...sim.policies.state import Array
from ...sim.timeline import (
    COMPUTE,
    CPU,
    D2H,
    DISK,
    H2D,
    HOST,
    NUM_RATED_LANES,
    OP_CPU,
    OP_DENSE,
    OP_DISK,
    OP_EXPERT,
    OP_HEAD,
    OP_HOST_LAUNCH,
    OP_HOST_LAYER,
    OP_HOST_STEP,
    OP_HOST_SUBMIT,
    RATE_ONE,
    ROW_BYTES,
    ROW_END,
    ROW_EXPERT,
    ROW_LANE,
    ROW_LAYER,
    ROW_OP,
    ROW_START,
    ROW_STEP,
    ROW_TOKENS,
    Timeline,
)
from ..running.decided import Work, decided_work, launch_of_rows
from ..running.execution import Execution
from ..running.overlap import overlap_ns
from ..running.prediction import predicted_step_s

CLASSES = ("copy", "compute", "cores", "contention", "host")
_MIN_OVERLAP = 0.05
_SLOWEST = 0.2
_HOST_OPS = {
    "step": OP_HOST_STEP,
    "layer": OP_HOST_LAYER,
    "kernel": OP_HOST_LAUNCH,
    "transfer": OP_HOST_SUBMIT,
}


@dataclass(frozen=True, slots=True)
class _Line:
    """Measured over predicted durations of one kind of rows: alone, and per unit of overlap."""

    alone: float
    slope: float
    seen: bool


def error_budget(
    given: RunInput, tables: CostTables, executions: Sequence[Execution], measured_s: float
) -> dict[str, float]:
    """Return the relative error of the mean step: as predicted (`none`), with each class measured, with all (`scheduling`)."""
    parts = measured_tables(given, tables, executions)
    found = {"none": predicted_step_s(simulate(given, tables), given.workload) / measured_s - 1}
    for name in CLASSES:
        changed = tables._replace(**parts[name])
        found[name] = predicted_step_s(simulate(given, changed), given.workload) / measured_s - 1
    every = tables
    for name in CLASSES:
        every = every._replace(**parts[name])
    found["scheduling"] = predicted_step_s(simulate(given, every), given.workload) / measured_s - 1
    return found


def measured_tables(
    given: RunInput, tables: CostTables, executions: Sequence[Execution]
) -> dict[str, dict[str, Array]]:
    """Return, for each class, the fields of the cost tables that it replaces."""
    timelines = [execution.timeline for execution in executions]
    work = decided_work(given)
    ratio = {op: _lines(work, tables, timelines, op) for op in (OP_DENSE, OP_EXPERT, OP_HEAD)}
    copies = _copy_line(tables, timelines, H2D)
    backs = _copy_line(tables, timelines, D2H)
    cores = _lines(work, tables, timelines, OP_CPU)
    compute = {
        "dense_ns": _scaled(tables.dense_ns, ratio[OP_DENSE].alone),
        "head_ns": _scaled(tables.head_ns, ratio[OP_HEAD].alone),
        "kernel_ns": _scaled(tables.kernel_ns, ratio[OP_EXPERT].alone),
        "grouped_ns": _scaled(tables.grouped_ns, ratio[OP_EXPERT].alone, least=0),
    }
    reads = np.concatenate([_lengths(timeline, OP_DISK, DISK) for timeline in timelines])
    disk = tables.disk_ns.copy()
    if len(reads):
        disk[0] = int(np.mean(reads))  # as they are fitted: slow ones add up
    rate = tables.rate.copy()
    for lane, companion, line in ((COMPUTE, H2D, ratio[OP_EXPERT]), (H2D, COMPUTE, copies), (CPU, H2D, cores)):
        if line.seen:
            measured = min(1.0, max(_SLOWEST, 1.0 - line.slope))
            for mask in range(2**NUM_RATED_LANES):
                if mask >> lane & 1 and mask >> companion & 1:
                    rate[lane, mask] = max(1, round(measured * RATE_ONE))
    host = tables.host_ns.copy()
    for kind, op in _HOST_OPS.items():
        lengths = np.concatenate([_lengths(timeline, op) for timeline in timelines])
        if len(lengths):
            host[kind] = int(np.median(lengths))
    return {
        "copy": {
            "chunk_ns": _scaled(tables.chunk_ns, copies.alone),
            "back_ns": _scaled(tables.back_ns, backs.alone),
            "disk_ns": disk,
        },
        "compute": compute,
        "cores": {"cpu_ns": _scaled(tables.cpu_ns, cores.alone)},
        "contention": {"rate": rate},
        "host": {"host_ns": host},
    }


def _lines(work: Work, tables: CostTables, timelines: Sequence[Timeline], op: int) -> _Line:
    """Return measured against predicted durations of one kind of computing."""
    ratios, overlaps = [], []
    for timeline in timelines:
        rows = timeline.rows[timeline.rows[:, ROW_OP] == op]
        expected = expected_ns(work, tables, rows, op)
        beside = overlap_ns(rows, timeline.rows[timeline.rows[:, ROW_LANE] == H2D])
        ratios.append((rows[:, ROW_END] - rows[:, ROW_START]) / expected)
        overlaps.append(beside / expected)
    return _line(np.concatenate(ratios), np.concatenate(overlaps))


def _copy_line(tables: CostTables, timelines: Sequence[Timeline], lane: int) -> _Line:
    ratios, overlaps = [], []
    for timeline in timelines:
        rows = timeline.rows[timeline.rows[:, ROW_LANE] == lane]
        if lane == D2H:
            expected = np.full(len(rows), float(tables.back_ns[0]))
            for size, ns in zip(tables.expert_bytes.tolist(), tables.back_ns.tolist(), strict=True):
                expected[rows[:, ROW_BYTES] == size] = ns
        else:
            expected = np.full(len(rows), float(tables.chunk_ns[0, 0]))
            for size, ns in zip(tables.chunk_bytes.ravel().tolist(), tables.chunk_ns.ravel().tolist(), strict=True):
                expected[rows[:, ROW_BYTES] == size] = ns  # of pieces of one size, the last one's
        compute = timeline.rows[timeline.rows[:, ROW_LANE] == COMPUTE]
        ratios.append((rows[:, ROW_END] - rows[:, ROW_START]) / np.maximum(expected, 1))
        overlaps.append(overlap_ns(rows, compute) / np.maximum(expected, 1))
    return _line(np.concatenate(ratios), np.concatenate(overlaps))


def _line(ratios: Array, overlaps: Array) -> _Line:
    """Return the line ratio = alone + slope · overlap that is least disturbed by outliers.

    Where overlaps hardly differ, nothing can be told apart, and the middle ratio is taken for alone.
    """
    if len(ratios) == 0:
        return _Line(1.0, 0.0, False)
    middle = float(np.median(ratios))
    if np.percentile(overlaps, 90) - np.percentile(overlaps, 10) < _MIN_OVERLAP:
        return _Line(middle, 0.0, False)
    kept = ratios <= 3 * middle
    slope, alone = 0.0, middle
    for _ in range(3):
        design = np.stack([np.ones(int(kept.sum())), overlaps[kept]], 1)
        alone, slope = np.linalg.lstsq(design, ratios[kept], rcond=None)[0]
        off = np.abs(ratios - alone - slope * overlaps)
        kept = off <= 3 * max(float(np.median(off[kept])), 1e-6)
    return _Line(max(0.05, float(alone)), max(0.0, float(slope)), True)


def expected_ns(work: Work, tables: CostTables, rows: Array, op: int) -> Array:
    """Return the predicted duration, running alone, of each row."""
    line = tables.step_class[rows[:, ROW_STEP]]
    if op == OP_DENSE:
        found: Array = tables.dense_ns[line, rows[:, ROW_LAYER]].astype(float)
        return found
    if op == OP_HEAD:
        head: Array = tables.head_ns[line].astype(float)
        return head
    if op == OP_CPU:
        layer_steps = rows[:, [ROW_STEP, ROW_LAYER, ROW_EXPERT]].tolist()
        mine = [work.core_formats.get((step, layer, expert), 0) for step, layer, expert in layer_steps]
        cores: Array = np.maximum(tables.cpu_ns[mine, rows[:, ROW_TOKENS]], 1).astype(float)
        return cores
    expected = np.zeros(len(rows))
    for at, (row, place) in enumerate(zip(rows.tolist(), launch_of_rows(rows).tolist(), strict=True)):
        layer_step = work.launches[row[ROW_STEP], row[ROW_LAYER]]
        # Where timing decided, a launch may have been another one than was to be expected.
        items = layer_step[place] if place < len(layer_step) else [(row[ROW_EXPERT], 0, row[ROW_TOKENS])]
        expected[at] = int(tables.grouped_ns[0]) + sum(int(tables.kernel_ns[fmt, tokens]) for _, fmt, tokens in items)
    return np.maximum(expected, 1)


def _lengths(timeline: Timeline, op: int, lane: int = HOST) -> Array:
    rows = timeline.rows[(timeline.rows[:, ROW_LANE] == lane) & (timeline.rows[:, ROW_OP] == op)]
    lengths: Array = rows[:, ROW_END] - rows[:, ROW_START]
    return lengths


def _scaled(values: Array, ratio: float, least: int = 1) -> Array:
    scaled: Array = np.where(values > 0, np.maximum(least, np.rint(values * ratio)), values).astype(np.int64)
    return scaled


def median_budget(budgets: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return, for each entry, the median of its absolute value over configurations."""
    return {name: float(np.median([abs(budget[name]) for budget in budgets])) for name in budgets[0]} if budgets else {}
