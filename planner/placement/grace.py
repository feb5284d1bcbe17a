"""GRACE-MoE: group experts by affinity, let group sizes differ a little, copy what overloads one rank, route near first.

Modelled, from arXiv 2509.25041: (1) spectral clusters of co-activation become nodes (sizes free) and, inside a node, ranks with
controlled sizes; (2) the ratio r that controls them is the knee of size deviation against affinity used; (3) the heaviest
rank's hottest experts are copied to the least loaded ranks; (4) loads after copying are predicted and choices drawn in
inverse proportion, nearest tier first. One line is corrected: the replicated load Wr is shared by its n + 1 instances, so
each carries W'p = Wr / (n + 1) (the paper prints Wmax / (n + 1), its wording means this). Where the paper leaves a choice
open: E is taken per node, because node sizes are free, and a node has at least as many experts as ranks. Ignored: the
paper's overlap of routing with communication. Ranks end up with different numbers of experts; the rest of the slots hold copies
that its router leaves alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from .affinity import affinity_within, co_activation, sized_groups, spectral_clusters
from .placement import Placement, check_topology, from_rank_lists
from .replica_choice import WeightedChoice
from .splits import StepTokens, expert_load

Counts = npt.NDArray[np.integer]

RATIOS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
"""Candidates for r; the paper finds 0.15 for OLMoE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replication:
    """Which experts of which rank are copied where."""

    source: int
    """The heaviest rank."""
    experts: tuple[int, ...]
    """Its experts that are copied, hottest first."""
    targets: tuple[int, ...]
    """The ranks that get one copy of each, least loaded first; empty when nothing is copied."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GracePlan:
    """GRACE's placement and what its router needs."""

    placement: Placement
    """Slots; every rank has as many as the widest one, copies of what it lacks in the rest."""
    slot_weight: npt.NDArray[np.float64]
    """float64 [num_layers, num_slots]: 1 / predicted rank load; 0 for the rest."""
    ratios: tuple[float, ...]
    """The ratio r of each layer."""
    predicted_load: npt.NDArray[np.float64]
    """float64 [num_layers, num_ranks]: rank loads predicted after replication."""
    num_instances: tuple[int, ...]
    """Experts plus copies of each layer, the rest left out: what the memory would need at least."""

    def router(self, seed: int = 0, *, nearest_first: bool = True) -> WeightedChoice:
        """Return GRACE's own run-time router: same rank, else same node, else anywhere; weighted inside a tier.

        nearest_first: False is the paper's weighted round-robin, which looks at predicted loads alone.
        """
        return WeightedChoice(seed=seed, nearest_first=nearest_first, slot_weight=self.slot_weight)


def grace_plan(
    steps: Sequence[StepTokens],
    num_logical: int,
    num_ranks: int,
    num_nodes: int,
    ratio: float | None = None,
    seed: int = 0,
    *,
    copies: int | None = None,
) -> GracePlan:
    """Return GRACE's plan for the tokens of `steps`; `ratio` None chooses each layer's knee.

    copies: of what overloads the heaviest rank, the same in every layer (the paper's fixed replication has 1); None: as its load asks for.

    Raises InputError for topologies that are not rectangular and tokens that do not match `num_logical`.
    """
    check_topology(num_logical, -(-num_logical // num_ranks) * num_ranks, num_ranks, num_nodes)
    load = expert_load(steps, num_logical)
    layers, ratios, predicted, instances = [], [], [], []
    for layer in range(len(load)):
        affinity = co_activation(steps, layer, num_logical)
        nodes = node_groups(affinity, num_nodes, num_ranks // num_nodes, seed)
        chosen = knee_ratio(affinity, nodes, num_ranks // num_nodes, seed) if ratio is None else ratio
        groups = rank_groups(affinity, nodes, num_ranks // num_nodes, chosen, seed)
        copied = replicate(groups, load[layer], copies)
        layers.append(
            [group + (list(copied.experts) if rank in copied.targets else []) for rank, group in enumerate(groups)]
        )
        ratios.append(chosen)
        predicted.append(predict_load(groups, load[layer], copied))
        instances.append(sum(len(held) for held in layers[-1]))
    placement = from_rank_lists(layers, num_logical, num_nodes)
    weight = np.zeros((len(layers), num_ranks, placement.slots_per_rank))
    for layer, held in enumerate(layers):
        for rank, experts in enumerate(held):
            # A rank predicted idle is infinitely attractive; a floor of one token keeps the weight finite.
            weight[layer, rank, : len(experts)] = 1 / max(predicted[layer][rank], 1.0)
    return GracePlan(
        placement=placement,
        slot_weight=weight.reshape(len(layers), -1),
        ratios=tuple(ratios),
        predicted_load=np.stack(predicted),
        num_instances=tuple(instances),
    )


def node_groups(affinity: Counts, num_nodes: int, ranks_per_node: int, seed: int = 0) -> list[list[int]]:
    """Return the experts of each node, sizes free but at least `ranks_per_node`, members ascending.

    A node too small for its ranks takes, one by one, the expert of the largest node that has most affinity to it.
    """
    groups = [list(group) for group in spectral_clusters(affinity, num_nodes, seed)]
    while True:
        needy = min(range(num_nodes), key=lambda node: (len(groups[node]), node))
        if len(groups[needy]) >= ranks_per_node:
            return [sorted(group) for group in groups]
        donor = max(range(num_nodes), key=lambda node: (len(groups[node]), -node))
        moved = max(groups[donor], key=lambda e: (int(affinity[e, groups[needy]].sum()), -e))
        groups[donor].remove(moved)
        groups[needy].append(moved)


def rank_groups(
    affinity: Counts,
    nodes: Sequence[Sequence[int]],
    ranks_per_node: int,
    ratio: float,
    seed: int = 0,
    clusters: Sequence[Sequence[Sequence[int]]] | None = None,
) -> list[list[int]]:
    """Return the experts of every rank, node by node, with sizes E ± max(1, round(E·ratio)) where E = ⌊node's experts / ranks⌋.

    clusters: the spectral ones of every node (`node_clusters`), where they are at hand; the ratio does not change them. Raises
    InputError for a ratio that is negative or not finite.
    """
    if not math.isfinite(ratio) or ratio < 0:
        raise InputError("ratio", ratio, "must be finite and not negative", "the paper uses 0.15")
    groups = []
    for node, experts in enumerate(nodes):
        even = len(experts) // ranks_per_node
        slack = max(1, round(even * ratio))
        inside = affinity[np.ix_(experts, experts)]
        known = None if clusters is None else clusters[node]
        for group in sized_groups(inside, ranks_per_node, max(1, even - slack), even + slack, seed, known):
            groups.append([experts[place] for place in group])
    return groups


def node_clusters(
    affinity: Counts, nodes: Sequence[Sequence[int]], ranks_per_node: int, seed: int = 0
) -> list[list[list[int]]]:
    """Return the spectral clusters inside every node, one for each of its ranks, as places among the node's experts."""
    return [spectral_clusters(affinity[np.ix_(experts, experts)], ranks_per_node, seed) for experts in nodes]


def knee_ratio(affinity: Counts, nodes: Sequence[Sequence[int]], ranks_per_node: int, seed: int = 0) -> float:
    """Return the candidate ratio at the knee of (size deviation, affinity used).

    Both are scaled to 0 … 1 over the candidates; the knee is the point farthest above the line from the least to the most
    deviation. Ties, and curves without a knee, go to the smallest ratio.
    """
    deviation, used = [], []
    clusters = node_clusters(affinity, nodes, ranks_per_node, seed)
    for ratio in RATIOS:
        groups = rank_groups(affinity, nodes, ranks_per_node, ratio, seed, clusters)
        deviation.append(float(np.std([len(group) for group in groups])))
        used.append(affinity_within(affinity, groups))
    low, high = int(np.argmin(deviation)), int(np.argmax(deviation))
    span, rise = deviation[high] - deviation[low], max(used) - min(used)
    if span == 0 or rise == 0:
        return RATIOS[0]
    slope = (used[high] - used[low]) / span
    above = [(u - used[low] - slope * (d - deviation[low])) / rise for d, u in zip(deviation, used, strict=True)]
    # The ends of the line are zero up to rounding: a curve that never rises above it has no knee.
    return next(r for r, a in zip(RATIOS, above, strict=True) if a >= max(above) - 1e-9)


def replicate(groups: Sequence[Sequence[int]], load: Counts, copies: int | None = None) -> Replication:
    """Return what to copy given `groups[rank]` and `load: [num_logical]`.

    n = min(max(1, ⌊Wmax / mean⌋), ranks − 1); the smallest prefix of the heaviest rank's experts, by load, that reaches
    Wmax·n/(n+1) goes to the n least loaded ranks. Nothing is copied on a single rank or without load. copies: n, where it is given.
    """
    weights = [int(load[list(group)].sum()) for group in groups]
    heaviest = max(range(len(groups)), key=lambda rank: (weights[rank], -rank))
    peak, total = weights[heaviest], sum(weights)
    if len(groups) == 1 or total == 0:
        return Replication(source=heaviest, experts=(), targets=())
    # ⌊Wmax / mean⌋ in whole numbers.
    copies = min(max(1, peak * len(groups) // total if copies is None else copies), len(groups) - 1)
    experts: list[int] = []
    for expert in sorted(groups[heaviest], key=lambda e: (-int(load[e]), e)):
        if sum(int(load[e]) for e in experts) * (copies + 1) >= peak * copies:
            break
        experts.append(expert)
    others = sorted((rank for rank in range(len(groups)) if rank != heaviest), key=lambda rank: (weights[rank], rank))
    return Replication(source=heaviest, experts=tuple(experts), targets=tuple(others[:copies]))


def predict_load(groups: Sequence[Sequence[int]], load: Counts, copied: Replication) -> npt.NDArray[np.float64]:
    """Return the load of every rank after copying, float64 [num_ranks]: the copied load is shared by all its instances."""
    predicted = np.array([float(load[list(group)].sum()) for group in groups])
    if copied.targets:
        moved = float(load[list(copied.experts)].sum())
        share = moved / (len(copied.targets) + 1)
        predicted[copied.source] += share - moved
        predicted[list(copied.targets)] += share
    return predicted
