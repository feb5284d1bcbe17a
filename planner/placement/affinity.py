"""Which experts are used together: the co-activation matrix and grouping by spectral clustering.

Modelled: A[i, j] = tokens that chose both i and j in one layer; clusters of the symmetric normalised affinity, found by k-means on
its leading eigenvectors, and cut to given sizes by moving the experts that lose least. k-means is ours so that it is
deterministic: seeding draws from a counter-based hash, ties go to the lower index. Ignored: affinity between layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.linalg

from ...base.errors import InputError
from .counter_hash import hash_fraction
from .splits import StepTokens

FloatArray = npt.NDArray[np.float64]

KMEANS_RESTARTS, KMEANS_ROUNDS = 10, 100
_CHUNK_TOKENS = 1 << 15


def co_activation(steps: Sequence[StepTokens], layer: int, num_logical: int) -> npt.NDArray[np.int64]:
    """Return tokens that chose both experts, int64 [num_logical, num_logical], symmetric with a zero diagonal.

    Raises InputError for expert ids out of range.
    """
    together = np.zeros((num_logical, num_logical), dtype=np.int64)
    for step in steps:
        if step.experts.size and int(step.experts.max()) >= num_logical:
            raise InputError(
                "experts", int(step.experts.max()), f"ids are 0 to {num_logical - 1}", "use the trace of this model"
            )
        for first in range(0, step.num_tokens, _CHUNK_TOKENS):
            chosen = step.experts[first : first + _CHUNK_TOKENS, layer]
            # Exact in float32: no sum exceeds the chunk's tokens, far below 2**24.
            active = np.zeros((len(chosen), num_logical), dtype=np.float32)
            active[np.arange(len(chosen))[:, None], chosen] = 1
            together += (active.T @ active).astype(np.int64)
    np.fill_diagonal(together, 0)
    return together


def spectral_clusters(affinity: npt.NDArray[np.integer], num_clusters: int, seed: int = 0) -> list[list[int]]:
    """Return `num_clusters` non-empty clusters of the rows of `affinity: [n, n]`, sizes free, members ascending.

    Normalised spectral clustering (Ng, Jordan and Weiss 2002): k-means on the row-normalised leading eigenvectors of
    D^-1/2 A D^-1/2. Clusters are ordered by their lowest member. Raises InputError for more clusters than rows.
    """
    size = len(affinity)
    if not 1 <= num_clusters <= size:
        raise InputError("num_clusters", num_clusters, f"between 1 and the {size} experts", "use fewer groups")
    if num_clusters in (1, size):
        return [list(range(size))] if num_clusters == 1 else [[expert] for expert in range(size)]
    weights = affinity.astype(np.float64)
    degree = weights.sum(axis=1)
    # An expert that never fires has no affinity; any positive degree leaves its row at zero.
    scale = 1 / np.sqrt(np.where(degree > 0, degree, 1.0))
    normalised = weights * scale[:, None] * scale[None, :]
    _, vectors = scipy.linalg.eigh(normalised, subset_by_index=[size - num_clusters, size - 1])
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = kmeans(vectors / np.where(length > 0, length, 1.0), num_clusters, seed)
    clusters = [np.flatnonzero(labels == label).tolist() for label in range(num_clusters)]
    return sorted(clusters)


def kmeans(points: FloatArray, num_clusters: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Return the cluster of every row of `points: [n, dimensions]`, int64 [n]; no cluster is empty.

    Best of `KMEANS_RESTARTS` runs of Lloyd's algorithm seeded by k-means++; an emptied cluster takes the point farthest
    from its centre.
    """
    best_spread, best = np.inf, np.zeros(len(points), dtype=np.int64)
    for restart in range(KMEANS_RESTARTS):
        centres = _spread_seeds(points, num_clusters, seed, restart)
        labels = np.full(len(points), -1, dtype=np.int64)
        for _ in range(KMEANS_ROUNDS):
            distance = _square_distance(points, centres)
            fresh = distance.argmin(axis=1)
            own = distance[np.arange(len(points)), fresh]
            for cluster in np.flatnonzero(np.bincount(fresh, minlength=num_clusters) == 0):
                # Only a cluster that keeps a member may give its farthest one away.
                movable = np.bincount(fresh, minlength=num_clusters)[fresh] > 1
                farthest = int(np.argmax(np.where(movable, own, -1.0)))
                fresh[farthest], own[farthest] = cluster, 0.0
            if np.array_equal(fresh, labels):
                break
            labels = fresh
            centres = np.stack([points[labels == cluster].mean(axis=0) for cluster in range(num_clusters)])
        spread = float(_square_distance(points, centres)[np.arange(len(points)), labels].sum())
        if spread < best_spread:
            best_spread, best = spread, labels
    return best


def sized_groups(
    affinity: npt.NDArray[np.integer],
    num_groups: int,
    smallest: int,
    largest: int,
    seed: int = 0,
    clusters: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Return `num_groups` groups of the rows of `affinity: [n, n]` with sizes in [smallest, largest], members ascending.

    From spectral clusters: (1) a cluster keeps its `largest` members of highest affinity to the cluster, the others go to a
    pool; (2) each pooled expert, strongest pull first, joins the group with room it has most affinity to; (3) while a group
    is too small, the largest group that can spare one gives the member it holds weakest relative to the needy group.
    clusters: the spectral ones, where they are at hand; sizes do not change them. Raises InputError when the sizes cannot add up.
    """
    size = len(affinity)
    if not 1 <= smallest <= largest or not num_groups * smallest <= size <= num_groups * largest:
        raise InputError(
            "group size",
            (smallest, largest),
            f"{num_groups} such groups cannot hold {size} experts",
            "widen the allowed sizes",
        )
    groups: list[list[int]] = []
    pool: list[int] = []
    for cluster in spectral_clusters(affinity, num_groups, seed) if clusters is None else clusters:
        pull = affinity[np.ix_(cluster, cluster)].sum(axis=1)
        ranked = [cluster[place] for place in np.argsort(-pull, kind="stable")]
        groups.append(ranked[:largest])
        pool += ranked[largest:]
    while pool:
        room = [place for place, group in enumerate(groups) if len(group) < largest]
        pull = np.array([[affinity[expert, groups[place]].sum() for place in room] for expert in sorted(pool)])
        row, column = np.unravel_index(int(np.argmax(pull)), pull.shape)
        expert = sorted(pool)[row]
        groups[room[column]].append(expert)
        pool.remove(expert)
    while True:
        needy = min(range(num_groups), key=lambda place: (len(groups[place]), place))
        if len(groups[needy]) >= smallest:
            return [sorted(group) for group in groups]
        donor = max(range(num_groups), key=lambda place: (len(groups[place]), -place))
        weakest = min(
            groups[donor],
            key=lambda e: (int(affinity[e, groups[donor]].sum()) - int(affinity[e, groups[needy]].sum()), e),
        )
        groups[donor].remove(weakest)
        groups[needy].append(weakest)


def affinity_within(affinity: npt.NDArray[np.integer], groups: Sequence[Sequence[int]]) -> float:
    """Return the share of all co-activations whose two experts are in one group; 0 where there are none."""
    total = int(affinity.sum())
    return sum(int(affinity[np.ix_(group, group)].sum()) for group in groups) / total if total else 0.0


def _square_distance(points: FloatArray, centres: FloatArray) -> FloatArray:
    """Return squared distances, [n, num_clusters]."""
    distance: FloatArray = ((points[:, None, :] - centres[None, :, :]) ** 2).sum(axis=2)
    return distance


def _spread_seeds(points: FloatArray, num_clusters: int, seed: int, restart: int) -> FloatArray:
    """Return starting centres by k-means++: each drawn with probability proportional to squared distance from the others."""
    chosen = [int(hash_fraction(seed, restart, 0, 0) * len(points))]
    while len(chosen) < num_clusters:
        nearest = _square_distance(points, points[chosen]).min(axis=1)
        reach = nearest.cumsum()
        target = hash_fraction(seed, restart, len(chosen), 0) * reach[-1]
        place = int(np.searchsorted(reach, target, side="right"))
        chosen.append(min(place, len(points) - 1))
    return points[chosen]
