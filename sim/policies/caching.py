"""What stays and what goes: recency lists, victims, admission and eviction.

Modelled: one pool of slots for each layer, or one for all; LRU; LFU, affinity and activation (least merit goes, recency
breaks ties); least-stale (layers left behind go first); Belady's farthest next use.
A victim is sought in three rounds: first among experts that neither the current visit uses nor a prefetch still awaits;
then among awaited ones; last among the visit's own, which happens only when the visit's set is larger than the pool, so
that the set streams through. Ignored: sizes (all experts of one run are slots of one size), time.
"""

from __future__ import annotations

from ...jit import jit_lean
from .state import (
    ABSENT, BELADY, CACHED, CLOCK, EVICTIONS, LEAST_STALE, LFU, LRU, NONE, PREFETCHES_DROPPED, STATIC,
    PolicyConfig, PolicyState,
)  # fmt: skip

# Rounds of the search for a victim.
_FREE_ROUND, _AWAITED_ROUND, _OWN_ROUND = 0, 1, 2


@jit_lean
def pool_of(config: PolicyConfig, key: int) -> int:
    """Return the pool that `key` is cached in."""
    return 0 if config.pooled else key // config.num_experts


@jit_lean
def unlink(state: PolicyState, key: int) -> None:
    """Take `key` out of its recency list."""
    before, after = state.link_prev[key], state.link_next[key]
    state.link_next[before] = after
    state.link_prev[after] = before


@jit_lean
def link_most_recent(state: PolicyState, sentinel: int, key: int) -> None:
    """Put `key` at the most recent end of the list whose sentinel is given."""
    first = state.link_next[sentinel]
    state.link_next[key] = first
    state.link_prev[key] = sentinel
    state.link_prev[first] = key
    state.link_next[sentinel] = key


@jit_lean
def touch(config: PolicyConfig, state: PolicyState, key: int) -> None:
    """Make a cached expert the most recent of its pool (a static cache keeps no order)."""
    if state.where[key] == CACHED and config.policy != STATIC and config.policy != NONE:
        sentinel = config.num_layers * config.num_experts + pool_of(config, key)
        if state.link_next[sentinel] != key:
            unlink(state, key)
            link_most_recent(state, sentinel, key)
        state.count[CLOCK] += 1


@jit_lean
def _eligible(state: PolicyState, key: int, visit: int, search: int) -> bool:
    """Return whether `key` may go in this round of the search."""
    if state.touched[key] == visit:
        return search == _OWN_ROUND
    if state.used[key] == 0 and state.target[key] > visit:
        return search == _AWAITED_ROUND
    return search == _FREE_ROUND


@jit_lean
def _worth(config: PolicyConfig, state: PolicyState, key: int, visit: int) -> int:
    """Return how much a policy other than LRU wants to keep `key`; the least goes."""
    if config.policy == LFU:
        return int(state.frequency[key])
    if config.policy == BELADY:
        return -int(state.next_use[key])
    if config.policy == LEAST_STALE:
        layers = config.num_layers
        here, there = visit % layers, key // config.num_experts
        # Visits until the layer's next turn: most for the one just left. Among layers this pass has left behind, what
        # it did not use there is stale already.
        turn = (there - here - 1) % layers
        stale = there <= here and state.touched[key] < visit - here
        return -(turn + layers * int(stale))
    return int(state.merit[key])


@jit_lean
def release(config: PolicyConfig, state: PolicyState, key: int) -> None:
    """Drop a cached expert and give its slot back to its pool."""
    unlink(state, key)
    state.where[key] = ABSENT
    pool = pool_of(config, key)
    state.pool_size[pool] -= 1
    room = state.pool_capacity[pool] - state.pool_size[pool]
    state.pool_free[state.pool_base[pool] + room - 1] = state.slot_of[key]
    state.slot_of[key] = -1


@jit_lean
def find_victim(config: PolicyConfig, state: PolicyState, pool: int, visit: int, prefetching: bool) -> int:
    """Return the key that leaves `pool`, or -1 when none may (a prefetch evicts only in the first round)."""
    sentinel = config.num_layers * config.num_experts + pool
    rounds = 1 if prefetching else 3
    for search in range(rounds):
        best = -1
        least = 0
        key = state.link_prev[sentinel]  # from the least recent end
        while key != sentinel:
            if _eligible(state, key, visit, search):
                if config.policy == LRU:
                    return int(key)
                worth = _worth(config, state, key, visit)
                if best < 0 or worth < least:
                    best = key
                    least = worth
            key = state.link_prev[key]
        if best >= 0:
            return int(best)
    return -1


@jit_lean
def take_free_slot(state: PolicyState, pool: int) -> int:
    """Return a free slot of `pool` and count it as taken, or -1 when the pool is full."""
    room = state.pool_capacity[pool] - state.pool_size[pool]
    if room <= 0:
        return -1
    state.pool_size[pool] += 1
    return int(state.pool_free[state.pool_base[pool] + room - 1])


@jit_lean
def evict(config: PolicyConfig, state: PolicyState, key: int) -> int:
    """Remove a cached expert and return its slot, which stays counted as taken."""
    if state.used[key] == 0:
        state.count[PREFETCHES_DROPPED] += 1
    unlink(state, key)
    state.where[key] = ABSENT
    slot = int(state.slot_of[key])
    state.slot_of[key] = -1
    state.count[EVICTIONS] += 1
    return slot


@jit_lean
def admit(config: PolicyConfig, state: PolicyState, key: int, slot: int) -> None:
    """Put an absent or staged expert into the cache at `slot`, as the most recent of its pool."""
    state.where[key] = CACHED
    state.slot_of[key] = slot
    link_most_recent(state, config.num_layers * config.num_experts + pool_of(config, key), key)
    state.count[CLOCK] += 1


@jit_lean
def clear_cache(config: PolicyConfig, state: PolicyState) -> None:
    """Empty the cache and the staging buffers, as at the start of a request; a static cache keeps its experts."""
    num_keys = config.num_layers * config.num_experts
    for buffer in range(state.staged_key.shape[0]):
        if state.staged_key[buffer] >= 0:
            state.where[state.staged_key[buffer]] = ABSENT
            state.count[PREFETCHES_DROPPED] += state.used[state.staged_key[buffer]] == 0
            state.staged_key[buffer] = -1
    if config.policy == STATIC:
        return
    for pool in range(state.pool_size.shape[0]):
        sentinel = num_keys + pool
        key = state.link_next[sentinel]
        while key != sentinel:
            after = state.link_next[key]
            state.count[PREFETCHES_DROPPED] += state.used[key] == 0
            # Freed slots go back on the stack in recency order; which slot is used next changes no count and no time
            # other than through the kernels that still read it, which are all done between two steps.
            release(config, state, key)
            key = after
