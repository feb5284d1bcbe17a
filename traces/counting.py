"""The counting loops behind the statistics, compiled: each adds one chunk of rows to running totals.

Modelled: integer counts only, so that totals do not depend on how a recording was cut into chunks. Letters in the
docstrings: T tokens of the chunk, L layers, K choices per token, E experts. Ignored: anything that needs floating
point.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..base.jit import jit


@jit
def add_loads(experts: npt.NDArray[np.unsignedinteger], loads: npt.NDArray[np.int64]) -> None:
    """Add the tokens of each expert to `loads` [L, E]; experts: [T, L, K]."""
    num_tokens, num_layers, top_k = experts.shape
    for t in range(num_tokens):
        for layer in range(num_layers):
            for j in range(top_k):
                loads[layer, experts[t, layer, j]] += 1


@jit
def add_co_occurrence(experts: npt.NDArray[np.unsignedinteger], pairs: npt.NDArray[np.uint32]) -> None:
    """Add to `pairs` [L − 1, E, E] the tokens that use expert a in a layer and expert b in the next.

    Experts: [T, L, K].
    """
    num_tokens, _, top_k = experts.shape
    for layer in range(pairs.shape[0]):
        for t in range(num_tokens):
            for i in range(top_k):
                for j in range(top_k):
                    pairs[layer, experts[t, layer, i], experts[t, layer + 1, j]] += 1


@jit
def add_overlaps(
    experts: npt.NDArray[np.unsignedinteger],
    request: npt.NDArray[np.int32],
    position: npt.NDArray[np.int32],
    first: int,
    distances: npt.NDArray[np.int64],
    shared: npt.NDArray[np.int64],
    compared: npt.NDArray[np.int64],
) -> None:
    """Add the experts that rows first, first + 1, … share with rows some distance before them.

    experts: [T, L, K]; request, position: [T]; distances: [D] in tokens; shared: [D, L], experts in common;
    compared: [D], pairs of rows compared, which are those of one request with no position missing between them.
    """
    num_tokens, num_layers, top_k = experts.shape
    num_distances = len(distances)
    mark = np.full(1 << 16, -1, np.int64)  # the last (token, layer) that chose an expert
    back = np.empty(num_distances, np.int64)
    for t in range(first, num_tokens):
        for d in range(num_distances):
            row = t - distances[d]
            back[d] = row
            if row < 0 or request[row] != request[t] or position[t] - position[row] != distances[d]:
                back[d] = -1
            else:
                compared[d] += 1
        for layer in range(num_layers):
            here = t * num_layers + layer
            for j in range(top_k):
                mark[experts[t, layer, j]] = here
            for d in range(num_distances):
                if back[d] >= 0:
                    for j in range(top_k):
                        shared[d, layer] += mark[experts[back[d], layer, j]] == here


@jit
def affinity_hits(
    experts: npt.NDArray[np.unsignedinteger], pairs: npt.NDArray[np.uint32], hits: npt.NDArray[np.int64]
) -> None:
    """Add to `hits` [2] the experts of each next layer that are among the top K and 2 K by co-occurrence.

    experts: [T, L, K]; pairs: [L − 1, E, E]. An expert's score is the sum of its co-occurrences with the token's
    experts in the layer before; equal scores rank by lower id.
    """
    num_tokens, _, top_k = experts.shape
    num_experts = pairs.shape[2]
    score = np.zeros(num_experts, dtype=np.int64)
    for layer in range(pairs.shape[0]):
        for t in range(num_tokens):
            score[:] = 0
            for i in range(top_k):
                row = pairs[layer, experts[t, layer, i]]
                for other in range(num_experts):
                    score[other] += row[other]
            for j in range(top_k):
                chosen = experts[t, layer + 1, j]
                mine = score[chosen]
                rank = 0
                for other in range(num_experts):
                    rank += score[other] > mine or (score[other] == mine and other < chosen)
                hits[0] += rank < top_k
                hits[1] += rank < 2 * top_k


@jit
def add_guess_hits(
    experts: npt.NDArray[np.unsignedinteger], predicted: npt.NDArray[np.int16], hits: npt.NDArray[np.int64]
) -> None:
    """Add to `hits` [D, W] the early guesses, by distance and rank, that name an expert the token really used.

    experts: [T, L, K]; predicted: [T, L, D, W], −1 for none.
    """
    num_tokens, num_layers, top_k = experts.shape
    for t in range(num_tokens):
        for layer in range(num_layers):
            for d in range(predicted.shape[2]):
                for w in range(predicted.shape[3]):
                    for j in range(top_k):
                        hits[d, w] += predicted[t, layer, d, w] == experts[t, layer, j]
