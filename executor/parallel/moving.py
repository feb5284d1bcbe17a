"""Weights that travel from one placement to another while steps go on, and which placement a step may use layer by layer.

    at-once          before a step all layers move; the step after uses the new placement
    layer-by-layer   before each step one layer moves
    background       a thread of every rank moves layer after layer beside the steps, in small pieces, so that tokens never wait behind
                     more than one of them; before each step ranks agree how many layers are there

Modelled: a rank fetches what it lacks from itself, else from its node, else from another one, from whoever sends least so far; bytes are
those of slots, by all_to_all_single in a process group of their own. New weights stand beside the old ones, so that a step uses one or the
other and its results do not depend on how far a move has come. Ignored: giving the old memory back, and why experts are moved.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ...base.units import NS_PER_S
from ...planner.parallel.period.moves import AT_ONCE, BACKGROUND, LAYER_BY_LAYER
from ...sim.parallel.traffic import Topology
from .reason import reason
from .routes import IntArray
from .work import Experts

WAYS = (AT_ONCE, LAYER_BY_LAYER, BACKGROUND)
PIECE_BYTES = 16 * 1024
"""From a rank to another in one piece of a background move: a link is a queue, and what is sent first goes first."""
FETCH_EXPERT, FETCH_FROM, FETCH_FROM_SLOT, FETCH_TO, FETCH_TO_SLOT, FETCH_FIELDS = range(6)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Move:
    """Where to, how and when."""

    way: str
    physical_to_logical: IntArray
    """[layers, slots] afterwards."""
    slots: tuple[IntArray, ...]
    """Of each step [tokens, layers, top_k]: the copies that the router picks afterwards."""
    begin: int
    """The round before which it begins."""


def fetches(before: IntArray, after: IntArray, topology: Topology) -> list[IntArray]:
    """Return, for every layer, int64 [slots, FETCH_FIELDS]: what comes into each slot and from where, by receiver and slot."""
    each, per_node = topology.slots_per_rank, topology.ranks_per_node
    sends = np.zeros((topology.num_ranks, 2), np.int64)  # between nodes, inside
    found = []
    for old, new in zip(before, after, strict=True):
        rows = []
        for slot, expert in enumerate(new.tolist()):
            to = slot // each
            holders = np.flatnonzero(old == expert)
            ranks = holders // each
            far = (ranks // per_node != to // per_node).astype(np.int64)
            far[ranks == to] = -1
            busy = sends[ranks, np.where(far > 0, 0, 1)]
            best = int(np.lexsort((ranks, busy, far))[0])
            source = int(ranks[best])
            if source != to:
                sends[source, 0 if far[best] > 0 else 1] += 1
            rows.append((expert, source, int(holders[best]) % each, to, slot % each))
        found.append(np.array(rows, np.int64).reshape(-1, FETCH_FIELDS))
    return found


def moved_slots(fetched: IntArray, topology: Topology) -> IntArray:
    """Return int64 [from rank, to rank]: slots that travel in one layer."""
    found = np.zeros((topology.num_ranks, topology.num_ranks), np.int64)
    np.add.at(found, (fetched[:, FETCH_FROM], fetched[:, FETCH_TO]), 1)
    np.fill_diagonal(found, 0)
    return found


class Moving:
    """A rank's part of a move, while it is under way."""

    def __init__(
        self, move: Move, before: IntArray, topology: Topology, rank: int, old: Experts, new: Experts,
        group: dist.ProcessGroup | None, limit_bytes_per_s: float,
    ) -> None:  # fmt: skip
        self.move, self.new = move, new
        self._old, self._rank, self._topology, self._group = old, rank, topology, group
        self._fetches = fetches(before, move.physical_to_logical, topology)
        self._limit = limit_bytes_per_s
        self.usable = 0
        """Layers, from the first, that every rank holds under the new placement."""
        self._done = 0
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.spans: list[tuple[int, int, int]] = []
        """(layers there afterwards, began, ended) of every piece that moved, on this rank's clock."""

    @property
    def num_layers(self) -> int:
        """Layers that move."""
        return len(self._fetches)

    def before_step(self, number: int) -> None:
        """Move what is due before a step of round `number`, or agree on what has moved meanwhile; all ranks call it."""
        if number < self.move.begin or self.usable == self.num_layers:
            return
        if self.move.way == BACKGROUND:
            if self._thread is None:
                self._thread = threading.Thread(target=self._all_beside, name="moeplan moving", daemon=True)
                self._thread.start()
            self._agree()
            return
        count = self.num_layers if self.move.way == AT_ONCE else 1
        for _ in range(count):
            self._one()
        self.usable = self._done

    def finish(self) -> None:
        """Return when everything has moved; raises RuntimeError where a transfer failed."""
        if self._thread is not None:
            self._thread.join()
            self._agree()

    def _agree(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"moving weights: {reason(self._failure)}")
        there = torch.tensor([self._done])
        dist.all_reduce(there, op=dist.ReduceOp.MIN)
        self.usable = int(there)

    def _all_beside(self) -> None:
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                while self._done < self.num_layers:
                    self._one()
        except BaseException as error:  # noqa: BLE001 - the other thread raises it
            self._failure = error

    def _one(self) -> None:
        """Move the next layer."""
        layer, ranks = self._done, self._topology.num_ranks
        began = time.perf_counter_ns()
        fetched = self._fetches[layer]
        mine = fetched[fetched[:, FETCH_TO] == self._rank]
        leaving = fetched[(fetched[:, FETCH_FROM] == self._rank) & (fetched[:, FETCH_TO] != self._rank)]
        for row in mine[mine[:, FETCH_FROM] == self._rank].tolist():
            self.new.slot(layer, row[FETCH_TO_SLOT]).copy_(self._old.slot(layer, row[FETCH_FROM_SLOT]))
        coming = mine[mine[:, FETCH_FROM] != self._rank]
        coming = coming[np.lexsort((coming[:, FETCH_TO_SLOT], coming[:, FETCH_FROM]))]
        leaving = leaving[np.lexsort((leaving[:, FETCH_TO_SLOT], leaving[:, FETCH_TO]))]
        each = self._old.slot_bytes
        packed = torch.empty(len(leaving) * each, dtype=torch.uint8)
        for at, row in enumerate(leaving.tolist()):
            packed[at * each : (at + 1) * each] = self._old.slot(layer, row[FETCH_FROM_SLOT])
        found = torch.empty(len(coming) * each, dtype=torch.uint8)
        to = np.bincount(leaving[:, FETCH_TO], minlength=ranks) * each
        came = np.bincount(coming[:, FETCH_FROM], minlength=ranks) * each
        if self.move.way == BACKGROUND:
            most = int(moved_slots(fetched, self._topology).max()) * each
            for first in range(0, most, PIECE_BYTES):
                self._piece(found, packed, came, to, first)
        else:
            dist.all_to_all_single(found, packed, came.tolist(), to.tolist(), group=self._group)
            self._wait(to.tolist(), began)
        for at, row in enumerate(coming.tolist()):
            self.new.slot(layer, row[FETCH_TO_SLOT]).copy_(found[at * each : (at + 1) * each])
        self._done += 1
        self.spans.append((self._done, began, time.perf_counter_ns()))

    def _piece(self, found: torch.Tensor, packed: torch.Tensor, came: IntArray, to: IntArray, first: int) -> None:
        """Exchange the bytes from `first` on of what goes between each two ranks."""
        began = time.perf_counter_ns()
        sizes = [np.clip(whole - first, 0, PIECE_BYTES) for whole in (came, to)]
        starts = [np.cumsum(whole) - whole + first for whole in (came, to)]
        (into, there), (out, here) = zip(sizes, starts, strict=True)
        piece = torch.cat([packed[at : at + size] for at, size in zip(here.tolist(), out.tolist(), strict=True)])
        landed = torch.empty(int(into.sum()), dtype=torch.uint8)
        dist.all_to_all_single(landed, piece, into.tolist(), out.tolist(), group=self._group)
        self._wait(out.tolist(), began)
        done = 0
        for at, size in zip(there.tolist(), into.tolist(), strict=True):
            found[at : at + size] = landed[done : done + size]
            done += size

    def _wait(self, sent: list[int], began_ns: int) -> None:
        """Return no sooner than the in-process limiter lets what goes to other nodes through."""
        if self._limit:
            per_node = self._topology.ranks_per_node
            away = sum(size for to, size in enumerate(sent) if to // per_node != self._rank // per_node)
            time.sleep(max(0.0, began_ns + away / self._limit * NS_PER_S - time.perf_counter_ns()) / NS_PER_S)
