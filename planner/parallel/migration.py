"""What it costs to move experts from one placement to another, and when that pays back.

Modelled: every rank fetches the weights it does not hold yet, from its own node where a neighbour holds them, otherwise over
the network; the engine stands still until the last rank is done. Ignored: moving in the background between steps (which
hides the stall and costs bandwidth instead), and gathering the counts that a new placement is made from.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from ...sim.parallel.tiers import EpConstants
from ..placement.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One move."""

    num_bytes: int
    """Fetched by all ranks together."""
    num_experts: int
    """(Layer, expert) weights fetched by all ranks together."""
    stall_s: float
    """The slowest rank's fetching."""
    saved_s_per_step: float
    """What a step gains; below zero where the move makes it slower."""
    steps_to_pay_back: int | None
    """Steps after which the stall is won back; None where it never is."""

    def to_dict(self) -> dict[str, object]:
        """Return the figures as plain values."""
        return asdict(self)


def migration(before: Placement, after: Placement, *, expert_bytes: int, constants: EpConstants, before_s: float,
              after_s: float) -> Migration:  # fmt: skip
    """Return the cost of coming from one placement to another whose steps take `before_s` and `after_s`."""
    inter, intra = np.zeros(after.num_ranks, np.int64), np.zeros(after.num_ranks, np.int64)
    ranks_per_node = after.ranks_per_node
    for layer in range(after.num_layers):
        had = [set(part.tolist()) for part in before.physical_to_logical[layer].reshape(before.num_ranks, -1)]
        near = [
            set().union(*had[first : first + ranks_per_node]) for first in range(0, before.num_ranks, ranks_per_node)
        ]
        for rank, part in enumerate(after.physical_to_logical[layer].reshape(after.num_ranks, -1)):
            for expert in set(part.tolist()) - had[rank]:
                if expert in near[rank // ranks_per_node]:
                    intra[rank] += 1
                else:
                    inter[rank] += 1
    seconds = intra * expert_bytes / constants.intra.bytes_per_s
    if inter.any():
        seconds = np.maximum(seconds, inter * expert_bytes / (constants.inter or constants.intra).bytes_per_s)
    stall, saved = float(seconds.max()), before_s - after_s
    moved = int(inter.sum() + intra.sum())
    pays = saved > 0
    return Migration(num_bytes=moved * expert_bytes, num_experts=moved, stall_s=stall, saved_s_per_step=saved,
                     steps_to_pay_back=(math.ceil(stall / saved) if moved else 0) if pays else None)  # fmt: skip
