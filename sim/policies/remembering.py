"""What the run itself teaches: which experts follow which, and which earlier request the current one resembles.

Modelled: `affinity` counts, layer by layer, how often an expert's layer step was followed by another's at the next step, and
values a cached expert by how often it followed those its layer chose last. `activation` keeps the token counts of earlier
requests, finds the one whose counts point in the direction nearest to the current request's (cosine), and values an expert by
its share of that request's tokens, early layers more than late ones, as MoE-Infinity does (arXiv 2401.14361, activation
ratio times one minus the layer's share of the depth). Ignored: forgetting; the library replaces its oldest request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...base.jit import jit_inner
from .state import (
    ACTIVATION, AFFINITY, PolicyConfig, PolicyState,
)  # fmt: skip

if TYPE_CHECKING:
    from .steps import Steps


@jit_inner
def remember_request(config: PolicyConfig, state: PolicyState) -> None:
    """Put the request that has just ended into the library and start a new one."""
    requests, library, counts = state.requests, state.library, state.counts[0]
    used = 0
    for key in range(requests.shape[0]):
        used += requests[key].current
    if used > 0:
        place = counts.library_next
        for key in range(requests.shape[0]):
            library[place, key] = requests[key].current
            requests[key].current = 0
        counts.library_next = (place + 1) % config.library
        counts.library_size = min(counts.library_size + 1, config.library)


@jit_inner
def match_request(config: PolicyConfig, state: PolicyState) -> None:
    """Find the remembered request most like the current one, so far; with none used yet, the latest one."""
    keys, requests, library, counts = state.keys, state.requests, state.library, state.counts[0]
    best, best_score = -1, -1.0
    size = counts.library_size
    for back in range(size):
        place = (counts.library_next - 1 - back) % config.library
        both, mine = 0, 0
        for key in range(requests.shape[0]):
            both += requests[key].current * library[place, key]
            mine += library[place, key] * library[place, key]
        # The square of the cosine, apart from the current request's own length, which is the same for all.
        score = float(both) * float(both) / float(mine)
        if score > best_score:
            best, best_score = place, score
    if best < 0:
        return
    layers, experts = config.num_layers, config.num_experts
    for key in range(requests.shape[0]):
        requests[key].matched = library[best, key]
    if config.policy == ACTIVATION:
        for layer in range(layers):
            total = 0
            for key in range(layer * experts, (layer + 1) * experts):
                total += requests[key].matched
            for key in range(layer * experts, (layer + 1) * experts):
                # Whole parts of 2**32; one token more than counted, so that unused experts keep their layers' order.
                share = (requests[key].matched + 1) * 4294967296 // (total + experts)
                keys[key].merit = share * (layers - layer) // layers


@jit_inner
def learn_layer_step(
    config: PolicyConfig, steps: Steps, state: PolicyState, layer_step: int, layer: int, low: int, high: int
) -> None:
    """Count what followed what and who was used; must be called before the layer step's experts are marked as touched."""
    keys, followers, requests = state.keys, state.followers, state.requests
    experts = config.num_experts
    base = layer * experts
    if config.library:
        for index in range(low, high):
            requests[base + steps.layer_step_expert[index]].current += steps.layer_step_tokens[index]
    if config.policy == AFFINITY:
        for expert in range(experts):
            keys[base + expert].merit = 0
        for before in range(experts):
            if keys[base + before].touched == layer_step - config.num_layers and layer_step >= config.num_layers:
                for index in range(low, high):
                    followers[layer, before, steps.layer_step_expert[index]] += 1
        for index in range(low, high):
            for expert in range(experts):
                keys[base + expert].merit += followers[layer, steps.layer_step_expert[index], expert]
