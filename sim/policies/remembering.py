"""What the run itself teaches: which experts follow which, and which earlier request the current one resembles.

Modelled: `affinity` counts, layer by layer, how often an expert's visit was followed by another's at the next step, and
values a cached expert by how often it followed those its layer chose last. `activation` keeps the token counts of earlier
requests, finds the one whose counts point in the direction nearest to the current request's (cosine), and values an expert by
its share of that request's tokens, early layers more than late ones, as MoE-Infinity does (arXiv 2401.14361, activation
ratio times one minus the layer's share of the depth). Ignored: forgetting; the library replaces its oldest request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...base.jit import jit_inner
from .state import (
    ACTIVATION, AFFINITY, LIBRARY, LIBRARY_NEXT, LIBRARY_SIZE, MATCHED, MERIT, REQUEST, TOUCHED,
    PolicyConfig, PolicyState,
)  # fmt: skip

if TYPE_CHECKING:
    from .steps import Steps


@jit_inner
def remember_request(config: PolicyConfig, state: PolicyState) -> None:
    """Put the request that has just ended into the library and start a new one."""
    requests, count = state.requests, state.count
    used = 0
    for key in range(requests.shape[1]):
        used += requests[REQUEST, key]
    if used > 0:
        place = count[LIBRARY_NEXT]
        for key in range(requests.shape[1]):
            requests[LIBRARY + place, key] = requests[REQUEST, key]
            requests[REQUEST, key] = 0
        count[LIBRARY_NEXT] = (place + 1) % config.library
        count[LIBRARY_SIZE] = min(count[LIBRARY_SIZE] + 1, config.library)


@jit_inner
def match_request(config: PolicyConfig, state: PolicyState) -> None:
    """Find the remembered request most like the current one, so far; with none used yet, the latest one."""
    keys, requests, count = state.keys, state.requests, state.count
    best, best_score = -1, -1.0
    size = count[LIBRARY_SIZE]
    for back in range(size):
        place = (count[LIBRARY_NEXT] - 1 - back) % config.library
        both, mine = 0, 0
        for key in range(requests.shape[1]):
            both += requests[REQUEST, key] * requests[LIBRARY + place, key]
            mine += requests[LIBRARY + place, key] * requests[LIBRARY + place, key]
        # The square of the cosine, apart from the current request's own length, which is the same for all.
        score = float(both) * float(both) / float(mine)
        if score > best_score:
            best, best_score = place, score
    if best < 0:
        return
    layers, experts = config.num_layers, config.num_experts
    for key in range(requests.shape[1]):
        requests[MATCHED, key] = requests[LIBRARY + best, key]
    if config.policy == ACTIVATION:
        for layer in range(layers):
            total = 0
            for key in range(layer * experts, (layer + 1) * experts):
                total += requests[MATCHED, key]
            for key in range(layer * experts, (layer + 1) * experts):
                # Whole parts of 2**32; one token more than counted, so that unused experts keep their layers' order.
                share = (requests[MATCHED, key] + 1) * 4294967296 // (total + experts)
                keys[MERIT, key] = share * (layers - layer) // layers


@jit_inner
def learn_visit(
    config: PolicyConfig, steps: Steps, state: PolicyState, visit: int, layer: int, low: int, high: int
) -> None:
    """Count what followed what and who was used; must be called before the visit's experts are marked as touched."""
    keys, followers, requests = state.keys, state.followers, state.requests
    experts = config.num_experts
    base = layer * experts
    if config.library:
        for index in range(low, high):
            requests[REQUEST, base + steps.visit_expert[index]] += steps.visit_tokens[index]
    if config.policy == AFFINITY:
        for expert in range(experts):
            keys[MERIT, base + expert] = 0
        for before in range(experts):
            if keys[TOUCHED, base + before] == visit - config.num_layers and visit >= config.num_layers:
                for index in range(low, high):
                    followers[layer, before, steps.visit_expert[index]] += 1
        for index in range(low, high):
            for expert in range(experts):
                keys[MERIT, base + expert] += followers[layer, steps.visit_expert[index], expert]
