"""Who sends how many tokens to whom when one MoE layer runs, and how many rows every rank computes.

Modelled: tokens live on ranks (data-parallel attention); each choice of an expert goes to the slot the replica choice
picked. Counted three ways at once: every choice on its own; a token once per rank; and the two-stage exchange in which a
token crosses once per node, to the rank with the sender's place in its own node, and is forwarded from there once to each
rank that needs it. The combine sends the same tokens back. Ignored: bytes, bandwidth and time (`objective`), and the
reduction order of the combine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError, UnknownName
from ...base.jit import jit
from ...specs.schedules.parallel import ALL_TO_ALLS
from .placement import Placement

CountMatrix = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Traffic:
    """Token counts of one layer and one step; matrices are int64 [from rank, to rank]."""

    choices: CountMatrix
    """Choices of experts, nothing de-duplicated; the diagonal stays on its rank. Columns add up to `rows`."""
    per_rank: CountMatrix
    """Tokens once per destination rank; the diagonal stays on its rank."""
    inter_node: CountMatrix
    """First stage: tokens once per destination node, to the rank with the sender's place in that node."""
    intra_node: CountMatrix
    """Second stage: tokens forwarded inside a node, once per rank; the diagonal (already there) is zero."""
    slot_rows: CountMatrix
    """int64 [num_slots]: rows each slot's expert computes."""
    ranks_per_node: int
    """Ranks of every node; node n owns ranks [n·ranks_per_node, (n+1)·ranks_per_node)."""

    @property
    def rows(self) -> CountMatrix:
        """Rows each rank computes, int64 [num_ranks]."""
        rows: CountMatrix = self.choices.sum(axis=0)
        return rows

    def ports(self, exchange: str = "hierarchical") -> CountMatrix:
        """Return the tokens through every port, int64 [5, num_ranks]: node send, node receive, rank send, rank receive, rows.

        `exchange` by the names of `specs.schedules.parallel.ALL_TO_ALLS`; raises UnknownName for any other.
        """
        if exchange not in ALL_TO_ALLS:
            raise UnknownName("exchange", exchange, ALL_TO_ALLS)
        inter, intra = self.inter_node, self.intra_node
        if exchange != "hierarchical":
            whole = self.choices if exchange == "all-choices" else self.per_rank
            node = np.arange(len(whole)) // self.ranks_per_node
            near = node[:, None] == node[None, :]
            inter = np.where(near, 0, whole)
            intra = np.where(near & ~np.eye(len(whole), dtype=np.bool_), whole, 0)
        return np.stack([inter.sum(axis=1), inter.sum(axis=0), intra.sum(axis=1), intra.sum(axis=0), self.rows])


def count_traffic(
    slots: npt.NDArray[np.integer], source_rank: npt.NDArray[np.integer], placement: Placement
) -> Traffic:
    """Return the traffic of `slots: [tokens, top_k]` (physical experts) for tokens living on `source_rank: [tokens]`.

    Raises InputError when shapes differ or a slot or rank does not exist.
    """
    slots = np.asarray(slots)
    source_rank = np.asarray(source_rank)
    if slots.ndim != 2 or source_rank.shape != slots.shape[:1]:
        raise InputError(
            "slots",
            f"shapes {slots.shape}, {source_rank.shape}",
            "must be [tokens, top_k] and [tokens]",
            "pass one rank per token",
        )
    check_range("slots", slots, placement.num_slots)
    check_range("source_rank", source_rank, placement.num_ranks)
    ranks = placement.num_ranks
    traffic = Traffic(
        choices=np.zeros((ranks, ranks), np.int64),
        per_rank=np.zeros((ranks, ranks), np.int64),
        inter_node=np.zeros((ranks, ranks), np.int64),
        intra_node=np.zeros((ranks, ranks), np.int64),
        slot_rows=np.zeros(placement.num_slots, np.int64),
        ranks_per_node=placement.ranks_per_node,
    )
    _count(
        slots.astype(np.int64),
        source_rank.astype(np.int64),
        placement.slots_per_rank,
        placement.ranks_per_node,
        traffic.choices,
        traffic.per_rank,
        traffic.inter_node,
        traffic.intra_node,
        traffic.slot_rows,
    )
    return traffic


def check_range(field: str, ids: npt.NDArray[np.integer], limit: int) -> None:
    """Raise InputError unless all `ids` are whole numbers 0 … limit − 1."""
    if ids.dtype.kind not in "iu":
        raise InputError(field, str(ids.dtype), "must be whole numbers", "pass an integer array")
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= limit):
        worst = int(ids.max()) if int(ids.max()) >= limit else int(ids.min())
        raise InputError(field, worst, f"ids are 0 to {limit - 1}", "check that trace and placement belong together")


@jit
def _count(
    slots: CountMatrix,
    source_rank: CountMatrix,
    slots_per_rank: int,
    ranks_per_node: int,
    choices: CountMatrix,
    per_rank: CountMatrix,
    inter_node: CountMatrix,
    intra_node: CountMatrix,
    slot_rows: CountMatrix,
) -> None:
    """Add every token of a step to the five counts."""
    num_tokens, top_k = slots.shape
    num_ranks = per_rank.shape[0]
    # The last token that was seen on a rank or node: a mark that needs no clearing.
    seen_rank = np.full(num_ranks, -1, dtype=np.int64)
    seen_node = np.full(num_ranks // ranks_per_node, -1, dtype=np.int64)
    for token in range(num_tokens):
        source = source_rank[token]
        home = source // ranks_per_node
        seat = source % ranks_per_node
        for choice in range(top_k):
            slot = slots[token, choice]
            rank = slot // slots_per_rank
            slot_rows[slot] += 1
            choices[source, rank] += 1
            if seen_rank[rank] == token:
                continue
            seen_rank[rank] = token
            per_rank[source, rank] += 1
            node = rank // ranks_per_node
            gateway = source if node == home else node * ranks_per_node + seat
            if rank != gateway:
                intra_node[gateway, rank] += 1
            if seen_node[node] != token:
                seen_node[node] = token
                if node != home:
                    inter_node[source, gateway] += 1
