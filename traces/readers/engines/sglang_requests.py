"""Linking tokens of successive forward passes to requests when only their positions were recorded.

Modelled: a running batch that keeps its order. A prefill piece that starts where an unfinished request stopped
continues it (chunked prefill), any other piece starts a request; a decode row continues the first request, in batch
order, whose last position is just before it. Requests that a decode pass leaves out have ended. Where several would
fit, the link is counted as ambiguous. Ignored: token ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ...recording import DECODE
from ..assemble import RequestRows


class RequestLinker:
    """Collects passes in the order they ran, and gives back requests in the order they first appeared."""

    def __init__(self) -> None:
        self._rows: list[list[tuple[npt.NDArray[Any], npt.NDArray[Any], int]]] = []
        self._waiting: dict[int, list[int]] = {}  # last position → requests there, in batch order
        self._running: set[int] = set()  # requests that the next decode pass may continue
        self.ambiguous = 0

    def add_pass(
        self,
        experts: npt.NDArray[Any],
        position: npt.NDArray[Any],
        phase: int,
        lengths: list[int],
        valid: npt.NDArray[np.bool_],
    ) -> None:
        """Add one forward pass.

        experts: [num_tokens, num_layers, top_k]; position: [num_tokens]; lengths: tokens of each request in the pass,
        in batch order; rows beyond their sum are decode rows of one token each (a mixed pass). Rows that are not
        `valid` (padding) are left out.
        """
        start = 0
        moved: list[tuple[int, int]] = []  # (request, new last position): a pass must not link to itself
        pieces = [(length, phase) for length in lengths]
        pieces += [(1, DECODE)] * (len(position) - sum(lengths))
        for length, piece_phase in pieces:
            rows = slice(start, start + length)
            start += length
            keep = valid[rows]
            if not keep.any():
                continue
            where = position[rows][keep]
            request = self._request_before(int(where[0]), piece_phase)
            self._rows[request].append((experts[rows][keep], where, piece_phase))
            moved.append((request, int(where[-1])))
        if pieces and all(piece_phase == DECODE for _, piece_phase in pieces):
            self._running.clear()
        for request, last in moved:
            self._waiting.setdefault(last, []).append(request)
            self._running.add(request)

    def requests(self) -> Iterator[RequestRows]:
        """Return the rows of every request, in the order they were computed."""
        for pieces in self._rows:
            yield RequestRows(
                experts=np.concatenate([experts for experts, _, _ in pieces]),
                position=np.concatenate([position for _, position, _ in pieces]),
                phase=np.concatenate([np.full(len(position), phase) for _, position, phase in pieces]),
            )

    def _request_before(self, position: int, phase: int) -> int:
        """Return the request that a piece starting at `position` belongs to, taken out of the running ones."""
        here = self._waiting.get(position - 1, [])
        if phase == DECODE:
            waiting = [request for request in here if request in self._running]
        else:  # chunked prefill: only a request that has not decoded yet can continue with more of its prompt
            waiting = [request for request in here if self._rows[request][-1][2] != DECODE]
        if not waiting:
            self._rows.append([])
            return len(self._rows) - 1
        self.ambiguous += len(waiting) > 1
        request = waiting[0]
        here.remove(request)
        return request
