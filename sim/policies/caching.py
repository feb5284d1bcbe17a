"""What stays and what goes: recency lists, victims, admission and eviction.

Modelled: one pool of slots for each layer, or one for all; LRU, and policies whose rule gives each expert a score (the least goes,
recency breaks ties): the bundled ones (`bundled`) and those of a policy file (`custom`).
A victim is sought in three rounds: first among experts that neither the current layer step uses nor a prefetch still awaits;
then among awaited ones; last among the layer step's own, which happens only when the layer step's set is larger than the pool, so
that the set streams through. Ignored: sizes (all experts of one run are slots of one size), time.
"""

from __future__ import annotations

from ...base.jit import jit_inline, jit_inner
from .bundled import aged_tokens, farthest_use, fewest_tokens, least_merit, least_stale
from .custom import ask_merit, ask_victim
from .least_used import enqueue, least_used, mark_recent
from .seen import ALL_ROUNDS, may_leave, seen_expert, seen_moment
from .state import (
    ABSENT, BELADY, CACHED, CUSTOM, LEAST_STALE, LFU, LFUDA, LRU, NONE, STATIC, PolicyConfig, PolicyState,
)  # fmt: skip


@jit_inline
def pool_of(config: PolicyConfig, key: int) -> int:
    """Return the pool that `key` is cached in."""
    return 0 if config.pooled else key // config.num_experts


@jit_inline
def unlink(state: PolicyState, key: int) -> None:
    """Take `key` out of its recency list."""
    keys = state.keys
    before, after = keys[key].prev, keys[key].next
    keys[before].next = after
    keys[after].prev = before


@jit_inline
def link_most_recent(state: PolicyState, sentinel: int, key: int) -> None:
    """Put `key` at the most recent end of the list whose sentinel is given."""
    keys = state.keys
    first = keys[sentinel].next
    keys[key].next = first
    keys[key].prev = sentinel
    keys[first].prev = key
    keys[sentinel].next = key


@jit_inline
def touch(config: PolicyConfig, state: PolicyState, key: int) -> None:
    """Make a cached expert the most recent of its pool; not for a static cache, which keeps no order."""
    keys = state.keys
    if keys[key].where == CACHED:
        sentinel = config.num_layers * config.num_experts + pool_of(config, key)
        if keys[sentinel].next != key:
            unlink(state, key)
            link_most_recent(state, sentinel, key)
            mark_recent(config, state, key)


@jit_inline
def appraise(config: PolicyConfig, state: PolicyState, key: int, layer_step: int) -> None:
    """Give `key` the merit of a use now, before it counts as used; policies without a merit rule keep what it has."""
    if config.policy == LFUDA:
        _appraise_aged(config, state, key, layer_step)
    elif config.policy >= CUSTOM and state.rules[0].merit != 0:
        ask_merit(config, state, pool_of(config, key), key, layer_step)


@jit_inline
def _appraise_aged(config: PolicyConfig, state: PolicyState, key: int, layer_step: int) -> None:
    now = seen_moment(config.num_layers, config.num_experts, state.pools, pool_of(config, key), layer_step)
    state.keys[key].merit = aged_tokens(seen_expert(config.num_experts, state.keys, key), now)


@jit_inline
def _score(config: PolicyConfig, state: PolicyState, pool: int, key: int, layer_step: int) -> float:
    """Return how much a bundled policy other than LRU wants to keep `key`; the least goes."""
    expert = seen_expert(config.num_experts, state.keys, key)
    now = seen_moment(config.num_layers, config.num_experts, state.pools, pool, layer_step)
    if config.policy == LFU:
        return fewest_tokens(expert, now)
    if config.policy == BELADY:
        return farthest_use(expert, now)
    if config.policy == LEAST_STALE:
        return least_stale(expert, now)
    return least_merit(expert, now)


@jit_inline
def release(config: PolicyConfig, state: PolicyState, key: int) -> None:
    """Drop a cached expert and give its slot back to its pool."""
    keys, slots, pools = state.keys, state.slots, state.pools
    unlink(state, key)
    keys[key].where = ABSENT
    pool = pool_of(config, key)
    pools[pool].taken -= 1
    room = pools[pool].capacity - pools[pool].taken
    slots[pools[pool].first_slot + room - 1].free_slot = keys[key].slot
    keys[key].slot = -1
    keys[key].stay_tokens = 0


@jit_inline
def find_victim(config: PolicyConfig, state: PolicyState, pool: int, layer_step: int, prefetching: bool) -> int:
    """Return the key that leaves `pool`, or -1 when none may (a prefetch evicts only in the first round)."""
    keys = state.keys
    if config.policy >= CUSTOM:
        return ask_victim(config, state, pool, layer_step, prefetching)
    if config.policy == LFU and config.pooled:
        key = least_used(state, layer_step)
        if key >= 0 or prefetching:
            return key
    sentinel = config.num_layers * config.num_experts + pool
    rounds = 1 if prefetching else ALL_ROUNDS
    for search in range(rounds):
        best = -1
        least = 0.0
        key = keys[sentinel].prev  # from the least recent end
        while key != sentinel:
            if may_leave(keys, key, layer_step, search):
                if config.policy == LRU:
                    return int(key)
                score = _score(config, state, pool, key, layer_step)
                if best < 0 or score < least:
                    best = key
                    least = score
            key = keys[key].prev
        if best >= 0:
            return int(best)
    return -1


@jit_inline
def take_free_slot(state: PolicyState, pool: int) -> int:
    """Return a free slot of `pool` and count it as taken, or -1 when the pool is full."""
    slots, pools = state.slots, state.pools
    room = pools[pool].capacity - pools[pool].taken
    if room <= 0:
        return -1
    pools[pool].taken += 1
    return int(slots[pools[pool].first_slot + room - 1].free_slot)


@jit_inline
def evict(config: PolicyConfig, state: PolicyState, key: int) -> int:
    """Remove a cached expert and return its slot, which stays counted as taken."""
    keys, counts = state.keys, state.counts[0]
    if keys[key].used == 0:
        counts.prefetches_dropped += 1
    unlink(state, key)
    keys[key].where = ABSENT
    slot = int(keys[key].slot)
    keys[key].slot = -1
    counts.evictions += 1
    if config.policy == LFUDA or config.policy >= CUSTOM:
        pool = pool_of(config, key)
        state.pools[pool].age = max(state.pools[pool].age, keys[key].merit)
    keys[key].stay_tokens = 0
    return slot


@jit_inline
def admit(config: PolicyConfig, state: PolicyState, key: int, slot: int, layer_step: int) -> None:
    """Put an absent or staged expert into the cache at `slot`, as the most recent of its pool."""
    keys = state.keys
    keys[key].where = CACHED
    keys[key].slot = slot
    if config.policy == LFUDA:  # the cache may have aged since the use, by a victim that made room
        _appraise_aged(config, state, key, layer_step)
    link_most_recent(state, config.num_layers * config.num_experts + pool_of(config, key), key)
    if config.policy == LFU and config.pooled:
        mark_recent(config, state, key)
        enqueue(state, key)


@jit_inner
def clear_cache(config: PolicyConfig, state: PolicyState) -> None:
    """Empty the cache and the staging buffers, as at the start of a request; a static cache keeps its experts."""
    keys, pools, staged, counts = state.keys, state.pools, state.staged, state.counts[0]
    num_keys = config.num_layers * config.num_experts
    for buffer in range(staged.shape[0]):
        if staged[buffer].key >= 0:
            keys[staged[buffer].key].where = ABSENT
            counts.prefetches_dropped += keys[staged[buffer].key].used == 0
            staged[buffer].key = -1
    if config.policy == STATIC or config.policy == NONE:
        return
    for pool in range(pools.shape[0] - 1):
        sentinel = num_keys + pool
        key = keys[sentinel].next
        while key != sentinel:
            after = keys[key].next
            counts.prefetches_dropped += keys[key].used == 0
            # Freed slots go back on the stack in recency order; which slot is used next changes no count and no time
            # other than through the kernels that still read it, which are all done between two steps.
            release(config, state, key)
            key = after
