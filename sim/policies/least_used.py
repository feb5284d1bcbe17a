"""The expert that the fewest tokens have used, of one pool for all layers: a queue instead of a look through the whole pool.

Modelled: a binary heap by (tokens, recency), the least on top. Both only ever grow, so an entry that is older than its expert's present
values lies too near the top, is found there and put right; who has left the cache is found there too and dropped. Who may not leave now
is set aside, and put back. Ignored: rounds in which awaited and used experts may go; they are rare, and look through the pool.
"""

from __future__ import annotations

from ...base.jit import jit_inline, jit_inner
from ...base.records import Array
from .seen import FREE_ROUND, may_leave
from .state import CACHED, LFU, PolicyConfig, PolicyState


@jit_inline
def mark_recent(config: PolicyConfig, state: PolicyState, key: int) -> None:
    """Note that `key` has become the most recent of its pool, where the queue is kept."""
    if config.policy == LFU and config.pooled:
        state.pools[0].moves += 1
        state.marks[key].moved = state.pools[0].moves


@jit_inner
def enqueue(state: PolicyState, key: int) -> None:
    """Add an expert that has entered the cache, unless an older entry of it is still there."""
    queue, marks, pool = state.queue, state.marks, state.pools[0]
    if marks[key].queued:
        return
    marks[key].queued = 1
    queue[pool.queued].tokens = state.keys[key].frequency
    queue[pool.queued].moved = marks[key].moved
    queue[pool.queued].key = key
    _rise(queue, pool.queued)
    pool.queued += 1


@jit_inner
def least_used(state: PolicyState, layer_step: int) -> int:
    """Return the key with the fewest tokens, the least recent of equals, that neither this layer step uses nor a guess awaits; -1: none."""
    keys, queue, marks, pool = state.keys, state.queue, state.marks, state.pools[0]
    size, whole, found = int(pool.queued), int(pool.queued), -1
    while size > 0:
        key = queue[0].key
        if keys[key].where != CACHED:
            marks[key].queued = 0
            size -= 1
            whole -= 1
            queue[0] = queue[size]
            queue[size] = queue[whole]
        elif queue[0].tokens != keys[key].frequency or queue[0].moved != marks[key].moved:
            queue[0].tokens = keys[key].frequency
            queue[0].moved = marks[key].moved
        elif may_leave(keys, key, layer_step, FREE_ROUND):
            found = int(key)
            break
        else:  # behind the heap, where those lie that are set aside
            size -= 1
            _swap(queue, 0, size)
        _sink(queue, size)
    for at in range(size, whole):
        _rise(queue, at)
    pool.queued = whole
    return found


@jit_inline
def _before(queue: Array, one: int, other: int) -> bool:
    if queue[one].tokens != queue[other].tokens:
        return bool(queue[one].tokens < queue[other].tokens)
    return bool(queue[one].moved < queue[other].moved)


@jit_inline
def _swap(queue: Array, one: int, other: int) -> None:
    tokens, moved, key = queue[one].tokens, queue[one].moved, queue[one].key
    queue[one] = queue[other]
    queue[other].tokens = tokens
    queue[other].moved = moved
    queue[other].key = key


@jit_inline
def _rise(queue: Array, at: int) -> None:
    """Move the entry at `at` up to its place among those before it."""
    while at > 0:
        above = (at - 1) // 2
        if not _before(queue, at, above):
            break
        _swap(queue, at, above)
        at = above


@jit_inline
def _sink(queue: Array, size: int) -> None:
    """Move the first entry down to its place among the first `size`."""
    at = 0
    while 2 * at + 1 < size:
        below = 2 * at + 1
        if below + 1 < size and _before(queue, below + 1, below):
            below += 1
        if not _before(queue, below, at):
            break
        _swap(queue, at, below)
        at = below
