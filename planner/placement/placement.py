"""The noun of this room: which logical expert every slot of every rank holds, layer by layer.

Modelled: a rectangle of slots. Rank r owns slots [r·P/ranks, (r+1)·P/ranks), the layout that engines load; nodes hold equally
many ranks. An expert in several slots is replicated, each copy on a rank of its own: engines look an expert up by rank, and a
second copy there shifts what they find in other slots. Ignored: which replica a token takes (`replica_choice`), and placements
whose ranks hold different numbers of experts (fill them up with copies of what they lack).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError

IntArray = npt.NDArray[np.integer]


def check_topology(num_logical: int, num_slots: int, num_ranks: int, num_nodes: int) -> None:
    """Raise InputError unless `num_slots` slots of `num_logical` experts form a rectangle over ranks and nodes, in which no rank
    needs an expert twice.
    """
    for name, count in (("num_logical", num_logical), ("num_ranks", num_ranks), ("num_nodes", num_nodes)):
        if count < 1:
            raise InputError(name, count, "must be at least 1", "give a positive count")
    if num_ranks % num_nodes:
        raise InputError(
            "num_nodes",
            num_nodes,
            f"{num_ranks} ranks do not divide into equal nodes",
            "give every node the same number of ranks",
        )
    if num_ranks > num_logical:
        raise InputError(
            "num_ranks",
            num_ranks,
            f"more ranks than the {num_logical} experts of a layer",
            f"use at most {num_logical} ranks",
        )
    if num_slots < num_logical:
        raise InputError(
            "num_slots",
            num_slots,
            f"fewer slots than the {num_logical} experts of a layer",
            f"give at least {num_logical} slots",
        )
    if num_slots % num_ranks:
        raise InputError(
            "num_slots",
            num_slots,
            f"not divisible by {num_ranks} ranks",
            f"use {-(-num_slots // num_ranks) * num_ranks - num_logical} redundant slots instead of {num_slots - num_logical}",
        )
    if num_slots > num_ranks * num_logical:
        raise InputError(
            "num_slots",
            num_slots,
            f"a rank of {num_slots // num_ranks} slots would hold some of the {num_logical} experts twice",
            f"use at most {(num_ranks - 1) * num_logical} redundant slots",
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """Physical to logical experts, `[num_layers, num_slots]`, over ranks and nodes.

    Raises InputError when slots, ranks and nodes form no rectangle, an id is out of range, a layer lacks an expert, or a rank
    holds one twice.
    """

    physical_to_logical: npt.NDArray[np.int32]
    """int32 [num_layers, num_slots]: the logical expert in every slot; read-only."""
    num_logical: int
    """Experts of one layer of the model."""
    num_ranks: int
    """Devices; rank r owns slots [r·P/ranks, (r+1)·P/ranks)."""
    num_nodes: int = 1
    """Nodes; node n owns ranks [n·ranks/nodes, (n+1)·ranks/nodes)."""

    def __post_init__(self) -> None:
        given = np.asarray(self.physical_to_logical)
        if given.ndim != 2 or given.shape[0] == 0 or given.dtype.kind not in "iu":
            raise InputError(
                "physical_to_logical",
                f"{given.dtype} array of shape {given.shape}",
                "must be whole numbers [num_layers, num_slots]",
                "give one row of expert ids per MoE layer",
            )
        check_topology(self.num_logical, given.shape[1], self.num_ranks, self.num_nodes)
        outside = np.argwhere((given < 0) | (given >= self.num_logical))
        if len(outside):
            layer, slot = outside[0]
            raise InputError(
                f"physical_to_logical[{layer}][{slot}]",
                int(given[layer, slot]),
                f"expert ids are 0 to {self.num_logical - 1}",
                "check that the placement was made for this model",
            )
        owned = np.array(given, dtype=np.int32, order="C")
        owned.setflags(write=False)
        object.__setattr__(self, "physical_to_logical", owned)
        absent = np.argwhere(self.replica_counts() == 0)
        if len(absent):
            layer, expert = absent[0]
            raise InputError(
                f"physical_to_logical[{layer}]", f"no slot of expert {expert}", "every expert needs a slot", "add it"
            )
        ordered = np.sort(owned.reshape(len(owned), self.num_ranks, -1), axis=2)
        twice = np.argwhere(ordered[:, :, 1:] == ordered[:, :, :-1])
        if len(twice):
            layer, rank, place = twice[0]
            raise InputError(
                f"physical_to_logical[{layer}]", f"expert {ordered[layer, rank, place]} twice on rank {rank}",
                "a rank holds an expert once", "put the copy on another rank, or plan again",
            )  # fmt: skip

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.physical_to_logical.shape[0])

    @property
    def num_slots(self) -> int:
        """Slots of one layer over all ranks."""
        return int(self.physical_to_logical.shape[1])

    @property
    def num_redundant(self) -> int:
        """Slots of one layer beyond one per expert."""
        return self.num_slots - self.num_logical

    @property
    def slots_per_rank(self) -> int:
        """Slots of one layer on every rank."""
        return self.num_slots // self.num_ranks

    @property
    def ranks_per_node(self) -> int:
        """Ranks of every node."""
        return self.num_ranks // self.num_nodes

    def slot_rank(self) -> npt.NDArray[np.int32]:
        """Return the rank of every slot, int32 [num_slots]."""
        return (np.arange(self.num_slots) // self.slots_per_rank).astype(np.int32)

    def rank_node(self) -> npt.NDArray[np.int32]:
        """Return the node of every rank, int32 [num_ranks]."""
        return (np.arange(self.num_ranks) // self.ranks_per_node).astype(np.int32)

    def replica_counts(self) -> npt.NDArray[np.int32]:
        """Return how many slots hold each expert, int32 [num_layers, num_logical]."""
        keys = self.physical_to_logical + np.arange(self.num_layers)[:, None] * self.num_logical
        counts = np.bincount(keys.ravel(), minlength=self.num_layers * self.num_logical)
        return counts.reshape(self.num_layers, self.num_logical).astype(np.int32)

    def logical_to_physical(self, layer: int) -> list[list[int]]:
        """Return the slots of every expert of a layer, ascending."""
        slots: list[list[int]] = [[] for _ in range(self.num_logical)]
        for slot, expert in enumerate(self.physical_to_logical[layer].tolist()):
            slots[expert].append(slot)
        return slots

    def replica_lists(self, layer: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return `(start, slots)`: expert e of a layer is in `slots[start[e]:start[e + 1]]`, ascending.

        Shapes: start int64 [num_logical + 1], slots int64 [num_slots].
        """
        row = self.physical_to_logical[layer]
        slots = np.argsort(row, kind="stable").astype(np.int64)
        start = np.searchsorted(row[slots], np.arange(self.num_logical + 1)).astype(np.int64)
        return start, slots

    def same_as(self, other: Placement) -> bool:
        """Return whether both describe the same experts in the same slots of the same topology."""
        mine = (self.num_logical, self.num_ranks, self.num_nodes)
        theirs = (other.num_logical, other.num_ranks, other.num_nodes)
        return mine == theirs and np.array_equal(self.physical_to_logical, other.physical_to_logical)


def contiguous(num_layers: int, num_logical: int, num_slots: int, num_ranks: int, num_nodes: int = 1) -> Placement:
    """Return the placement engines start from: slot i holds expert i mod num_logical in every layer.

    Raises InputError when slots, ranks and nodes form no rectangle.
    """
    check_topology(num_logical, num_slots, num_ranks, num_nodes)
    return _same_in_every_layer(num_layers, np.arange(num_slots) % num_logical, num_logical, num_ranks, num_nodes)


def round_robin(num_layers: int, num_logical: int, num_slots: int, num_ranks: int, num_nodes: int = 1) -> Placement:
    """Return experts dealt to ranks like cards: rank r gets experts r, r + ranks, r + 2·ranks …, then copies likewise.

    Where a rank would get what it holds, it gets the next expert that it lacks, of those with fewest copies. Raises InputError when slots,
    ranks and nodes form no rectangle.
    """
    check_topology(num_logical, num_slots, num_ranks, num_nodes)
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    copies = [0] * num_logical
    for card in range(num_slots):
        _deal(held[card % num_ranks], copies, card % num_logical)
    return _same_in_every_layer(num_layers, np.array(held).reshape(-1), num_logical, num_ranks, num_nodes)


def _deal(held: list[int], copies: list[int], first: int) -> None:
    """Add to `held` an expert that is not there, of those with fewest copies, the first from expert `first` on."""
    lacking = set(range(len(copies))).difference(held)
    expert = min(lacking, key=lambda each: (copies[each], (each - first) % len(copies)))
    held.append(expert)
    copies[expert] += 1


def from_rank_lists(
    layers: Sequence[Sequence[Sequence[int]]], num_logical: int, num_nodes: int = 1, num_slots: int = 0
) -> Placement:
    """Return a placement from `layers[l][r]`, the experts of each rank first, then copies of experts that a short rank lacks.

    Engines need equally many slots on every rank. The copies are of experts that have fewest. With `num_slots` ranks are filled
    up to that many. Raises InputError for an empty rank, too few slots, or more than there are experts to fill.
    """
    num_ranks = len(layers[0])
    widest = max(len(rank) for layer in layers for rank in layer)
    if min(len(rank) for layer in layers for rank in layer) == 0:
        raise InputError("rank lists", "an empty rank", "every rank holds at least one expert", "use fewer ranks")
    per_rank = max(widest, num_slots // num_ranks)
    if num_slots and num_slots < widest * num_ranks:
        raise InputError(
            "num_slots", num_slots, f"the widest rank holds {widest} experts", f"use {widest * num_ranks} slots"
        )
    check_topology(num_logical, per_rank * num_ranks, num_ranks, num_nodes)
    rows = []
    for layer in layers:
        held, copies = [list(rank) for rank in layer], [0] * num_logical
        for expert in (expert for rank in held for expert in rank):
            copies[expert] += 1
        for rank in held:
            while len(rank) < per_rank:
                _deal(rank, copies, 0)
        rows.append([expert for rank in held for expert in rank])
    return Placement(
        physical_to_logical=np.array(rows, dtype=np.int32),
        num_logical=num_logical,
        num_ranks=num_ranks,
        num_nodes=num_nodes,
    )


def _same_in_every_layer(
    num_layers: int, row: npt.NDArray[np.integer], num_logical: int, num_ranks: int, num_nodes: int
) -> Placement:
    table = np.broadcast_to(row.astype(np.int32), (num_layers, len(row)))
    return Placement(physical_to_logical=table, num_logical=num_logical, num_ranks=num_ranks, num_nodes=num_nodes)
