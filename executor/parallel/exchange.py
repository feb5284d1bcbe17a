"""One exchange as a rank does it: sizes, then rows with their headers, to the experts; sums on the way back.

    dispatch  sizes (all_to_all_single) · rows: payload, slots, weights (all_to_all_single)
    combine   one sum for every row that came, back to where it came from (all_to_all_single)

Modelled: a stage goes to all ranks, to the ranks with the same place in other nodes, or to those of the same node; a
hierarchical exchange has one of each, and the rank where rows land in between passes them on, and adds up what comes back.
Payload is counted by the rank it goes to, beside what headers and sizes take. Ignored: when a stage is done (`rank`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from ...base.units import NS_PER_S
from ...sim.parallel.program import INTER, INTRA
from ...sim.parallel.runnable import WIRE
from ...sim.parallel.traffic import Topology
from .job import BOTH
from .routes import IntArray, Split, split

_SLOT_BYTES, _WEIGHT_BYTES, _SIZE_BYTES = 4, 4, 8
REDUCED = torch.bfloat16
"""What all-reduces carry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """Whom a stage goes to: the process group, its ranks in order, and which of them each slot belongs to."""

    group: dist.ProcessGroup | None
    ranks: tuple[int, ...]
    unit_of_slot: IntArray


Groups = dict[int, dist.ProcessGroup | None]
"""The process group of each tier that a rank is in; None stands for all ranks."""


MOVES = BOTH + 1
"""The group of a job's transfers of weights, among a rank's groups."""


def make_groups(num_ranks: int, ranks_per_node: int, rank: int) -> Groups:
    """Return a rank's groups. Every rank makes all groups, in one order."""
    mine: Groups = {BOTH: None}
    for tier, groups in (
        (INTER, [range(seat, num_ranks, ranks_per_node) for seat in range(ranks_per_node)]),
        (INTRA, [range(first, first + ranks_per_node) for first in range(0, num_ranks, ranks_per_node)]),
    ):
        for members in groups:
            group = dist.new_group(list(members))
            if rank in members:
                mine[tier] = group
    return mine


def make_peers(topology: Topology, rank: int, groups: Groups) -> dict[int, Peers]:
    """Return the peers of each tier, BOTH for an exchange of one stage."""
    slot_rank = np.arange(topology.num_slots) // topology.slots_per_rank
    ranks_per_node = topology.ranks_per_node
    first = rank // ranks_per_node * ranks_per_node
    # Rows that come to a node need ranks of this node only.
    return {
        BOTH: Peers(group=groups[BOTH], ranks=tuple(range(topology.num_ranks)), unit_of_slot=slot_rank),
        INTER: Peers(group=groups[INTER], ranks=tuple(range(rank % ranks_per_node, topology.num_ranks, ranks_per_node)),
                     unit_of_slot=slot_rank // ranks_per_node),
        INTRA: Peers(group=groups[INTRA], ranks=tuple(range(first, first + ranks_per_node)), unit_of_slot=slot_rank - first),
    }  # fmt: skip


@dataclass(slots=True)
class Counted:
    """Bytes sent, [ranks] by receiver: of payload, and of headers and sizes."""

    payload: IntArray
    other: IntArray


@dataclass(slots=True)
class Passage:
    """A stage that a dispatch went through, kept for the way back."""

    peers: Peers
    sent: Split
    came: list[int]
    """Rows from each peer."""
    num_rows: int
    """Rows there were before the stage."""


@dataclass(slots=True)
class Rows:
    """Rows with their headers at one rank, and how they came there."""

    payload: torch.Tensor
    """[rows, H], as they travel."""
    slots: IntArray
    """[rows, top_k]; -1 for none."""
    weights: torch.Tensor
    """float32 [rows, top_k]."""
    passages: list[Passage] = field(default_factory=list)


class Network:
    """A rank's view of the others: does stages and counts them."""

    def __init__(
        self, topology: Topology, rank: int, dispatch: float, combine: float, limit_bytes_per_s: float
    ) -> None:
        self._topology, self._rank = topology, rank
        self.forth, self.back = (getattr(torch, WIRE[each]) for each in (dispatch, combine))
        self._limit = limit_bytes_per_s

    def dispatch(self, rows: Rows, peers: Peers, every_choice: bool) -> tuple[Rows, Counted]:
        """Return the rows that came from `peers`, in place of those that went there."""
        sent = split(rows.slots, peers.unit_of_slot, len(peers.ranks), every_choice=every_choice)
        at = torch.from_numpy(sent.rows)
        top_k, hidden = rows.slots.shape[1], rows.payload.shape[1]
        payload = as_bytes(rows.payload.index_select(0, at))
        header = as_bytes(torch.from_numpy(sent.slots.astype(np.int32)))
        packed = torch.cat([payload, header, as_bytes(rows.weights.index_select(0, at))], dim=1)
        sizes, theirs = torch.from_numpy(sent.counts.astype(np.int64)), torch.empty(len(peers.ranks), dtype=torch.int64)
        began = time.perf_counter_ns()
        dist.all_to_all_single(theirs, sizes, group=peers.group)
        came = theirs.tolist()
        found = torch.empty((sum(came), packed.shape[1]), dtype=torch.uint8)
        dist.all_to_all_single(found, packed, came, sent.counts.tolist(), group=peers.group)
        counted = self._counted(
            peers, sent.counts, payload.shape[1], top_k * (_SLOT_BYTES + _WEIGHT_BYTES), _SIZE_BYTES
        )
        self._wait(counted, began)
        wide, header_bytes = hidden * self.forth.itemsize, top_k * _SLOT_BYTES
        slots = from_bytes(found[:, wide : wide + header_bytes], torch.int32).numpy().astype(np.int64)
        passage = Passage(peers=peers, sent=sent, came=came, num_rows=len(rows.slots))
        return Rows(
            payload=from_bytes(found[:, :wide], self.forth), slots=slots,
            weights=from_bytes(found[:, wide + header_bytes :], torch.float32), passages=[*rows.passages, passage],
        ), counted  # fmt: skip

    def combine(self, sums: torch.Tensor, passage: Passage) -> tuple[torch.Tensor, Counted]:
        """Return float32 [rows before the stage, H]: the sums of what came back; sums: float32 [rows that came, H]."""
        counts = passage.sent.counts.tolist()
        packed = as_bytes(sums.to(self.back))
        found = torch.empty((sum(counts), packed.shape[1]), dtype=torch.uint8)
        began = time.perf_counter_ns()
        dist.all_to_all_single(found, packed, counts, passage.came, group=passage.peers.group)
        counted = self._counted(passage.peers, np.array(passage.came, np.int64), packed.shape[1], 0, 0)
        self._wait(counted, began)
        answers = torch.zeros((passage.num_rows, sums.shape[1]), dtype=torch.float32)
        answers.index_add_(0, torch.from_numpy(passage.sent.rows), from_bytes(found, self.back).float())
        return answers, counted

    def reduce(self, values: torch.Tensor, peers: Peers) -> None:
        """Put the sums over `peers` in place of values: [n], the same on each of them."""
        began = time.perf_counter_ns()
        dist.all_reduce(values, group=peers.group)
        moved = np.zeros(self._topology.num_ranks, np.int64)
        after = peers.ranks[(peers.ranks.index(self._rank) + 1) % len(peers.ranks)]
        moved[after] = reduced_bytes(values.numel(), len(peers.ranks))
        self._wait(Counted(moved, np.zeros_like(moved)), began)

    def _counted(self, peers: Peers, rows: IntArray, payload: int, header: int, size: int) -> Counted:
        found = Counted(np.zeros(self._topology.num_ranks, np.int64), np.zeros(self._topology.num_ranks, np.int64))
        for peer, count in zip(peers.ranks, rows.tolist(), strict=True):
            if peer != self._rank:
                found.payload[peer] = count * payload
                found.other[peer] = count * header + size
        return found

    def _wait(self, counted: Counted, began_ns: int) -> None:
        """Return no sooner than the in-process limiter lets this rank's bytes to other nodes through."""
        if not self._limit:
            return
        node = np.arange(self._topology.num_ranks) // self._topology.ranks_per_node
        away = node != self._rank // self._topology.ranks_per_node
        num_bytes = int((counted.payload + counted.other)[away].sum())
        until = began_ns + num_bytes / self._limit * NS_PER_S
        time.sleep(max(0.0, until - time.perf_counter_ns()) / NS_PER_S)


def reduced_bytes(size: int, ranks: int) -> int:
    """Return the bytes that each of some ranks sends to the next one to add up `size` values: round a ring, twice but for its own part."""
    return 2 * (ranks - 1) * size * REDUCED.itemsize // ranks


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    """Return rows of values as rows of bytes, uint8 [rows, bytes]; torch views no empty tensor so."""
    if not len(values):
        return torch.empty((0, values.shape[1] * values.element_size()), dtype=torch.uint8)
    return values.contiguous().view(torch.uint8)


def from_bytes(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return rows of bytes as rows of values."""
    if not len(rows):
        return torch.empty((0, rows.shape[1] // dtype.itemsize), dtype=dtype)
    return rows.contiguous().view(dtype)
