"""One layer step of one MoE layer: what is already there, what must be fetched, what leaves, what is fetched ahead.

`decide_layer_step` is the whole decision. The SimPy model, the compiled simulator and the executor call this very function, so their
hits, misses, bytes and tokens agree exactly. Its order is fixed: look the set up once, before anything is inserted; serve
hits that were used before, then hits that a prefetch brought, then misses, each in recorded order; then fetch ahead.
Ignored: time. A hit may still be on its way; the engines wait for its transfer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...base.jit import jit_inline, jit_inner, jit_lean
from .caching import appraise, clear_cache, release, touch, unlink
from .misses import send_misses_to_cores
from .moves import (
    await_block,
    drop_transients,
    fetch_ahead,
    fetch_misses,
    fetch_rest_of_layer,
    promote,
    seat_staged_hits,
)
from .prefetching import rank_guesses
from .remembering import learn_layer_step, match_request, remember_request
from .state import (
    ABSENT, AFFINITY, CACHED, GUESS_NONE, MISS_FETCH, NONE, STAGED, STATIC,
    Decision, PolicyConfig, PolicyState,
)  # fmt: skip

if TYPE_CHECKING:
    from .steps import Steps


@jit_lean
def begin_step(config: PolicyConfig, steps: Steps, state: PolicyState, step: int) -> None:
    """Empty the cache where the step starts a request and the schedule resets it; look up what the request resembles."""
    if steps.step_reset[step]:
        clear_cache(config, state)
    if config.library:
        if steps.step_first[step]:
            remember_request(config, state)
        match_request(config, state)


@jit_lean
def cancel_prefetch(
    config: PolicyConfig, steps: Steps, state: PolicyState, step: int, layer: int, key: int, transfer: int
) -> bool:
    """Drop a prefetch whose copy has not begun, if it was made for this layer step and the layer step does not use it."""
    keys, slots, staged, counts = state.keys, state.slots, state.staged, state.counts[0]
    place = step * config.num_layers + layer
    if keys[key].transfer != transfer or keys[key].used or keys[key].target > steps.first_layer_step + place:
        return False
    for index in range(steps.layer_step_start[place], steps.layer_step_start[place + 1]):
        if layer * config.num_experts + steps.layer_step_expert[index] == key:
            return False
    if keys[key].where == ABSENT:
        return False
    if keys[key].slot >= 0:
        slots[keys[key].slot].pending = -1
    if keys[key].where == CACHED:
        release(config, state, key)
    elif keys[key].where == STAGED:
        staged[slots[keys[key].slot].buffer].key = -1
        keys[key].slot = -1
    else:
        unlink(state, key)
        counts.transient_now -= 1
    keys[key].where = ABSENT
    counts.prefetches -= 1
    counts.low_fetches -= keys[key].format
    counts.cancelled += 1
    return True


@jit_lean
def decide_layer_step(
    config: PolicyConfig, steps: Steps, state: PolicyState, out: Decision, step: int, layer: int
) -> None:
    """Write into `out` what happens at this layer step, and advance `state`. Layer steps must be decided in order."""
    keys, prices, counts, size = state.keys, state.prices, state.counts[0], out.size[0]
    place = step * config.num_layers + layer
    layer_step = steps.first_layer_step + place
    size.items = size.kernels = size.moves = size.backs = size.promoted = size.cores = 0
    size.first_transfer = counts.next_transfer
    size.first_kernel = counts.next_kernel
    size.first_back = counts.next_writeback
    low, high = steps.layer_step_start[place], steps.layer_step_start[place + 1]
    base = layer * config.num_experts
    if (
        config.benefit or config.scored
    ):  # since the last layer step the link has worked off what fits beside one layer step's compute
        counts.backlog_ns = max(0, counts.backlog_ns - prices[0].layer_step_ns)
    if config.library or config.policy == AFFINITY:
        learn_layer_step(config, steps, state, layer_step, layer, low, high)
    if config.low_rank >= 0:
        _drop_coarse_copies(config, steps, state, base, low, high)
    kernels = _list_hits(config, steps, state, out, layer_step, base, low, high)
    num_hits = int(size.items)
    # Misses are listed before anything is inserted: a hit that a large set pushes out again is still a hit.
    if num_hits < high - low:
        _list_misses(config, steps, state, out, base, low, high, kernels)
    tokens = steps.step_start[step + 1] - steps.step_start[step]
    if config.miss != MISS_FETCH and not 0 < config.upload_tokens <= tokens:
        on_cores = send_misses_to_cores(config, state, out, base, num_hits)
        counts.misses += on_cores
        counts.cpu_runs += on_cores
    # The layer step's own experts are marked before any victim is sought: none may go while the pool has room for all. A static
    # cache and none at all seek no victim.
    chooses = config.policy != STATIC and config.policy != NONE
    if chooses:
        for index in range(low, high):
            key = base + steps.layer_step_expert[index]
            keys[key].frequency += steps.layer_step_tokens[index]
            keys[key].stay_tokens += steps.layer_step_tokens[index]
            appraise(config, state, key, layer_step)
            keys[key].touched = layer_step
            if config.future:
                keys[key].next_use = steps.layer_step_next_use[index]
    _use_hits(config, state, out, base, num_hits)
    if config.policy == NONE:
        await_block(config, state, out, layer)
    seat_staged_hits(config, state, out, layer_step, base, num_hits)
    kernels = fetch_misses(config, state, out, layer_step, base, num_hits, kernels)
    if config.fetch_layer:
        fetch_rest_of_layer(config, state, out, layer_step, base)
    if chooses:
        for index in range(low, high):
            touch(config, state, base + steps.layer_step_touch[index])
    size.kernels = kernels
    counts.next_kernel += kernels
    if config.predictor != GUESS_NONE:
        for distance in range(1, min(config.depth, config.num_layers - 1 - layer) + 1):
            guesses = rank_guesses(config, steps, state, step, layer + distance, distance)
            fetch_ahead(config, state, out, layer_step, distance, base + distance * config.num_experts, guesses)
    if config.policy == NONE:
        drop_transients(config, state, layer)


@jit_inline
def _add_item(out: Decision, expert: int, tokens: int, kernel: int, transfer: int, wait_key: int, fmt: int) -> None:
    items, size = out.items, out.size[0]
    at = size.items
    items[at].expert = expert
    items[at].tokens = tokens
    items[at].kernel = kernel
    items[at].transfer = transfer
    items[at].key = wait_key
    items[at].format = fmt
    size.items = at + 1


@jit_inline
def _list_hits(config: PolicyConfig, steps: Steps, state: PolicyState, out: Decision, layer_step: int, base: int,
               low: int, high: int) -> int:  # fmt: skip
    """List the hits in kernel order, used ones first, then guessed ones by transfer; return the kernels so far."""
    keys, counts, items, size = state.keys, state.counts[0], out.items, out.size[0]
    kernels = 0
    guessed = 0
    for index in range(low, high):
        key = base + steps.layer_step_expert[index]
        if keys[key].where != ABSENT:
            if keys[key].used:
                _add_item(
                    out,
                    steps.layer_step_expert[index],
                    steps.layer_step_tokens[index],
                    kernels,
                    -1,
                    key,
                    keys[key].format,
                )
                if not config.grouped:
                    kernels += 1
            else:
                guessed += 1
    used = size.items
    if config.grouped and used > 0:
        kernels = 1
    if guessed:
        for index in range(low, high):
            key = base + steps.layer_step_expert[index]
            if keys[key].where != ABSENT and not keys[key].used:
                _add_item(out, steps.layer_step_expert[index], steps.layer_step_tokens[index], 0, keys[key].transfer, key,
                          keys[key].format)  # fmt: skip
        for at in range(used + 1, size.items):  # insertion sort by transfer id: the order of arrival
            expert, tokens, wait_key = items[at].expert, items[at].tokens, items[at].key
            transfer, fmt = items[at].transfer, items[at].format
            slot = at
            while slot > used and items[slot - 1].transfer > transfer:
                items[slot] = items[slot - 1]
                slot -= 1
            items[slot].expert = expert
            items[slot].tokens = tokens
            items[slot].key = wait_key
            items[slot].transfer = transfer
            items[slot].format = fmt
        for at in range(used, size.items):
            items[at].kernel = kernels
            if not config.grouped:
                kernels += 1
        if config.grouped:
            kernels += 1
    counts.hits += size.items
    counts.hits_guessed += guessed
    return kernels


@jit_inline
def _list_misses(config: PolicyConfig, steps: Steps, state: PolicyState, out: Decision, base: int, low: int, high: int,
                 kernel: int) -> None:  # fmt: skip
    """List the misses in recorded order, all for `kernel` at first."""
    keys = state.keys
    for index in range(low, high):
        key = base + steps.layer_step_expert[index]
        if keys[key].where == ABSENT:
            if config.low_rank >= 0:
                keys[key].format = int(steps.layer_step_rank[index] >= config.low_rank)
            expert, tokens = steps.layer_step_expert[index], steps.layer_step_tokens[index]
            _add_item(out, expert, tokens, kernel, -1, 0, keys[key].format)


@jit_inner
def _drop_coarse_copies(config: PolicyConfig, steps: Steps, state: PolicyState, base: int, low: int, high: int) -> None:
    """Drop resident copies of the second format that this layer step needs in the first: they are fetched anew."""
    keys = state.keys
    for index in range(low, high):
        key = base + steps.layer_step_expert[index]
        if keys[key].format and keys[key].where == CACHED and steps.layer_step_rank[index] < config.low_rank:
            release(config, state, key)


@jit_inline
def _use_hits(config: PolicyConfig, state: PolicyState, out: Decision, base: int, num_hits: int) -> None:
    """Mark hits as used, tie their slots to the kernels that read them, and promote the transfers still awaited."""
    keys, slots, counts, items, size = state.keys, state.slots, state.counts[0], out.items, out.size[0]
    for at in range(num_hits):
        key = base + items[at].expert
        slot = keys[key].slot
        if slot >= 0 and (
            config.policy != STATIC or keys[key].where == STAGED
        ):  # a static cache's slots are never filled again
            slots[slot].last_kernel = size.first_kernel + items[at].kernel
            slots[slot].pending = -1
        if not keys[key].used:
            keys[key].used = 1
            counts.prefetches_used += 1
            promote(out, items[at].transfer, keys[key].sent_target)
