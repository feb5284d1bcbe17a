"""What the run itself teaches: which experts follow which, and which earlier request the current one resembles.

Modelled: `affinity` counts, layer by layer, how often an expert's visit was followed by another's at the next step, and
values a cached expert by how often it followed those its layer chose last. `activation` keeps the token counts of earlier
requests, finds the one whose counts point in the direction nearest to the current request's (cosine), and values an expert by
its share of that request's tokens, early layers more than late ones, as MoE-Infinity does (arXiv 2401.14361, activation
ratio times one minus the layer's share of the depth). Ignored: forgetting; the library replaces its oldest request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...jit import jit_lean
from .state import ACTIVATION, AFFINITY, LIBRARY_NEXT, LIBRARY_SIZE, PolicyConfig, PolicyState

if TYPE_CHECKING:
    from ..workload import Steps


@jit_lean
def remember_request(config: PolicyConfig, state: PolicyState) -> None:
    """Put the request that has just ended into the library and start a new one."""
    used = 0
    for key in range(state.request.shape[0]):
        used += state.request[key]
    if used > 0:
        place = state.count[LIBRARY_NEXT]
        for key in range(state.request.shape[0]):
            state.library[place, key] = state.request[key]
            state.request[key] = 0
        state.count[LIBRARY_NEXT] = (place + 1) % config.library
        state.count[LIBRARY_SIZE] = min(state.count[LIBRARY_SIZE] + 1, config.library)


@jit_lean
def match_request(config: PolicyConfig, state: PolicyState) -> None:
    """Find the remembered request most like the current one, so far; with none used yet, the latest one."""
    best, best_score = -1, -1.0
    size = state.count[LIBRARY_SIZE]
    for back in range(size):
        place = (state.count[LIBRARY_NEXT] - 1 - back) % config.library
        both, mine = 0, 0
        for key in range(state.request.shape[0]):
            both += state.request[key] * state.library[place, key]
            mine += state.library[place, key] * state.library[place, key]
        # The square of the cosine, apart from the current request's own length, which is the same for all.
        score = float(both) * float(both) / float(mine)
        if score > best_score:
            best, best_score = place, score
    if best < 0:
        return
    layers, experts = config.num_layers, config.num_experts
    for key in range(state.matched.shape[0]):
        state.matched[key] = state.library[best, key]
    if config.policy == ACTIVATION:
        for layer in range(layers):
            total = 0
            for key in range(layer * experts, (layer + 1) * experts):
                total += state.matched[key]
            for key in range(layer * experts, (layer + 1) * experts):
                # Whole parts of 2**32; one token more than counted, so that unused experts keep their layers' order.
                share = (state.matched[key] + 1) * 4294967296 // (total + experts)
                state.merit[key] = share * (layers - layer) // layers


@jit_lean
def learn_visit(
    config: PolicyConfig, steps: Steps, state: PolicyState, visit: int, layer: int, low: int, high: int
) -> None:
    """Count what followed what and who was used; must be called before the visit's experts are marked as touched."""
    experts = config.num_experts
    base = layer * experts
    if config.library:
        for index in range(low, high):
            state.request[base + steps.visit_expert[index]] += steps.visit_tokens[index]
    if config.policy == AFFINITY:
        for expert in range(experts):
            state.merit[base + expert] = 0
        for before in range(experts):
            if state.touched[base + before] == visit - config.num_layers and visit >= config.num_layers:
                for index in range(low, high):
                    state.followers[layer, before, steps.visit_expert[index]] += 1
        for index in range(low, high):
            for expert in range(experts):
                state.merit[base + expert] += state.followers[layer, steps.visit_expert[index], expert]
