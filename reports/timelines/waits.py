"""Which kernels stood waiting for bytes, and for the bytes of which transfers: worked out from timeline rows alone.

Modelled: an expert kernel waited for a copy when its compute lane was idle before it and it began at the very instant (or
within `slack_ns`, for measured rows) at which a transfer it needs had arrived. Such a kernel is tied to every transfer of
its experts that arrived while the lane was idle: had one of them come later, it would have begun later. What a kernel needs:
the transfers of its own expert; those demanded for its layer and step where it computes several experts (rows do not list
them); the last of the layer's transfers where whole layers are fetched and no kernel of the layer step begins before it, and
for the layer step's first kernel: without a cache all that was fetched ahead is waited for; and for its last kernel, which a layer
that is streamed lets begin only when all of it is there. Of a transfer in chunks the last chunk counts. Ignored: waits of
kernels for the host or for earlier kernels, and guesses that arrived in time. A guess that a kernel of several experts needs,
but that did not arrive last, is left out: its rows do not tell it from a wrong guess.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd

TRANSFER_OPS = ("fetch", "prefetch")
COMPUTE_LANE = "compute"


class Wait(NamedTuple):
    """A transfer and the kernel that waited for it, as positions of their rows in the frame."""

    transfer: int
    kernel: int


class _Row(NamedTuple):
    at: int
    op: str
    step: int
    layer: int
    expert: int
    start: int
    end: int


@dataclass(slots=True)
class _Arrivals:
    """Transfers in order of arrival."""

    rows: list[_Row] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def add(self, row: _Row) -> None:
        self.rows.append(row)
        self.ends.append(row.end)

    def between(self, after: int, until: int) -> list[_Row]:
        """Return the rows that ended after `after` and not after `until`."""
        return self.rows[bisect_right(self.ends, after) : bisect_right(self.ends, until)]

    def pending(self, at: int) -> bool:
        """Return whether a row ends after `at`."""
        return bisect_right(self.ends, at) < len(self.ends)


def waits(frame: pd.DataFrame, slack_ns: int = 0) -> list[Wait]:
    """Return every (transfer, kernel) in which the kernel waited for the transfer, in order of kernels, then of arrival.

    frame: timeline rows in order of their start. slack_ns: how long after an arrival a kernel may begin and still count as
    having waited for it; 0 for predicted timelines.
    """
    found: list[Wait] = []
    for device in frame["device"].unique():
        found += _device_waits(_rows(frame, str(device)), slack_ns)
    return sorted(found, key=lambda wait: wait.kernel)


def _rows(frame: pd.DataFrame, device: str) -> list[tuple[str, _Row]]:
    """Return (lane, row) of one device, with the position of each row in the frame."""
    mine = (frame["device"] == device).to_numpy().nonzero()[0]
    part = frame.iloc[mine]
    columns = (part["op"].astype(str), part["step"], part["layer"], part["expert"], part["start_ns"], part["end_ns"])
    rows = map(_Row, mine.tolist(), *(column.tolist() for column in columns))
    return list(zip(part["lane"].astype(str).tolist(), rows, strict=True))


def _device_waits(rows: list[tuple[str, _Row]], slack_ns: int) -> list[Wait]:
    by_expert: dict[tuple[int, int], _Arrivals] = defaultdict(_Arrivals)
    by_layer_step: dict[tuple[int, int], _Arrivals] = defaultdict(_Arrivals)
    first_kernel: dict[tuple[int, int], int] = {}
    last_kernel: dict[tuple[int, int], int] = {}
    for row in sorted((row for _, row in rows if row.op in TRANSFER_OPS), key=lambda row: row.end):
        by_expert[row.layer, row.expert].add(row)
        by_layer_step[row.step, row.layer].add(row)
    compute = [row for lane, row in rows if lane == COMPUTE_LANE]
    for row in compute:
        if row.op == "expert":
            first_kernel.setdefault((row.step, row.layer), row.start)
            last_kernel[row.step, row.layer] = row.start
    found: list[Wait] = []
    idle_from = 0
    for row in compute:
        if row.op == "expert" and row.start > idle_from:
            layer_step = by_layer_step[row.step, row.layer]
            first, last = first_kernel[row.step, row.layer], last_kernel[row.step, row.layer]
            ends_layer = row.start == last and not layer_step.pending(last)
            whole_layer = row.start == first or not layer_step.pending(first) or ends_layer
            needed = _needed(row, by_expert[row.layer, row.expert], layer_step, idle_from, slack_ns, whole_layer)
            found += [Wait(transfer.at, row.at) for transfer in needed]
        idle_from = max(idle_from, row.end)
    return found


def _needed(
    kernel: _Row, own: _Arrivals, layer_step: _Arrivals, idle_from: int, slack_ns: int, whole_layer: bool
) -> list[_Row]:
    """Return the transfers that arrived while the lane was idle for this kernel, none where it did not wait for them."""
    since = kernel.start - slack_ns
    if kernel.expert >= 0:
        arrived = own.between(idle_from, kernel.start)[-1:]
        if arrived and arrived[-1].end >= since:
            return arrived
        last = layer_step.between(idle_from, kernel.start)[-1:]
        return arrived + last if whole_layer and last and last[-1].end >= since else []
    candidates = layer_step.between(idle_from, kernel.start)
    if not candidates or candidates[-1].end < since:
        return []
    latest = {row.expert: row for row in candidates}  # of a transfer in chunks, the last
    binding = candidates[-1]
    return [row for row in latest.values() if row.op == "fetch" or row is binding]
