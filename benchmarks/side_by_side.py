"""What the longer of computing and copying allows, as both are alone and as they are side by side, from rows of real runs.

    alone          rows of the baseline with nothing of the other lane beside them
    side by side   rows of a schedule that overlaps with the other lane beside them for most of their length

The host's work is compared within that schedule, which has other things to decide than the baseline.

Modelled: operations of one kind (dense part, expert, head, copy) by their medians, so that a ratio compares like with like; two lanes with
work c and d left, each slower by its own ratio while both run, until the shorter is through; what neither lane is busy with, the host's
work mostly, comes on top as it was in the baseline. Block by block, where a layer's copies can hide behind one layer's computing only: the
longer of the two in each block of each step, as long as the overlapping run itself took, so that copies of uneven length count. Computing
beside copies also reads experts that have left the caches since they arrived: that is part of its ratio. Ignored: the order of what
waits for what, which a schedule's own prediction has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeplan.base.units import NS_PER_S
from moeplan.executor.model.outcome import ModelRun
from moeplan.executor.running.overlap import overlap_ns
from moeplan.sim.policies.state import Array
from moeplan.sim.timeline import (
    COMPUTE,
    D2H,
    DISK,
    H2D,
    HOST,
    OP_DENSE,
    OP_EXPERT,
    OP_HEAD,
    OP_HOST_LAYER,
    ROW_BYTES,
    ROW_END,
    ROW_LANE,
    ROW_LAYER,
    ROW_OP,
    ROW_START,
    ROW_STEP,
)
from moeplan.traces.recording import DECODE

_ALONE, _TOGETHER = 0.1, 0.7
"""Shares of a row's length in which the other lane was busy, at most and at least."""
_LEAST_ROWS = 5
COPIES = (H2D, DISK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slower:
    """How many times as long operations take while the other lane runs; 1 where that was never seen.

    Below 1 where a baseline's are slower: a thread that copies one expert after another takes less for each than one that is woken for it.
    """

    compute: float
    copy: float
    host: float
    rows_beside: int
    """Rows of computing that were seen beside copies."""


def clean_steps(run: ModelRun) -> Array:
    """Return bool [num_steps]: the decode steps during which no other program was given a core of the run; all where none is."""
    decode: Array = run.step_phase == DECODE
    clean: Array = decode & ~run.disturbed.any(axis=1)
    return clean if clean.any() else decode


def decode_rows(run: ModelRun) -> Array:
    """Return the rows of clean decode steps [num_rows, ROW_FIELDS]."""
    rows: Array = run.timeline.rows
    return rows[clean_steps(run)[rows[:, ROW_STEP]]]


def mean_steps_s(runs: Sequence[ModelRun]) -> list[float]:
    """Return each run's mean decode step in seconds.

    A part of a step during which another program was given a core counts as long as the other runs took for the same part: all repeat
    the same decisions.
    """
    parts = np.stack([run.part_ns for run in runs]).astype(float)
    disturbed = np.stack([run.disturbed for run in runs])
    usable = np.where(disturbed & ~disturbed.all(axis=0), np.nan, parts)
    usual = np.nanmedian(usable, axis=0)
    taken = np.where(np.isnan(usable), usual, usable).sum(axis=2)
    decode = runs[0].step_phase == DECODE
    return [float(one[decode].mean()) / NS_PER_S for one in taken]


def busy_s(run: ModelRun, lanes: Sequence[int]) -> float:
    """Return the seconds of a decode step in which at least one of `lanes` is busy, on average."""
    rows = decode_rows(run)
    mine = rows[np.isin(rows[:, ROW_LANE], lanes)]
    if not len(mine):
        return 0.0
    mine = mine[np.argsort(mine[:, ROW_START], kind="stable")]
    reached = np.maximum.accumulate(mine[:, ROW_END])
    begins = np.maximum(mine[1:, ROW_START], reached[:-1])
    total = int(mine[0, ROW_END] - mine[0, ROW_START]) + int(np.maximum(0, mine[1:, ROW_END] - begins).sum())
    return total / NS_PER_S / max(1, int(clean_steps(run).sum()))


def idle_s(run: ModelRun) -> float:
    """Return the seconds of a decode step in which neither computing nor copying went on, on average."""
    steps = float((run.step_end_ns - run.step_begin_ns)[clean_steps(run)].mean()) / NS_PER_S
    return max(0.0, steps - busy_s(run, (COMPUTE, D2H, *COPIES)))


def slower(alone: Sequence[ModelRun], beside: Sequence[ModelRun]) -> Slower:
    """Return the ratios that runs which overlap show against a baseline's rows with nothing beside them."""
    lengths: dict[tuple[str, bool], list[Array]] = {}
    for runs, together in ((alone, False), (beside, True)):
        for run in runs:
            for name, rows in _kinds(run, together).items():
                lengths.setdefault((name, together), []).append(rows)
    for run in beside:  # the host's work of both kinds, as only these runs also guess
        for together in (False, True):
            lengths.setdefault(("host", together), []).append(_host_rows(run, together))
    found: dict[str, float] = {}
    seen: dict[str, int] = {}
    for name in ("dense", "expert", "head", "copy", "host"):
        here, there = (_joined(lengths.get((name, together))) for together in (True, False))
        seen[name] = len(here)
        enough = min(len(here), len(there)) >= _LEAST_ROWS
        found[name] = float(np.median(here) / np.median(there)) if enough else 1.0
    weights = {name: float(sum(_joined(lengths.get((name, False))))) for name in ("dense", "expert", "head")}
    whole = sum(weights.values()) or 1.0
    compute = sum(weights[name] * found[name] for name in weights) / whole
    return Slower(
        compute=compute, copy=found["copy"], host=found["host"],
        rows_beside=seen["dense"] + seen["expert"] + seen["head"],
    )  # fmt: skip


def alone_s(run: ModelRun, known: Slower) -> tuple[float, float]:
    """Return the seconds of a decode step's computing and of its copies, each as if the other lane had been idle meanwhile."""
    rows = decode_rows(run)
    compute, copies = rows[rows[:, ROW_LANE] == COMPUTE], rows[np.isin(rows[:, ROW_LANE], COPIES)]
    found = []
    for mine, others, ratio in ((compute, copies, known.compute), (copies, compute, known.copy)):
        lengths = mine[:, ROW_END] - mine[:, ROW_START]
        shares = overlap_ns(mine, others) / np.maximum(lengths, 1)
        found.append(float((lengths / (1 + (ratio - 1) * shares)).sum()))
    steps = max(1, int(clean_steps(run).sum()))
    return found[0] / NS_PER_S / steps, found[1] / NS_PER_S / steps


def together_s(compute_s: float, copy_s: float, known: Slower) -> float:
    """Return what computing and copying take when both begin at once and each is slower while the other runs."""
    compute, copy = compute_s * known.compute, copy_s * known.copy
    if compute <= copy:
        return compute + copy_s - compute / known.copy
    return copy + compute_s - copy / known.compute


def block_by_block_s(run: ModelRun) -> float:
    """Return the seconds of a decode step whose layers' copies each hide behind the experts and the dense part before, and no others.

    As long as all of it took in this run; what neither lane is busy with comes on top. Of the first layer's copies, asked for when its
    routing is known, all but the first may hide behind that layer's experts, which run as they arrive.
    """
    rows, layers = decode_rows(run), run.part_ns.shape[1]
    steps = np.unique(rows[:, ROW_STEP])
    at = np.searchsorted(steps, rows[:, ROW_STEP])
    lengths = rows[:, ROW_END] - rows[:, ROW_START]

    def each(mine: Array) -> Array:
        """Return [num_steps, num_layers]: what rows took together."""
        found: Array = np.zeros((len(steps), layers), np.int64)
        np.add.at(found, (at[mine], rows[mine, ROW_LAYER]), lengths[mine])
        return found

    dense, experts, head = (each(rows[:, ROW_OP] == op) for op in (OP_DENSE, OP_EXPERT, OP_HEAD))
    copied = np.isin(rows[:, ROW_LANE], COPIES)
    copies = each(copied)
    first = copied & (rows[:, ROW_LAYER] == 0)
    count = np.maximum(1, np.bincount(at[first], minlength=len(steps)))
    early = np.minimum(copies[:, 0], experts[:, 0]) * (count - 1) / count
    hidden = np.maximum(experts[:, :-1] + dense[:, 1:], copies[:, 1:]).sum(axis=1)
    whole = dense[:, 0] + copies[:, 0] - early + hidden + experts[:, -1] + head.sum(axis=1)
    return float(whole.mean()) / NS_PER_S + idle_s(run)


def _kinds(run: ModelRun, together: bool) -> dict[str, Array]:
    """Return the lengths of rows by kind: those with the other lane beside them, or those without."""
    rows = decode_rows(run)
    compute, copies = rows[rows[:, ROW_LANE] == COMPUTE], rows[np.isin(rows[:, ROW_LANE], COPIES)]
    found = {}
    for name, op in (("dense", OP_DENSE), ("expert", OP_EXPERT), ("head", OP_HEAD)):
        found[name] = _picked(compute[compute[:, ROW_OP] == op], copies, together)
    whole = copies[
        copies[:, ROW_BYTES] == copies[:, ROW_BYTES].max(initial=0)
    ]  # of copies in pieces, pieces of one size
    return found | {"copy": _picked(whole, compute, together)}


def _host_rows(run: ModelRun, together: bool) -> Array:
    """Return the lengths of the host's work of a layer step: with copies beside it, or without."""
    rows = decode_rows(run)
    host = rows[(rows[:, ROW_LANE] == HOST) & (rows[:, ROW_OP] == OP_HOST_LAYER)]
    return _picked(host, rows[np.isin(rows[:, ROW_LANE], COPIES)], together)


def _picked(rows: Array, others: Array, together: bool) -> Array:
    lengths: Array = rows[:, ROW_END] - rows[:, ROW_START]
    shares = overlap_ns(rows, others) / np.maximum(lengths, 1)
    picked: Array = lengths[shares >= _TOGETHER] if together else lengths[shares <= _ALONE]
    return picked


def _joined(parts: Sequence[Array] | None) -> Array:
    return np.concatenate(parts) if parts else np.zeros(0)
