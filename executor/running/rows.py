"""Rows of a measured timeline, gathered as marks while a run goes on and turned into times when it is over.

Modelled: the columns of `sim.timeline`; times are relative to the start of the run. Ignored: activities that took no
time.
"""

from __future__ import annotations

import numpy as np

from ...devices.device import Mark
from ...sim.policies.state import DEMAND, Array
from ...sim.timeline import (
    COMPUTE,
    CPU,
    D2H,
    DISK,
    H2D,
    HOST,
    OP_BACK,
    OP_CPU,
    OP_DEMAND,
    OP_DISK,
    OP_PREFETCH,
    ROW_FIELDS,
    Timeline,
    canonical,
)
from .transfers import Transfer, WriteBack


class Rows:
    """Rows of one thread."""

    def __init__(self) -> None:
        self._marked: list[tuple[int, int, int, int, int, Mark, Mark, int, int]] = []
        self._timed: list[tuple[int, ...]] = []

    def copied(self, transfer: Transfer, began: int, begin: Mark, end: Mark, num_bytes: int) -> None:
        """Note a piece of a transfer; step, layer and expert are filled in from its layer step and key later."""
        op = OP_DEMAND if began == DEMAND else OP_PREFETCH
        self._marked.append((H2D, op, transfer.target, -1, transfer.key, begin, end, num_bytes, 0))

    def written_back(self, back: WriteBack, begin: Mark, end: Mark, num_bytes: int) -> None:
        """Note a write-back."""
        self._marked.append((D2H, OP_BACK, back.step, -1, back.key, begin, end, num_bytes, 0))

    def computed(self, op: int, step: int, layer: int, expert: int, begin: Mark, end: Mark, tokens: int) -> None:
        """Note an operation of the compute stream."""
        self._marked.append((COMPUTE, op, step, layer, expert, begin, end, 0, tokens))

    def hosted(self, op: int, step: int, layer: int, begin_ns: int, end_ns: int) -> None:
        """Note an operation of the host."""
        self._timed.append((HOST, op, step, layer, -1, begin_ns, end_ns, 0, 0))

    def on_cores(self, step: int, layer: int, expert: int, begin_ns: int, end_ns: int, tokens: int) -> None:
        """Note an expert that the host's cores computed."""
        self._timed.append((CPU, OP_CPU, step, layer, expert, begin_ns, end_ns, 0, tokens))

    def read(self, step: int, key: int, begin_ns: int, end_ns: int, num_bytes: int) -> None:
        """Note an expert that was read from disk; layer and expert are filled in from its key later."""
        self._timed.append((DISK, OP_DISK, step, -1, key, begin_ns, end_ns, num_bytes, 0))

    def times(self, origin_ns: int, *, first_layer_step: int, num_layers: int, num_experts: int) -> Array:
        """Return int64 [num_rows, ROW_FIELDS] with times since `origin_ns`; everything must be done."""
        found: list[tuple[int, ...]] = []
        for lane, op, step, layer, expert, begin, end, num_bytes, tokens in self._marked:
            if lane in (H2D, D2H):
                layer, expert = divmod(expert, num_experts)
                step = (step - first_layer_step) // num_layers if lane == H2D else step
            found.append(
                (lane, op, step, layer, expert, begin.at_ns() - origin_ns, end.at_ns() - origin_ns, num_bytes, tokens)
            )
        for lane, op, step, layer, expert, begin_ns, end_ns, *rest in self._timed:
            if lane == DISK:
                layer, expert = divmod(expert, num_experts)
            found.append((lane, op, step, layer, expert, begin_ns - origin_ns, end_ns - origin_ns, *rest))
        return np.array(found, np.int64).reshape(-1, ROW_FIELDS)


def timeline_of(parts: list[Array], device: str) -> Timeline:
    """Return one timeline of several threads' rows.

    Clocks of different streams are tied together to within microseconds, so a row may seem to start just before its lane's
    last one ended; it is moved to that moment. Rows of no length are dropped.
    """
    rows = canonical(np.concatenate(parts)) if parts else np.zeros((0, ROW_FIELDS), np.int64)
    for lane in (COMPUTE, H2D, D2H, CPU, DISK, HOST):
        mine = np.flatnonzero(rows[:, 0] == lane)
        if len(mine) > 1:
            ends = np.maximum.accumulate(rows[mine, 6])
            rows[mine[1:], 5] = np.maximum(rows[mine[1:], 5], ends[:-1])
    return Timeline(rows=canonical(rows[rows[:, 6] > rows[:, 5]]), device=device)
