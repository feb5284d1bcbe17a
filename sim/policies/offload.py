"""One layer step of one MoE layer: what is already there, what must be fetched, what leaves, what is fetched ahead.

`decide_layer_step` is the whole decision. The SimPy model, the compiled simulator and the executor call this very function, so their
hits, misses, bytes and tokens agree exactly. Its order is fixed: look the set up once, before anything is inserted; serve
hits that were used before, then hits that a prefetch brought, then misses, each in recorded order; then fetch ahead.
Ignored: time. A hit may still be on its way; the engines wait for its transfer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...base.jit import jit_inline, jit_inner, jit_lean
from .caching import admit, appraise, clear_cache, evict, find_victim, pool_of, release, take_free_slot, touch
from .host_tier import use_from_host
from .custom import rank_by_rule
from .misses import send_misses_to_cores
from .prefetching import rank_guesses, worth_fetching
from .remembering import learn_layer_step, match_request, remember_request
from .state import (
    ABSENT, AFFINITY, CACHED, DEMAND, GUESS_NONE, MISS_FETCH, NONE, NUM_STREAM, PREFETCH, ROUTED, STAGED, STATIC, TRANSIENT,
    WHOLE_LAYER,
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
        for buffer in range(staged.shape[0]):
            if staged[buffer].key == key:
                staged[buffer].key = -1
        keys[key].slot = -1
    else:
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
    for index in range(low, high):
        key = base + steps.layer_step_expert[index]
        if keys[key].where == ABSENT:
            if config.low_rank >= 0:
                keys[key].format = int(steps.layer_step_rank[index] >= config.low_rank)
            _add_item(
                out, steps.layer_step_expert[index], steps.layer_step_tokens[index], kernels, -1, 0, keys[key].format
            )
    tokens = steps.step_start[step + 1] - steps.step_start[step]
    if config.miss != MISS_FETCH and not 0 < config.upload_tokens <= tokens:
        on_cores = send_misses_to_cores(config, state, out, base, num_hits)
        counts.misses += on_cores
        counts.cpu_runs += on_cores
    # The layer step's own experts are marked before any victim is sought: none may go while the pool has room for all.
    for index in range(low, high):
        key = base + steps.layer_step_expert[index]
        keys[key].frequency += steps.layer_step_tokens[index]
        keys[key].stay_tokens += steps.layer_step_tokens[index]
        appraise(config, state, key, layer_step)
        keys[key].touched = layer_step
        if config.future:
            keys[key].next_use = steps.layer_step_next_use[index]
    _use_hits(state, out, base, num_hits)
    if config.policy == NONE:
        _await_block(config, state, out, base)
    _seat_staged_hits(config, state, out, layer_step, base, num_hits)
    kernels = _fetch_misses(config, state, out, layer_step, base, num_hits, kernels)
    if config.fetch_layer:
        _fetch_rest_of_layer(config, state, out, layer_step, base)
    for index in range(low, high):
        touch(config, state, base + steps.layer_step_touch[index])
    size.kernels = kernels
    counts.next_kernel += kernels
    if config.predictor != GUESS_NONE:
        for distance in range(1, min(config.depth, config.num_layers - 1 - layer) + 1):
            guesses = rank_guesses(config, steps, state, step, layer + distance, distance)
            _fetch_ahead(config, state, out, layer_step, distance, base + distance * config.num_experts, guesses)
    if config.policy == NONE:
        _drop_transients(config, state, base)


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


@jit_inner
def _drop_coarse_copies(config: PolicyConfig, steps: Steps, state: PolicyState, base: int, low: int, high: int) -> None:
    """Drop resident copies of the second format that this layer step needs in the first: they are fetched anew."""
    keys = state.keys
    for index in range(low, high):
        key = base + steps.layer_step_expert[index]
        if keys[key].format and keys[key].where == CACHED and steps.layer_step_rank[index] < config.low_rank:
            release(config, state, key)


@jit_inline
def _use_hits(state: PolicyState, out: Decision, base: int, num_hits: int) -> None:
    """Mark hits as used, tie their slots to the kernels that read them, and promote the transfers still awaited."""
    keys, slots, counts, items, size = state.keys, state.slots, state.counts[0], out.items, out.size[0]
    for at in range(num_hits):
        key = base + items[at].expert
        slot = keys[key].slot
        if slot >= 0:
            slots[slot].last_kernel = size.first_kernel + items[at].kernel
            slots[slot].pending = -1
        if not keys[key].used:
            keys[key].used = 1
            counts.prefetches_used += 1
            _promote(out, items[at].transfer, keys[key].sent_target)


@jit_inline
def _await_block(config: PolicyConfig, state: PolicyState, out: Decision, base: int) -> None:
    """Demand everything that was fetched ahead for this layer: without a cache its buffers are given back after the layer step."""
    keys = state.keys
    for key in range(base, base + config.num_experts):
        if keys[key].where == TRANSIENT and not keys[key].used:
            _promote(out, keys[key].transfer, keys[key].sent_target)


@jit_inline
def _promote(out: Decision, transfer: int, target: int) -> None:
    """Note that an earlier transfer is now demanded, keeping the list in rising order and free of repeats."""
    promotions, size = out.promotions, out.size[0]
    at = size.promoted
    while at > 0 and promotions[at - 1].transfer > transfer:
        at -= 1
    if at > 0 and promotions[at - 1].transfer == transfer:
        return
    for index in range(size.promoted, at, -1):
        promotions[index] = promotions[index - 1]
    promotions[at].transfer = transfer
    promotions[at].target = target
    size.promoted += 1


@jit_inline
def _write_back(state: PolicyState, out: Decision, key: int, slot: int) -> None:
    """Queue the copy of an evicted expert to the host; the slot may not be filled before it has left."""
    keys, slots, counts, backs, size = state.keys, state.slots, state.counts[0], out.backs, out.size[0]
    at = size.backs
    backs[at].key = key
    backs[at].format = keys[key].format
    backs[at].wait_kernel = slots[slot].last_kernel
    backs[at].move = size.moves
    size.backs = at + 1
    slots[slot].last_back = counts.next_writeback
    counts.next_writeback += 1
    counts.writebacks += 1


@jit_inline
def _make_room(
    config: PolicyConfig, state: PolicyState, out: Decision, key: int, layer_step: int, prefetching: bool
) -> int:
    """Return a slot of `key`'s pool, evicting where it is full; -1 when a prefetch may not evict anyone."""
    keys = state.keys
    pool = pool_of(config, key)
    slot = take_free_slot(state, pool)
    if slot >= 0:
        return slot
    victim = find_victim(config, state, pool, layer_step, prefetching)
    if victim < 0:
        return -1
    was_used = keys[victim].used
    slot = evict(config, state, victim)
    # A victim that was never used is dropped, not written back: its bytes may still be on their way.
    if config.write_back and was_used:
        _write_back(state, out, victim, slot)
    return slot


@jit_inline
def _seat_staged_hits(
    config: PolicyConfig, state: PolicyState, out: Decision, layer_step: int, base: int, num_hits: int
) -> None:
    """Move staged experts that are used into the cache: the buffer and the freed slot change places, no bytes move."""
    keys, staged, items = state.keys, state.staged, out.items
    for at in range(num_hits):
        key = base + items[at].expert
        if keys[key].where != STAGED or config.policy == STATIC:
            continue
        buffer = 0
        while staged[buffer].key != key:
            buffer += 1
        slot = _make_room(config, state, out, key, layer_step, False)
        held = staged[buffer].slot
        staged[buffer].slot = slot
        staged[buffer].key = -1
        admit(config, state, key, held, layer_step)


@jit_inline
def _add_move(config: PolicyConfig, state: PolicyState, out: Decision, key: int, kind: int, target: int, kernel: int,
              slot: int) -> None:  # fmt: skip
    """Submit one transfer into `slot` (-1: a transient buffer), behind everything that still uses the slot."""
    keys, slots, prices, counts, moves, size = (
        state.keys,
        state.slots,
        state.prices,
        state.counts[0],
        out.moves,
        out.size[0],
    )
    at = size.moves
    transfer = counts.next_transfer
    moves[at].key = key
    moves[at].kind = kind
    moves[at].target = target
    moves[at].kernel = kernel
    moves[at].slot = slot
    moves[at].format = keys[key].format
    moves[at].read = use_from_host(config, state, key)
    counts.low_fetches += keys[key].format
    if (
        config.benefit or config.scored
    ) and kind == PREFETCH:  # the stream waits for demands anyway: they leave no backlog behind
        counts.backlog_ns += prices[keys[key].format].copy_ns
    moves[at].wait_kernel = -1
    moves[at].wait_back = -1
    if slot >= 0:
        moves[at].wait_kernel = slots[slot].last_kernel
        moves[at].wait_back = slots[slot].last_back
        # An unused prefetch into this slot may still be under way. It was admitted, so it finishes, and before this one.
        if slots[slot].pending >= 0:
            _promote(out, slots[slot].pending, slots[slot].pending_target)
        slots[slot].pending = transfer if kind == PREFETCH else -1
        slots[slot].pending_target = target
    keys[key].transfer = transfer
    keys[key].target = target
    keys[key].sent_target = target
    counts.next_transfer += 1
    size.moves = at + 1


@jit_inline
def _fetch_misses(config: PolicyConfig, state: PolicyState, out: Decision, layer_step: int, base: int, num_hits: int,
                  kernels: int) -> int:  # fmt: skip
    """Fetch every listed miss, in recorded order; return the kernels of the whole layer step.

    Grouped misses share a kernel until one needs a slot that this very kernel reads; then a new kernel (a wave) starts.
    """
    keys, slots, counts, items, size = state.keys, state.slots, state.counts[0], out.items, out.size[0]
    kernel = kernels
    for at in range(num_hits, size.items):
        key = base + items[at].expert
        slot = -1
        if config.policy == STATIC:
            slot = slots.shape[0] - NUM_STREAM + counts.next_stream % NUM_STREAM
            counts.next_stream += 1
        elif config.policy != NONE:
            slot = _make_room(config, state, out, key, layer_step, False)
        if at > num_hits and (
            not config.grouped or (slot >= 0 and slots[slot].last_kernel == size.first_kernel + kernel)
        ):
            kernel += 1
        items[at].kernel = kernel
        items[at].transfer = counts.next_transfer
        items[at].key = key
        _add_move(config, state, out, key, DEMAND, layer_step, kernel, slot)
        keys[key].used = 1
        if slot >= 0:
            slots[slot].last_kernel = size.first_kernel + kernel
        if config.policy == NONE:
            keys[key].where = TRANSIENT
            _count_transient(state)
        elif config.policy != STATIC:
            admit(config, state, key, slot, layer_step)
        counts.misses += 1
    return kernel + 1 if size.items > num_hits else kernels


@jit_inline
def _count_transient(state: PolicyState) -> None:
    """Count one more expert in transient memory, and the most there ever were."""
    counts = state.counts[0]
    counts.transient_now += 1
    counts.peak_transient = max(counts.peak_transient, counts.transient_now)


@jit_inner
def _fetch_rest_of_layer(config: PolicyConfig, state: PolicyState, out: Decision, layer_step: int, base: int) -> None:
    """Fetch the layer's other experts too; every kernel of the layer step, or the last one, waits for the last of them."""
    keys, counts, items, moves, size = state.keys, state.counts[0], out.items, out.moves, out.size[0]
    for expert in range(config.num_experts):
        if keys[base + expert].where == ABSENT:
            _add_move(config, state, out, base + expert, DEMAND, layer_step, 0, -1)
            keys[base + expert].where = TRANSIENT
            keys[base + expert].used = 0
            _count_transient(state)
            counts.extra_fetches += 1
    last = size.moves - 1
    # A layer that is streamed ends with its last expert's arrival, used or not: the next one needs the buffers.
    first_waiting = 0 if config.fetch_layer == WHOLE_LAYER else size.items - 1
    for at in range(first_waiting, size.items):
        items[at].transfer = counts.next_transfer - 1
        items[at].key = moves[last].key
    if config.fetch_layer == WHOLE_LAYER:
        for at in range(size.moves):
            moves[at].kernel = 0


@jit_inner
def _drop_transients(config: PolicyConfig, state: PolicyState, base: int) -> None:
    """Forget this layer's transient experts: without a cache they live for one layer step."""
    keys, counts = state.keys, state.counts[0]
    for key in range(base, base + config.num_experts):
        if keys[key].where == TRANSIENT:
            keys[key].where = ABSENT
            counts.transient_now -= 1
            counts.prefetches_dropped += keys[key].used == 0 and config.fetch_layer == ROUTED


@jit_inner
def _fetch_ahead(config: PolicyConfig, state: PolicyState, out: Decision, layer_step: int, distance: int, base: int,
                 num_guesses: int) -> None:  # fmt: skip
    """Fetch the ranked guesses for a later layer step, best first, until none may be admitted any more."""
    keys, staged, guesses, counts = state.keys, state.staged, state.guesses, state.counts[0]
    target = layer_step + distance
    if config.scored:
        rank_by_rule(config, state, base, distance, num_guesses)
    for rank in range(num_guesses):
        key = base + guesses[rank].ranked
        if keys[key].where != ABSENT:
            if not keys[key].used:
                keys[key].target = max(keys[key].target, target)
            continue
        if config.scored:
            if guesses[rank].worth <= 0:
                return
        elif (config.threshold_65536 or config.benefit) and not worth_fetching(config, state, rank, distance, 0):
            return
        if config.low_rank >= 0:
            keys[key].format = 0  # how important a guess will be is not known yet
        if config.policy == NONE:
            slot = -1
            keys[key].where = TRANSIENT
            _count_transient(state)
        elif config.staging > 0:
            buffer = _free_buffer(state, layer_step)
            if buffer < 0:
                return
            before = staged[buffer].key
            if before >= 0:
                keys[before].where = ABSENT
                keys[before].slot = -1
                counts.prefetches_dropped += keys[before].used == 0
            slot = staged[buffer].slot
            staged[buffer].key = key
            keys[key].where = STAGED
            keys[key].slot = slot
        else:
            slot = _make_room(config, state, out, key, layer_step, True)
            if slot < 0:
                return
            admit(config, state, key, slot, layer_step)
        _add_move(config, state, out, key, PREFETCH, target, -1, slot)
        keys[key].used = 0
        counts.prefetches += 1


@jit_inline
def _free_buffer(state: PolicyState, layer_step: int) -> int:
    """Return an empty staging buffer, else the one whose guess expired first (or was used), or -1."""
    keys, staged = state.keys, state.staged
    best = -1
    for buffer in range(staged.shape[0]):
        key = staged[buffer].key
        if key < 0:
            return buffer
        # A used expert is still staged only under a static cache, which takes no one in.
        if keys[key].target <= layer_step and (best < 0 or keys[key].target < keys[staged[best].key].target):
            best = buffer
    return best
