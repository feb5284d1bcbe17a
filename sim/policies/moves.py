"""What moves in a layer step: misses fetched, guesses fetched ahead, room made for both, victims written back.

Modelled: which transfer takes which slot or buffer, and what it has to wait for. Ignored: time, and what is looked up or served
(`offload`).
"""

from __future__ import annotations

from ...base.jit import jit_inline, jit_inner
from .caching import admit, evict, find_victim, link_most_recent, pool_of, take_free_slot
from .host_tier import use_from_host
from .custom import rank_by_rule
from .prefetching import worth_fetching
from .state import (
    ABSENT, DEMAND, NONE, NUM_STREAM, PREFETCH, ROUTED, STAGED, STATIC, TRANSIENT,
    WHOLE_LAYER,
    Decision, PolicyConfig, PolicyState,
)  # fmt: skip


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
def seat_staged_hits(
    config: PolicyConfig, state: PolicyState, out: Decision, layer_step: int, base: int, num_hits: int
) -> None:
    """Move staged experts that are used into the cache: the buffer and the freed slot change places, no bytes move."""
    keys, slots, staged, items = state.keys, state.slots, state.staged, out.items
    for at in range(num_hits):
        key = base + items[at].expert
        if keys[key].where != STAGED or config.policy == STATIC:
            continue
        slot = _make_room(config, state, out, key, layer_step, False)
        held = keys[key].slot
        buffer = slots[held].buffer
        staged[buffer].slot = slot
        staged[buffer].key = -1
        slots[slot].buffer = buffer
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
            promote(out, slots[slot].pending, slots[slot].pending_target)
        slots[slot].pending = transfer if kind == PREFETCH else -1
        slots[slot].pending_target = target
    keys[key].transfer = transfer
    keys[key].target = target
    keys[key].sent_target = target
    counts.next_transfer += 1
    size.moves = at + 1


@jit_inline
def fetch_misses(config: PolicyConfig, state: PolicyState, out: Decision, layer_step: int, base: int, num_hits: int,
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
            _hold_transient(config, state, key)
        elif config.policy != STATIC:
            admit(config, state, key, slot, layer_step)
        counts.misses += 1
    return kernel + 1 if size.items > num_hits else kernels


@jit_inline
def _hold_transient(config: PolicyConfig, state: PolicyState, key: int) -> None:
    """Put an expert into transient memory, listed by layer, and count the most there ever were."""
    counts = state.counts[0]
    state.keys[key].where = TRANSIENT
    link_most_recent(state, config.num_layers * config.num_experts + key // config.num_experts, key)
    counts.transient_now += 1
    counts.peak_transient = max(counts.peak_transient, counts.transient_now)


@jit_inner
def fetch_rest_of_layer(config: PolicyConfig, state: PolicyState, out: Decision, layer_step: int, base: int) -> None:
    """Fetch the layer's other experts too; every kernel of the layer step, or the last one, waits for the last of them."""
    keys, counts, items, moves, size = state.keys, state.counts[0], out.items, out.moves, out.size[0]
    for expert in range(config.num_experts):
        if keys[base + expert].where == ABSENT:
            _add_move(config, state, out, base + expert, DEMAND, layer_step, 0, -1)
            _hold_transient(config, state, base + expert)
            keys[base + expert].used = 0
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


@jit_inline
def await_block(config: PolicyConfig, state: PolicyState, out: Decision, layer: int) -> None:
    """Demand everything that was fetched ahead for this layer: without a cache its buffers are given back after the layer step."""
    keys, sentinel = state.keys, config.num_layers * config.num_experts + layer
    key = keys[sentinel].prev
    while key != sentinel:
        if not keys[key].used:
            promote(out, keys[key].transfer, keys[key].sent_target)
        key = keys[key].prev


@jit_inline
def drop_transients(config: PolicyConfig, state: PolicyState, layer: int) -> None:
    """Forget this layer's transient experts: without a cache they live for one layer step."""
    keys, counts, sentinel = state.keys, state.counts[0], config.num_layers * config.num_experts + layer
    key = keys[sentinel].next
    while key != sentinel:
        after = keys[key].next
        keys[key].where = ABSENT
        keys[key].next = key
        keys[key].prev = key
        counts.transient_now -= 1
        counts.prefetches_dropped += keys[key].used == 0 and config.fetch_layer == ROUTED
        key = after
    keys[sentinel].next = sentinel
    keys[sentinel].prev = sentinel


@jit_inner
def fetch_ahead(config: PolicyConfig, state: PolicyState, out: Decision, layer_step: int, distance: int, base: int,
                 num_guesses: int) -> None:  # fmt: skip
    """Fetch the ranked guesses for a later layer step, best first, until none may be admitted any more."""
    keys, slots, staged, guesses, counts = state.keys, state.slots, state.staged, state.guesses, state.counts[0]
    target = layer_step + distance
    if config.scored:
        rank_by_rule(config, state, base, distance, num_guesses)
    for rank in range(num_guesses):
        key = base + guesses[rank].ranked
        if keys[key].where != ABSENT:
            if not keys[key].used:
                keys[key].target = max(keys[key].target, target)
                if keys[key].where == STAGED:
                    staged[slots[keys[key].slot].buffer].target = keys[key].target
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
            _hold_transient(config, state, key)
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
            staged[buffer].target = target
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
    staged = state.staged
    best = -1
    for buffer in range(staged.shape[0]):
        if staged[buffer].key < 0:
            return buffer
        # A used expert is still staged only under a static cache, which takes no one in.
        if staged[buffer].target <= layer_step and (best < 0 or staged[buffer].target < staged[best].target):
            best = buffer
    return best


@jit_inline
def promote(out: Decision, transfer: int, target: int) -> None:
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
