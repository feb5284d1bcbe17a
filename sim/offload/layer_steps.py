"""The compiled loops that turn forward passes into layer steps: which experts each layer of each pass needs.

Modelled: a layer step's experts once each, in order of first use, with their tokens, and again in order of last use; where an
expert is used next. Every loop takes a run of steps, so that a long recording can be worked through piece by piece; layer steps
are counted from the start of the run, of which `first_layer_step` come before. In the docstrings: `starts` [num_steps + 1] and
`tokens` are the steps' tokens as in `workload.Steps`, `experts` the recording. Ignored: which tokens make a pass (`workload`).
"""

from __future__ import annotations

import numpy as np

from ...base.jit import jit
from ..policies.state import Array


@jit
def gather_layer_steps(
    experts: Array, starts: Array, tokens: Array, num_experts: int
) -> tuple[Array, Array, Array, Array, Array]:
    """Return what `workload.Steps` holds of the steps: start, expert, tokens, touch and rank of every layer step."""
    num_steps, num_layers, top_k = starts.shape[0] - 1, experts.shape[1], experts.shape[2]
    start = np.zeros(num_steps * num_layers + 1, np.int64)
    seen = np.full(num_experts, -1, np.int64)
    total = 0
    for step in range(num_steps):
        for layer in range(num_layers):
            layer_step = step * num_layers + layer
            for row in range(starts[step], starts[step + 1]):
                for choice in range(top_k):
                    chosen = experts[tokens[row], layer, choice]
                    if seen[chosen] != layer_step:
                        seen[chosen] = layer_step
                        total += 1
            start[layer_step + 1] = total
    expert = np.zeros(total, np.int16)
    count = np.zeros(total, np.int32)
    touch = np.zeros(total, np.int16)
    rank = np.full(total, 255, np.uint8)
    place = np.zeros(num_experts, np.int64)
    last = np.full(num_experts, -1, np.int64)
    seen[:] = -1
    for step in range(num_steps):
        for layer in range(num_layers):
            layer_step = step * num_layers + layer
            at = start[layer_step]
            for row in range(starts[step], starts[step + 1]):
                for choice in range(top_k):
                    chosen = experts[tokens[row], layer, choice]
                    if seen[chosen] != layer_step:
                        seen[chosen] = layer_step
                        place[chosen] = at
                        expert[at] = chosen
                        at += 1
                    count[place[chosen]] += 1
                    rank[place[chosen]] = min(rank[place[chosen]], choice)
                    last[chosen] = row * top_k + choice
            for index in range(start[layer_step], at):  # insertion sort by last use; sets are small or nearly sorted
                chosen = expert[index]
                slot = index
                while slot > start[layer_step] and last[touch[slot - 1]] > last[chosen]:
                    touch[slot] = touch[slot - 1]
                    slot -= 1
                touch[slot] = chosen
    return start, expert, count, touch, rank


@jit
def count_sizes(experts: Array, starts: Array, tokens: Array, num_experts: int, sizes: Array) -> None:
    """Add to `sizes` [most tokens of a step + 1] how many experts of layer steps get 1, 2, … tokens."""
    num_layers, top_k = experts.shape[1], experts.shape[2]
    count = np.zeros(num_experts, np.int64)
    for step in range(starts.shape[0] - 1):
        low, high = starts[step], starts[step + 1]
        if high - low == 1:
            sizes[1] += num_layers * top_k
            continue
        for layer in range(num_layers):
            count[:] = 0
            for row in range(low, high):
                for choice in range(top_k):
                    count[experts[tokens[row], layer, choice]] += 1
            for expert in range(num_experts):
                if count[expert]:
                    sizes[count[expert]] += 1


@jit
def mark_uses(
    experts: Array, starts: Array, tokens: Array, first_layer_step: int, num_experts: int, upcoming: Array
) -> None:
    """Walk the steps backwards and leave in `upcoming` [num_layers * num_experts] the first layer step that uses each expert.

    Experts that the steps do not use keep what was there: what later steps, already walked, have left.
    """
    num_layers, top_k = experts.shape[1], experts.shape[2]
    for step in range(starts.shape[0] - 2, -1, -1):
        for row in range(starts[step], starts[step + 1]):
            for layer in range(num_layers):
                for choice in range(top_k):
                    key = layer * num_experts + experts[tokens[row], layer, choice]
                    upcoming[key] = first_layer_step + step * num_layers + layer


@jit
def next_uses(
    start: Array, expert: Array, first_layer_step: int, num_layers: int, num_experts: int, upcoming: Array
) -> Array:
    """Return layer_step_next_use [n] of gathered layer steps; `upcoming` holds the first use after them and is overwritten."""
    next_use = np.zeros(expert.shape[0], np.int64)
    for place in range(start.shape[0] - 2, -1, -1):
        base = (place % num_layers) * num_experts
        for index in range(start[place], start[place + 1]):
            next_use[index] = upcoming[base + expert[index]]
        for index in range(start[place], start[place + 1]):
            upcoming[base + expert[index]] = first_layer_step + place
    return next_use
