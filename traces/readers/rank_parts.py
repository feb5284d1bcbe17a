"""Telling a rank's part of a count from a count of everything.

Modelled: engines that count where tokens arrive see, on each rank, only the slots that rank holds: a block of equally
many slots each, rank by rank. Adding all ranks up gives the truth; one that is missing would leave its experts without
tokens, so it is named and the files are refused. Ignored: ranks that hold unequal blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from .account import Account, layer_ranges

# A router that uses part of the slots only by chance: so improbable, with uniform choices, that it is a rank's part.
_CHANCE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCounts:
    """What one rank counted."""

    name: str
    """File."""
    rank: int | None
    slots: npt.NDArray[np.int64]
    """int64 [num_layers, num_slots]: logical expert of each slot."""
    passes: dict[int, npt.NDArray[np.int64]]
    """Forward pass → int64 [num_layers, num_slots], tokens of each slot."""

    def same_as(self, other: RankCounts) -> bool:
        """Return whether another rank counted the very same tokens."""
        return (
            self.passes.keys() == other.passes.keys()
            and bool(self.passes)
            and np.array_equal(self.slots, other.slots)
            and all(np.array_equal(counts, other.passes[number]) for number, counts in self.passes.items())
        )

    def used(self) -> npt.NDArray[np.bool_]:
        """Return [num_slots]: whether any token came to a slot in any layer."""
        found = np.zeros(self.slots.shape[1], bool)
        for counts in self.passes.values():
            found |= counts.any(axis=0)
        return found

    def choices(self) -> int:
        """Return how many choices were counted."""
        return int(sum(int(counts.sum()) for counts in self.passes.values()))


def check_all_ranks(ranks: Sequence[RankCounts], account: Account) -> None:
    """Return nothing when the files count every slot; raises InputError when they are parts and one is missing."""
    counted = [(one, one.used()) for one in ranks if one.choices()]
    if not counted or len({len(used) for _, used in counted}) != 1:
        return
    num_slots = len(counted[0][1])
    local = _block(counted, num_slots)
    if local is None:
        return
    parts = num_slots // local
    present = {int(np.flatnonzero(used)[0]) // local for _, used in counted}
    present |= {one.rank % parts for one in ranks if one.rank is not None and not one.choices()}  # it got no token
    missing = sorted(set(range(parts)) - present)
    if not missing:
        account.note(f"each of {parts} ranks counted its own {local} of {num_slots} slots: added up")
        return
    # A full count may miss slots by chance where it is short.
    chance = max(one.choices() * math.log(local / num_slots) for one, _ in counted)
    shown = ", ".join(one.name for one, _ in counted[:3])
    if chance > math.log(_CHANCE):
        account.note(f"only some slots got tokens: if {shown} is one rank's part, give the folder of all ranks")
        return
    slots = layer_ranges(np.flatnonzero(np.logical_or.reduce([used for _, used in counted])).tolist())
    rule = f"counts only slots {slots} of {num_slots}, a rank's part: the others' experts would seem never chosen"
    raise InputError("path", shown, rule, "give the folder with the files of all ranks")


def _block(counted: Sequence[tuple[RankCounts, npt.NDArray[np.bool_]]], num_slots: int) -> int | None:
    """Return the most slots a rank can hold if each file counts one rank's block; None when they do not."""
    spans = [(int(np.flatnonzero(used)[0]), int(np.flatnonzero(used)[-1]), one.rank) for one, used in counted]
    for local in range(num_slots // 2, 0, -1):
        if num_slots % local:
            continue
        inside = all(first // local == last // local for first, last, _ in spans)
        # Where files say their rank, the block is that rank's (of its group, where several groups hold a copy).
        own = all(rank is None or rank % (num_slots // local) == first // local for first, _, rank in spans)
        if inside and own:
            return local
    return None
