"""METRO: in memory-bound decode, balance how many experts a rank activates, not how many tokens it computes.

Modelled, after arXiv 2512.09277: a small decode step reads the weights of every expert it activates, so a rank's time is its
number of activated copies. All tokens of an expert therefore go to one copy, and the copy is chosen so that the rank with
most activated experts has as few as possible: a greedy pass (fewest choices first, to the rank with fewest so far),
improved along chains of experts that can move on until no chain shortens the fullest rank, which makes it optimal.
Copies are placed by how often an expert is active at all. Ignored: token counts (ties only) and traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from .eplb import rebalance
from .placement import Placement
from .replica_choice import IntArray, SlotArray
from .splits import StepTokens
from .traffic import check_range


@dataclass(frozen=True, slots=True, kw_only=True)
class FewestActiveChoice:
    """Run-time router: one copy per active expert and step, chosen to level activated experts per rank."""

    def slots(
        self, experts: IntArray, source_rank: IntArray, placement: Placement, layer: int, step: int = 0
    ) -> SlotArray:
        """Return the slot of every choice, int64 [tokens, top_k]; raises InputError for ids out of range."""
        experts = np.asarray(experts)
        check_range("experts", experts, placement.num_logical)
        chosen = level_active(np.unique(experts).tolist(), placement, layer)
        table = np.zeros(placement.num_logical, dtype=np.int64)
        for expert, slot in chosen.items():
            table[expert] = slot
        return table[experts]


def level_active(active: Sequence[int], placement: Placement, layer: int) -> dict[int, int]:
    """Return the slot each active expert uses, so that the largest number of activated experts on a rank is smallest."""
    copies = placement.logical_to_physical(layer)
    width = placement.slots_per_rank
    options = {expert: {slot // width: slot for slot in reversed(copies[expert])} for expert in active}
    rank_of: dict[int, int] = {}
    count = [0] * placement.num_ranks
    for expert in sorted(active, key=lambda e: (len(options[e]), e)):
        rank = min(options[expert], key=lambda r: (count[r], r))
        rank_of[expert] = rank
        count[rank] += 1
    while _shorten(rank_of, count, options):
        pass
    return {expert: options[expert][rank] for expert, rank in rank_of.items()}


def active_frequency(steps: Sequence[StepTokens], num_logical: int) -> npt.NDArray[np.float64]:
    """Return the share of steps in which each expert is active at all, float64 [num_layers, num_logical].

    Raises InputError without steps or for ids out of range.
    """
    if not steps:
        raise InputError(
            "steps", 0, "at least one step is needed", "cut the recording into steps of the decode batch size"
        )
    active = np.zeros((steps[0].experts.shape[1], num_logical))
    for step in steps:
        check_range("experts", step.experts, num_logical)
        for layer in range(len(active)):
            active[layer, np.unique(step.experts[:, layer])] += 1
    return active / len(steps)


def metro_placement(
    steps: Sequence[StepTokens], num_logical: int, num_slots: int, num_ranks: int, num_nodes: int = 1
) -> Placement:
    """Return a placement that levels the expected number of activated experts: EPLB on activity instead of tokens.

    A copy halves the expected activations a rank answers for, just as it halves tokens. Raises InputError for slots, ranks
    and nodes that form no rectangle.
    """
    return rebalance(active_frequency(steps, num_logical), num_slots, num_ranks, num_nodes)


def _shorten(rank_of: dict[int, int], count: list[int], options: dict[int, dict[int, int]]) -> bool:
    """Move experts along one chain from a fullest rank to a rank with at least two fewer; return whether there was one.

    Breadth first from the lowest fullest rank; repeated until False this is the optimal semi-matching (Harvey et al. 2003).
    """
    peak = max(count, default=0)
    for start in (rank for rank, n in enumerate(count) if n == peak and peak > 0):
        came: dict[int, tuple[int, int]] = {}
        frontier, reached = [start], {start}
        while frontier:
            rank = frontier.pop(0)
            for expert in sorted(e for e, r in rank_of.items() if r == rank):
                for other in sorted(options[expert]):
                    if other in reached:
                        continue
                    reached.add(other)
                    came[other] = (expert, rank)
                    if count[other] + 2 <= peak:
                        while other != start:
                            moved, before = came[other]
                            rank_of[moved] = other
                            count[other] += 1
                            count[before] -= 1
                            other = before
                        return True
                    frontier.append(other)
    return False
