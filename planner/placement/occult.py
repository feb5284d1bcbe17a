"""Occult-like placement: experts that are used together share a rank, every rank holds equally many.

Modelled, after arXiv 2505.13345: groups of uniform size that keep as many co-activations as possible inside a rank, first
dividing experts over nodes, then over each node's ranks; refined by exchanging the pair of experts that gains most until
none gains. Spare slots, which Occult does not have, can be filled with copies of the experts with most load per copy. Ignored:
load when grouping, and the paper's kernels and pruning.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .affinity import co_activation, sized_groups
from .placement import Placement, check_topology, from_rank_lists
from .splits import StepTokens, expert_load

Counts = npt.NDArray[np.integer]


def occult_placement(
    steps: Sequence[StepTokens], num_logical: int, num_slots: int, num_ranks: int, num_nodes: int, seed: int = 0
) -> Placement:
    """Return uniform co-activation groups for the tokens of `steps`, spare slots filled by `fill_spare_slots`.

    Raises InputError for slots, ranks and nodes that form no rectangle and tokens that do not match `num_logical`.
    """
    check_topology(num_logical, num_slots, num_ranks, num_nodes)
    load = expert_load(steps, num_logical)
    layers = []
    for layer in range(len(load)):
        groups = occult_groups(co_activation(steps, layer, num_logical), num_nodes, num_ranks // num_nodes, seed)
        layers.append(fill_spare_slots(groups, load[layer], num_slots // num_ranks))
    return from_rank_lists(layers, num_logical, num_nodes, num_slots)


def occult_groups(affinity: Counts, num_nodes: int, ranks_per_node: int, seed: int = 0) -> list[list[int]]:
    """Return the experts of every rank, node by node; sizes differ by at most one per division."""
    groups = []
    for node in uniform_groups(affinity, num_nodes, seed):
        inside = affinity[np.ix_(node, node)]
        groups += [[node[place] for place in group] for group in uniform_groups(inside, ranks_per_node, seed)]
    return groups


def uniform_groups(affinity: Counts, num_groups: int, seed: int = 0) -> list[list[int]]:
    """Return groups of the rows of `affinity: [n, n]` whose sizes differ by at most one, refined by pair exchange.

    The exchange of largest gain in co-activations kept goes first, ties to the lowest pair, until no exchange gains.
    """
    size = len(affinity)
    groups = sized_groups(affinity, num_groups, size // num_groups, -(-size // num_groups), seed)
    label = np.empty(size, dtype=np.int64)
    for place, group in enumerate(groups):
        label[group] = place
    while True:
        member = np.zeros((size, num_groups), dtype=np.int64)
        member[np.arange(size), label] = 1
        pull = affinity @ member  # [expert, group]: co-activations with that group
        own = pull[np.arange(size), label]
        # Exchanging i and j: each gains its pull to the other's group and loses its own; the pair itself stays apart.
        there = pull[:, label]
        gain = there + there.T - own[:, None] - own[None, :] - 2 * affinity
        gain = np.where(label[:, None] == label[None, :], 0, gain)
        best = int(np.argmax(gain))
        if gain.flat[best] <= 0:
            return sorted(np.flatnonzero(label == place).tolist() for place in range(num_groups))
        first, second = divmod(best, size)
        label[first], label[second] = label[second], label[first]


def fill_spare_slots(
    groups: Sequence[Sequence[int]], load: Counts | npt.NDArray[np.float64], slots_per_rank: int
) -> list[list[int]]:
    """Return `groups[rank]` plus copies: the expert with most load per copy goes to the least loaded rank with room.

    A rank never gets a second copy of what it holds; ranks that could only get one stay short. Ties go to the lower index.
    """
    held = [list(group) for group in groups]
    copies = np.zeros(len(load), dtype=np.int64)
    for group in held:
        copies[group] += 1
    while True:
        share = load / copies
        weight = [float(share[group].sum()) for group in held]
        for expert in sorted(range(len(load)), key=lambda e: (-share[e], e)):
            room = [rank for rank, group in enumerate(held) if len(group) < slots_per_rank and expert not in group]
            if room:
                held[min(room, key=lambda rank: (weight[rank], rank))].append(expert)
                copies[expert] += 1
                break
        else:
            return held
