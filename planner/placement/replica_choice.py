"""Which copy of an expert each token takes, decided while the model runs: three routers over one placement.

Modelled: *static*, a table per (layer, expert, source rank) by the rule SGLang uses: a copy on the same GPU, else on the same
node, else shares as fair as they come; *weighted random*, each choice drawn by a counter-based hash, optionally nearest tier
first; *capped*, locality first with a load cap: experts without copies are placed first, then every other choice takes the
copy that adds least traffic to its token among ranks below the cap, and never crosses to a further node only because
nearer ranks are full (a row more on a rank costs less than a token more on the slow link). Ignored: the cost of deciding
and of sharing the counts between ranks. All are pure functions of their arguments.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from ...base.jit import jit
from .counter_hash import hash_fraction
from .placement import Placement
from .traffic import check_range

IntArray = npt.NDArray[np.integer]
SlotArray = npt.NDArray[np.int64]

SGLANG_SEED = 42  # srt/eplb/expert_location.py, compute_logical_to_rank_dispatch_physical_map


class ReplicaChoice(Protocol):
    """A run-time router."""

    def slots(
        self, experts: IntArray, source_rank: IntArray, placement: Placement, layer: int, step: int = 0
    ) -> SlotArray:
        """Return the slot of every choice, int64 [tokens, top_k], for `experts: [tokens, top_k]` from `source_rank: [tokens]`."""
        ...  # pragma: no cover


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StaticChoice:
    """Every source rank always sends an expert's tokens to the same copy."""

    table: npt.NDArray[np.int32]
    """int32 [num_layers, num_logical, num_ranks]: the slot that tokens of a source rank take."""

    def slots(
        self, experts: IntArray, source_rank: IntArray, placement: Placement, layer: int, step: int = 0
    ) -> SlotArray:
        """Return the slot of every choice; raises InputError when the table names a slot of another expert."""
        experts, source_rank = _checked(experts, source_rank, placement)
        held = placement.physical_to_logical[layer][self.table[layer]]
        wrong = np.argwhere(held != np.arange(placement.num_logical)[:, None])
        if len(wrong):
            expert, rank = wrong[0]
            raise InputError(
                f"table[{layer}][{expert}][{rank}]",
                int(self.table[layer, expert, rank]),
                f"that slot does not hold expert {expert}",
                "make the table from the same placement",
            )
        chosen: SlotArray = self.table[layer].astype(np.int64)[experts, source_rank[:, None]]
        return chosen


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightedChoice:
    """Each choice is drawn at random among the copies, in proportion to weights, reproducibly."""

    seed: int = 0
    """Seed of the counter-based hash."""
    nearest_first: bool = False
    """Draw only among copies on the same rank, else only on the same node, else anywhere."""
    slot_weight: npt.NDArray[np.float64] | None = None
    """float64 [num_layers, num_slots], or None for equal weights; a slot of weight 0 is never drawn unless its expert
    has no other."""

    def slots(
        self, experts: IntArray, source_rank: IntArray, placement: Placement, layer: int, step: int = 0
    ) -> SlotArray:
        """Return the slot of every choice."""
        experts, source_rank = _checked(experts, source_rank, placement)
        start, copies = placement.replica_lists(layer)
        weight = (
            np.ones(placement.num_slots) if self.slot_weight is None else self.slot_weight[layer].astype(np.float64)
        )
        if weight.shape != (placement.num_slots,) or not np.isfinite(weight).all() or (weight < 0).any():
            raise InputError(
                "slot_weight", weight.shape, "must be finite, not negative, one per slot", "use the placement's own"
            )
        chosen = np.empty(experts.shape, dtype=np.int64)
        layer_step = step * placement.num_layers + layer
        shape = (placement.slots_per_rank, placement.ranks_per_node)
        _draw(experts, source_rank, start, copies, weight, self.nearest_first, *shape, self.seed, layer_step, chosen)
        return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class CappedChoice:
    """Locality first, avoiding ranks that already have `load_cap` times their fair share of the step.

    In order of preference: a rank the token visits anyway, its own rank, its own node, a node it visits anyway; then the
    same although full; then another node. Ties go to the rank with fewer rows, then to the lower slot.
    """

    load_cap: float = 1.0
    """Rows a rank may reach through choices among copies, as a multiple of the mean rows per rank."""

    def slots(
        self, experts: IntArray, source_rank: IntArray, placement: Placement, layer: int, step: int = 0
    ) -> SlotArray:
        """Return the slot of every choice; raises InputError for a cap that is not positive."""
        experts, source_rank = _checked(experts, source_rank, placement)
        if not np.isfinite(self.load_cap) or self.load_cap <= 0:
            raise InputError("load_cap", self.load_cap, "must be positive", "1.0 means the mean")
        start, copies = placement.replica_lists(layer)
        chosen = np.empty(experts.shape, dtype=np.int64)
        shape = (placement.slots_per_rank, placement.ranks_per_node, placement.num_ranks)
        _cap(experts, source_rank, start, copies, self.load_cap, *shape, chosen)
        return chosen


def nearest_table(placement: Placement, seed: int = SGLANG_SEED) -> npt.NDArray[np.int32]:
    """Return SGLang's static dispatch, int32 [num_layers, num_logical, num_ranks]: slot per expert and source rank.

    A copy on the same rank, else the first on the same node; the ranks left over share the copies as evenly as possible
    in an order shuffled by one generator that runs through layers and experts (formats: SGLang `expert_location.py`).
    """
    generator = random.Random(seed)
    ranks, ranks_per_node, width = placement.num_ranks, placement.ranks_per_node, placement.slots_per_rank
    # An expert's first slot, which all ranks use of one without copies: nothing is drawn for those.
    order = np.argsort(placement.physical_to_logical, axis=1, kind="stable")
    copied = placement.replica_counts()
    first = np.take_along_axis(order, np.cumsum(copied, axis=1) - copied, axis=1)
    table = np.repeat(first[:, :, None], ranks, axis=2).astype(np.int32)
    for layer, expert in np.argwhere(copied > 1).tolist():
        copies = np.flatnonzero(placement.physical_to_logical[layer] == expert).tolist()
        left_over = []
        for rank in range(ranks):
            near = [slot for slot in copies if slot // width == rank]
            near = near or [slot for slot in copies if slot // (width * ranks_per_node) == rank // ranks_per_node]
            if near:
                table[layer, expert, rank] = near[0]
            else:
                left_over.append(rank)
        rounds, rest = divmod(len(left_over), len(copies))
        shares = copies * rounds + generator.sample(copies, k=rest)
        generator.shuffle(shares)
        table[layer, expert, left_over] = shares
    return table


def _checked(experts: IntArray, source_rank: IntArray, placement: Placement) -> tuple[SlotArray, SlotArray]:
    """Return both arrays as int64; raises InputError for ids or shapes that do not belong to the placement."""
    experts, source_rank = np.asarray(experts), np.asarray(source_rank)
    if experts.ndim != 2 or source_rank.shape != experts.shape[:1]:
        raise InputError(
            "experts",
            f"shapes {experts.shape} and {source_rank.shape}",
            "must be [tokens, top_k] and [tokens]",
            "pass one layer",
        )
    check_range("experts", experts, placement.num_logical)
    check_range("source_rank", source_rank, placement.num_ranks)
    return experts.astype(np.int64), source_rank.astype(np.int64)


@jit
def _draw(
    experts: SlotArray,
    source_rank: SlotArray,
    start: SlotArray,
    copies: SlotArray,
    weight: npt.NDArray[np.float64],
    nearest_first: bool,
    slots_per_rank: int,
    ranks_per_node: int,
    seed: int,
    layer_step: int,
    chosen: SlotArray,
) -> None:
    """Draw a copy for every choice, in proportion to weight, among the nearest tier (0 rank, 1 node, 2 all) or all."""
    num_tokens, top_k = experts.shape
    for token in range(num_tokens):
        source = source_rank[token]
        for choice in range(top_k):
            expert = experts[token, choice]
            first, last = start[expert], start[expert + 1]
            chosen[token, choice] = copies[first]
            if last - first == 1:
                continue
            for tier in range(0 if nearest_first else 2, 3):
                total = 0.0
                for place in range(first, last):
                    if _tier(copies[place] // slots_per_rank, source, ranks_per_node) <= tier:
                        total += weight[copies[place]]
                if total == 0.0:
                    continue
                left = total * hash_fraction(seed, layer_step, token, choice)
                for place in range(first, last):
                    slot = copies[place]
                    if weight[slot] > 0.0 and _tier(slot // slots_per_rank, source, ranks_per_node) <= tier:
                        chosen[token, choice] = slot
                        left -= weight[slot]
                        if left < 0.0:
                            break
                break


@jit
def _tier(rank: int, source: int, ranks_per_node: int) -> int:
    """Return 0 for the source rank itself, 1 for its node, 2 for any other node."""
    if rank == source:
        return 0
    return 1 if rank // ranks_per_node == source // ranks_per_node else 2


@jit
def _cap(
    experts: SlotArray,
    source_rank: SlotArray,
    start: SlotArray,
    copies: SlotArray,
    load_cap: float,
    slots_per_rank: int,
    ranks_per_node: int,
    num_ranks: int,
    chosen: SlotArray,
) -> None:
    """Choose copies token by token; see `CappedChoice`."""
    num_tokens, top_k = experts.shape
    full = load_cap * num_tokens * top_k / num_ranks
    rows = np.zeros(num_ranks, dtype=np.int64)
    for token in range(num_tokens):
        for choice in range(top_k):
            expert = experts[token, choice]
            slot = copies[start[expert]]
            chosen[token, choice] = slot
            if start[expert + 1] - start[expert] == 1:
                rows[slot // slots_per_rank] += 1
    seen_rank = np.full(num_ranks, -1, dtype=np.int64)
    seen_node = np.full(num_ranks // ranks_per_node, -1, dtype=np.int64)
    for token in range(num_tokens):
        source = source_rank[token]
        for choice in range(top_k):
            expert = experts[token, choice]
            if start[expert + 1] - start[expert] == 1:
                rank = chosen[token, choice] // slots_per_rank
                seen_rank[rank] = token
                seen_node[rank // ranks_per_node] = token
        for choice in range(top_k):
            expert = experts[token, choice]
            first, last = start[expert], start[expert + 1]
            if last - first == 1:
                continue
            best_slot, best_extra, best_rows = copies[first], 99, np.int64(0)
            for place in range(first, last):
                slot = copies[place]
                rank = slot // slots_per_rank
                # What this copy adds to the token's traffic; a full rank comes last among those that need no new node.
                near = rank // ranks_per_node == source // ranks_per_node or seen_node[rank // ranks_per_node] == token
                if rows[rank] >= full:
                    extra = 4 if near else 6
                elif seen_rank[rank] == token:
                    extra = 0
                elif rank == source:
                    extra = 1
                elif rank // ranks_per_node == source // ranks_per_node:
                    extra = 2
                elif near:
                    extra = 3
                else:
                    extra = 5
                if extra < best_extra or (extra == best_extra and rows[rank] < best_rows):
                    best_slot, best_extra, best_rows = slot, extra, rows[rank]
            chosen[token, choice] = best_slot
            rank = best_slot // slots_per_rank
            rows[rank] += 1
            seen_rank[rank] = token
            seen_node[rank // ranks_per_node] = token
