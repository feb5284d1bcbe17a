"""What the offload decisions see and write: plain arrays in named tuples, so that compiled code and Python share them.

Modelled: logical state only. An expert is resident from the decision that admits it; whether its bytes have arrived is
time, and time is not here. Keys: `key = moe_layer * num_experts + expert`. A *visit* is one MoE layer of one step,
counted `step * num_layers + moe_layer` from the start of the run. A *slot* is a place in device memory for one expert.
A *kernel number* counts expert kernels in the order they are launched; it is what a transfer waits for before it may
overwrite a slot. Ignored: bytes, durations, everything physical.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ...schedule import OffloadSchedule

Array: TypeAlias = npt.NDArray[Any]

# Cache policies, predictors and fetches as numbers, in the order of `schedule.CACHE_POLICIES` and its companions.
NONE, LRU, LFU, STATIC, BELADY = 0, 1, 2, 3, 4
GUESS_NONE, GUESS_ALL, GUESS_NEXT_GATE, GUESS_DIAL, GUESS_PRE_GATE, GUESS_ORACLE = 0, 1, 2, 3, 4, 5

# Where an expert is.
ABSENT, CACHED, STAGED, TRANSIENT = 0, 1, 2, 3

# Classes of transfers, in the order in which the copy engine serves them.
DEMAND, PREFETCH = 0, 1

# `PolicyState.count` indices.
(
    NEXT_TRANSFER, NEXT_KERNEL, NEXT_WRITEBACK, NEXT_STREAM, CLOCK,
    HITS, HITS_GUESSED, MISSES, PREFETCHES, PREFETCHES_USED, EXTRA_FETCHES, WRITEBACKS,
    PREFETCHES_DROPPED, EVICTIONS, PEAK_TRANSIENT, TRANSIENT_NOW, GUESSES_TRUE, TRUTHS, NUM_COUNTS,
) = range(19)  # fmt: skip

FAR = np.int64(2**62)
"""A next use that never comes."""


class PolicyConfig(NamedTuple):
    """The decisions' constants; every field is a whole number so that compiled code needs one specialisation."""

    policy: int
    predictor: int
    depth: int
    width: int
    staging: int
    grouped: int
    write_back: int
    fetch_layer: int
    num_layers: int
    num_experts: int
    pooled: int
    recall_65536: int
    recall_decay_65536: int
    seed: int
    guess_distances: int
    guess_width: int


class PolicyState(NamedTuple):
    """Everything the decisions remember. `num_keys = num_layers * num_experts`; slots number the cache, staging and
    stream places together.
    """

    where: Array  # uint8 [num_keys]: ABSENT, CACHED, STAGED or TRANSIENT
    slot_of: Array  # int32 [num_keys]: slot while CACHED or STAGED
    used: Array  # uint8 [num_keys]: 0 from a prefetch until the first use
    target: Array  # int64 [num_keys]: visit an unused prefetch was made for
    transfer: Array  # int64 [num_keys]: the latest transfer of this expert, -1 when it was there from the start
    sent_target: Array  # int64 [num_keys]: visit the latest transfer was first made for; where it stands in its queue
    touched: Array  # int64 [num_keys]: last visit that used this expert
    stamp: Array  # int64 [num_keys]: recency, larger is more recent
    frequency: Array  # int64 [num_keys]: tokens that used this expert
    next_use: Array  # int64 [num_keys]: next visit that will use it (belady only)
    link_prev: Array  # int32 [num_keys + num_pools]: recency list; entry num_keys + p is pool p's sentinel
    link_next: Array  # int32 [num_keys + num_pools]
    pool_size: Array  # int32 [num_pools]
    pool_capacity: Array  # int32 [num_pools]
    pool_free: Array  # int32 [num_cache_slots]: stack of free slots of each pool, pool p from pool_base[p]
    pool_base: Array  # int32 [num_pools + 1]
    staged_key: Array  # int32 [staging]: key in each staging buffer, -1 when empty
    staged_slot: Array  # int32 [staging]: slot of each staging buffer
    stream_slot: Array  # int32 [num_stream]: slots that a static cache's misses pass through
    slot_kernel: Array  # int64 [num_slots]: last kernel that reads the slot, -1 when none
    slot_writeback: Array  # int64 [num_slots]: last write-back that reads the slot, -1 when none
    slot_pending: Array  # int64 [num_slots]: an unused prefetch into the slot, perhaps still on its way, -1 when none
    slot_pending_target: Array  # int64 [num_slots]: the visit that prefetch was made for
    score: Array  # int64 [num_experts]: scratch for ranking guesses
    ranked: Array  # int32 [num_experts]: scratch, guesses in the order in which they are fetched
    count: Array  # type: ignore[assignment]  # int64 [NUM_COUNTS]; nobody asks a state for tuple.count


class Decision(NamedTuple):
    """What one visit decided, in buffers that are overwritten by the next visit. Lengths are in `size`."""

    item_expert: Array  # int32: experts in kernel order
    item_tokens: Array  # int32: tokens of each
    item_kernel: Array  # int32: kernel of each, counted from 0 within the visit, not falling
    item_transfer: Array  # int64: transfer that must have arrived, -1 when none
    item_wait_key: Array  # int32: key of that transfer
    move_key: Array  # int32: transfers in the order they are submitted; ids run on from first_transfer
    move_class: Array  # int32: DEMAND or PREFETCH
    move_target: Array  # int64: visit it is for
    move_kernel: Array  # int32: kernel of this visit that needs it, -1 for prefetches
    move_wait_kernel: Array  # int64: kernel number that must have finished with the slot, -1 when none
    move_wait_writeback: Array  # int64: write-back that must have left the slot, -1 when none
    move_slot: Array  # int32: slot it fills, -1 for a transient buffer
    back_key: Array  # int32: write-backs; ids run on from first_writeback
    back_wait_kernel: Array  # int64
    back_move: Array  # int32: the write-back is submitted together with this transfer of the visit
    promoted: Array  # int64: earlier transfers that are now demanded, rising
    promoted_target: Array  # int64: the visit each was made for
    size: Array  # int64 [8]: items, kernels, moves, backs, promoted, first transfer, first kernel, first write-back


SIZE_ITEMS, SIZE_KERNELS, SIZE_MOVES, SIZE_BACKS, SIZE_PROMOTED, FIRST_TRANSFER, FIRST_KERNEL, FIRST_BACK = range(8)


def make_config(schedule: OffloadSchedule, *, num_layers: int, num_experts: int, top_k: int,
                guess_distances: int, guess_width: int) -> PolicyConfig:  # fmt: skip
    """Return the compiled form of `schedule`'s logical options."""
    cache, predictor = schedule.cache, schedule.predictor
    return PolicyConfig(
        policy={"none": NONE, "lru": LRU, "lfu": LFU, "static": STATIC, "belady": BELADY}[cache.policy],
        predictor={
            "none": GUESS_NONE, "all": GUESS_ALL, "next-gate": GUESS_NEXT_GATE, "dial": GUESS_DIAL,
            "pre-gate": GUESS_PRE_GATE, "oracle": GUESS_ORACLE,
        }[predictor.kind],
        depth=predictor.depth,
        width=predictor.width or top_k,
        staging=predictor.staging,
        grouped=int(schedule.kernel.grouping == "grouped"),
        write_back=int(schedule.copy.write_back),
        fetch_layer=int(schedule.copy.fetch == "layer"),
        num_layers=num_layers,
        num_experts=num_experts,
        pooled=int(cache.pooled_experts is not None),
        recall_65536=round(predictor.recall * 65536),
        recall_decay_65536=round(predictor.recall_decay * 65536),
        seed=predictor.seed,
        guess_distances=guess_distances,
        guess_width=guess_width,
    )  # fmt: skip


def make_state(
    config: PolicyConfig, *, capacities: Array, popularity: Array | None, first_use: Array | None
) -> PolicyState:
    """Return the state before the first visit.

    capacities: int [num_pools] slots of each layer's cache, or of the one pooled cache.
    popularity: int [num_layers, num_experts] tokens per expert, needed by a static cache, which starts full.
    first_use: int64 [num_keys] first visit that uses each expert (FAR when none does), needed by belady.
    """
    num_keys = config.num_layers * config.num_experts
    num_pools = 1 if config.pooled else config.num_layers
    room = np.zeros(num_pools, np.int32) if config.policy == NONE else capacities.astype(np.int32)
    base = np.zeros(num_pools + 1, np.int32)
    base[1:] = np.cumsum(room)
    num_cached = int(base[-1])
    # A static cache lets its misses pass through two buffers, so that one fills while the other is read.
    num_stream = 2 if config.policy == STATIC else 0
    num_slots = num_cached + config.staging + num_stream
    links = np.arange(num_keys + num_pools, dtype=np.int32)
    free = np.zeros(max(num_cached, 1), np.int32)
    for pool in range(num_pools):  # the stack pops from its end, so the lowest slot is used first
        free[base[pool] : base[pool + 1]] = np.arange(base[pool + 1] - 1, base[pool] - 1, -1)
    state = PolicyState(
        where=np.zeros(num_keys, np.uint8),
        slot_of=np.full(num_keys, -1, np.int32),
        used=np.zeros(num_keys, np.uint8),
        target=np.full(num_keys, -1, np.int64),
        transfer=np.full(num_keys, -1, np.int64),
        sent_target=np.full(num_keys, -1, np.int64),
        touched=np.full(num_keys, -1, np.int64),
        stamp=np.zeros(num_keys, np.int64),
        frequency=np.zeros(num_keys, np.int64),
        next_use=np.full(num_keys, FAR, np.int64) if first_use is None else first_use.astype(np.int64).copy(),
        link_prev=links.copy(),
        link_next=links.copy(),
        pool_size=np.zeros(num_pools, np.int32),
        pool_capacity=room,
        pool_free=free,
        pool_base=base,
        staged_key=np.full(config.staging, -1, np.int32),
        staged_slot=np.arange(num_cached, num_cached + config.staging, dtype=np.int32),
        stream_slot=np.arange(num_cached + config.staging, num_slots, dtype=np.int32),
        slot_kernel=np.full(max(num_slots, 1), -1, np.int64),
        slot_writeback=np.full(max(num_slots, 1), -1, np.int64),
        slot_pending=np.full(max(num_slots, 1), -1, np.int64),
        slot_pending_target=np.full(max(num_slots, 1), -1, np.int64),
        score=np.zeros(config.num_experts, np.int64),
        ranked=np.zeros(config.num_experts, np.int32),
        count=np.zeros(NUM_COUNTS, np.int64),
    )
    if config.policy == STATIC and popularity is not None:
        _preload(config, state, popularity)
    return state


def _preload(config: PolicyConfig, state: PolicyState, popularity: Array) -> None:
    """Fill a static cache with the most popular experts of each layer, or of all layers when the cache is pooled."""
    counts = popularity.reshape(config.num_layers, config.num_experts)
    if config.pooled:
        counts = counts.reshape(1, -1)
    # Stable sorting of falling counts settles equal counts by rising key, the same way everywhere.
    order = np.argsort(-counts, axis=1, kind="stable")
    for pool, best in enumerate(order):
        chosen = best[: state.pool_capacity[pool]] + pool * counts.shape[1]
        state.slot_of[chosen] = state.pool_base[pool] + np.arange(len(chosen), dtype=np.int32)
        state.pool_size[pool] = len(chosen)
        state.where[chosen] = CACHED
        state.used[chosen] = 1


def make_decision(config: PolicyConfig) -> Decision:
    """Return decision buffers large enough for any visit of `config`."""
    experts = config.num_experts
    moves = experts * (1 + config.depth) + 1
    i32, i64 = np.int32, np.int64
    return Decision(
        item_expert=np.zeros(experts, i32), item_tokens=np.zeros(experts, i32), item_kernel=np.zeros(experts, i32),
        item_transfer=np.zeros(experts, i64), item_wait_key=np.zeros(experts, i32),
        move_key=np.zeros(moves, i32), move_class=np.zeros(moves, i32), move_target=np.zeros(moves, i64),
        move_kernel=np.zeros(moves, i32), move_wait_kernel=np.zeros(moves, i64),
        move_wait_writeback=np.zeros(moves, i64), move_slot=np.zeros(moves, i32),
        back_key=np.zeros(moves, i32), back_wait_kernel=np.zeros(moves, i64), back_move=np.zeros(moves, i32),
        promoted=np.zeros(2 * experts + 1, i64),
        promoted_target=np.zeros(2 * experts + 1, i64), size=np.zeros(8, i64),
    )  # fmt: skip
