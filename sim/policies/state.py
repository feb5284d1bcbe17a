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

from ...errors import Internal
from ...schedule import CACHE_POLICIES, FETCHES, MISS_CHOICES, PLACEMENTS, PREDICTORS, OffloadSchedule

Array: TypeAlias = npt.NDArray[Any]

# Options as numbers, in the order of `schedule.CACHE_POLICIES` and its companions.
NONE, LRU, LFU, STATIC, BELADY, LEAST_STALE, AFFINITY, ACTIVATION = range(8)
GUESS_NONE, GUESS_ALL, GUESS_NEXT_GATE, GUESS_DIAL, GUESS_PRE_GATE, GUESS_ORACLE, GUESS_ACTIVATION = range(7)
ROUTED, WHOLE_LAYER, LAYER_STREAMED = range(3)
MISS_FETCH, MISS_CPU, MISS_CHEAPER, MISS_BALANCED = range(4)

# Where an expert is.
ABSENT, CACHED, STAGED, TRANSIENT = 0, 1, 2, 3

# Classes of transfers, in the order in which the copy engine serves them.
DEMAND, PREFETCH = 0, 1

# `PolicyState.count` indices.
(
    NEXT_TRANSFER, NEXT_KERNEL, NEXT_WRITEBACK, NEXT_STREAM, CLOCK,
    HITS, HITS_GUESSED, MISSES, PREFETCHES, PREFETCHES_USED, EXTRA_FETCHES, WRITEBACKS,
    PREFETCHES_DROPPED, EVICTIONS, PEAK_TRANSIENT, TRANSIENT_NOW, GUESSES_TRUE, TRUTHS,
    CPU_RUNS, CANCELLED, DISK_READS, LOW_FETCHES, BACKLOG_NS, LIBRARY_SIZE, LIBRARY_NEXT, NUM_COUNTS,
) = range(26)  # fmt: skip

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
    miss: int
    threshold_65536: int
    benefit: int
    library: int
    cancel: int
    low_rank: int  # a miss that no token ranks above this is fetched in the second format; -1: never
    host_experts: int  # 0: the host holds all
    placement: int  # of a static cache, in the order of `schedule.PLACEMENTS`


class Prices(NamedTuple):
    """Predicted costs that decisions may weigh, in nanoseconds; the run's own cost tables, never observed time."""

    copy_ns: Array  # int64 [num_formats]: one expert's transfer
    device_ns: Array  # int64 [num_formats, max_expert_tokens + 1]: one expert on the device
    cpu_ns: Array  # int64 [num_formats, max_expert_tokens + 1]: one expert on the host's cores; empty where unknown
    visit_ns: Array  # int64 [1]: what the stream is busy with from one visit to the next


def no_prices() -> Prices:
    """Return prices for schedules that weigh nothing."""
    none = np.zeros((1, 0), np.int64)
    return Prices(copy_ns=np.zeros(2, np.int64), device_ns=none, cpu_ns=none, visit_ns=np.zeros(1, np.int64))


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
    merit: Array  # int64 [num_keys]: how likely an expert is thought to be wanted again (affinity and activation only)
    followers: (
        Array  # int32 [num_layers, num_experts, num_experts]: how often one expert's visit was followed by another's
    )
    format: Array  # uint8 [num_keys]: weight format of each expert's copy; the latest one's under `low_rank`
    in_host: Array  # uint8 [num_keys]: 0 where the expert must be read from disk
    host_prev: Array  # int32 [num_keys + 1]: recency of the host's memory; the last entry is the sentinel
    host_next: Array  # int32 [num_keys + 1]
    request: Array  # int64 [num_keys]: tokens of the current request that used each expert (activation only)
    library: Array  # int64 [library, num_keys]: the same of earlier requests
    matched: Array  # int64 [num_keys]: the library's nearest entry
    prices: Prices
    score: Array  # int64 [num_experts]: scratch for ranking guesses
    ranked_score: Array  # int64 [num_experts]: the scores of `ranked`, probabilities times 65536 or sums of them
    ranked: Array  # int32 [num_experts]: scratch, guesses in the order in which they are fetched
    count: Array  # type: ignore[assignment]  # int64 [NUM_COUNTS]; nobody asks a state for tuple.count


class Decision(NamedTuple):
    """What one visit decided, in buffers that are overwritten by the next visit. Lengths are in `size`."""

    item_expert: Array  # int32: experts in kernel order
    item_tokens: Array  # int32: tokens of each
    item_kernel: Array  # int32: kernel of each, counted from 0 within the visit, not falling
    item_transfer: Array  # int64: transfer that must have arrived, -1 when none
    item_wait_key: Array  # int32: key of that transfer
    item_format: Array  # int32: weight format it is computed in
    cpu_expert: Array  # int32: experts that run on the host's cores, one after the other
    cpu_tokens: Array  # int32
    cpu_format: Array  # int32
    move_key: Array  # int32: transfers in the order they are submitted; ids run on from first_transfer
    move_class: Array  # int32: DEMAND or PREFETCH
    move_target: Array  # int64: visit it is for
    move_kernel: Array  # int32: kernel of this visit that needs it, -1 for prefetches
    move_wait_kernel: Array  # int64: kernel number that must have finished with the slot, -1 when none
    move_wait_writeback: Array  # int64: write-back that must have left the slot, -1 when none
    move_slot: Array  # int32: slot it fills, -1 for a transient buffer
    move_format: Array  # int32: weight format that moves
    move_disk: Array  # int64: the disk read that must have ended, counted from 0, -1 when the host has the expert
    back_key: Array  # int32: write-backs; ids run on from first_writeback
    back_format: Array  # int32
    back_wait_kernel: Array  # int64
    back_move: Array  # int32: the write-back is submitted together with this transfer of the visit
    promoted: Array  # int64: earlier transfers that are now demanded, rising
    promoted_target: Array  # int64: the visit each was made for
    size: Array  # int64 [NUM_SIZES]: lengths of the lists above, then the first ids of this visit


(SIZE_ITEMS, SIZE_KERNELS, SIZE_MOVES, SIZE_BACKS, SIZE_PROMOTED, SIZE_CPU, FIRST_TRANSFER, FIRST_KERNEL, FIRST_BACK,
 NUM_SIZES) = range(10)  # fmt: skip


def uses_requests(schedule: OffloadSchedule) -> bool:
    """Return whether decisions look at what earlier requests used."""
    return schedule.predictor.kind == "activation" or schedule.cache.policy == "activation"


def needs_prices(config: PolicyConfig) -> bool:
    """Return whether decisions weigh predicted costs."""
    return config.miss in (MISS_CHEAPER, MISS_BALANCED) or config.benefit == 1


def make_config(schedule: OffloadSchedule, *, num_layers: int, num_experts: int, top_k: int,
                guess_distances: int, guess_width: int) -> PolicyConfig:  # fmt: skip
    """Return the compiled form of `schedule`'s logical options."""
    cache, predictor = schedule.cache, schedule.predictor
    return PolicyConfig(
        policy=CACHE_POLICIES.index(cache.policy),
        predictor=PREDICTORS.index(predictor.kind),
        depth=predictor.depth,
        width=predictor.width or top_k,
        staging=predictor.staging,
        grouped=int(schedule.kernel.grouping == "grouped"),
        write_back=int(schedule.copy.write_back),
        fetch_layer=FETCHES.index(schedule.copy.fetch),
        num_layers=num_layers,
        num_experts=num_experts,
        pooled=int(cache.pooled_experts is not None),
        recall_65536=round(predictor.recall * 65536),
        recall_decay_65536=round(predictor.recall_decay * 65536),
        seed=predictor.seed,
        guess_distances=guess_distances,
        guess_width=guess_width,
        miss=MISS_CHOICES.index(schedule.kernel.miss),
        threshold_65536=round(predictor.threshold * 65536),
        benefit=int(predictor.benefit),
        library=predictor.library if uses_requests(schedule) else 0,
        cancel=int(schedule.copy.cancel),
        low_rank=-1 if schedule.experts.low_rank is None else schedule.experts.low_rank,
        host_experts=schedule.copy.host_experts or 0,
        placement=PLACEMENTS.index(cache.placement),
    )  # fmt: skip


def make_state(
    config: PolicyConfig, *, capacities: Array, popularity: Array | None, first_use: Array | None,
    formats: Array | None = None, prices: Prices | None = None,
) -> PolicyState:  # fmt: skip
    """Return the state before the first visit.

    capacities: int [num_pools] slots of each layer's cache, or of the one pooled cache.
    popularity: int [num_layers, num_experts] tokens per expert, needed by a static cache, which starts full.
    first_use: int64 [num_keys] first visit that uses each expert (FAR when none does), needed by belady.
    formats: int [num_keys] weight format of each expert; None: all are of the first.
    prices: predicted costs, needed where `needs_prices` says so.
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
    host_links = np.arange(num_keys + 1, dtype=np.int32)
    remembered = num_keys if config.library else 0
    weighed = num_keys if config.policy in (AFFINITY, ACTIVATION) else 0
    pairs = (config.num_layers, config.num_experts, config.num_experts) if config.policy == AFFINITY else (0, 0, 0)
    if needs_prices(config) and prices is None:
        raise Internal("decisions that weigh costs were given none")
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
        merit=np.zeros(weighed, np.int64),
        followers=np.zeros(pairs, np.int32),
        format=np.zeros(num_keys, np.uint8) if formats is None else formats.astype(np.uint8),
        in_host=np.full(num_keys, config.host_experts == 0, np.uint8),
        host_prev=host_links.copy(),
        host_next=host_links.copy(),
        request=np.zeros(remembered, np.int64),
        library=np.zeros((config.library, remembered), np.int64),
        matched=np.zeros(remembered, np.int64),
        prices=no_prices() if prices is None else prices,
        score=np.zeros(config.num_experts, np.int64),
        ranked_score=np.zeros(config.num_experts, np.int64),
        ranked=np.zeros(config.num_experts, np.int32),
        count=np.zeros(NUM_COUNTS, np.int64),
    )
    if popularity is not None:
        if config.policy == STATIC:
            _preload(config, state, popularity)
        if config.host_experts:
            _load_host(config, state, popularity)
    return state


def _preload(config: PolicyConfig, state: PolicyState, popularity: Array) -> None:
    """Fill a static cache: with the most popular experts, or by place, of each layer, or of all when it is pooled."""
    counts = popularity.reshape(config.num_layers, config.num_experts)
    if PLACEMENTS[config.placement] != "popularity":
        layer, expert = np.indices(counts.shape)
        counts = {"uniform": -expert, "front": -layer, "back": layer}[PLACEMENTS[config.placement]]
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


def _load_host(config: PolicyConfig, state: PolicyState, popularity: Array) -> None:
    """Fill the host's memory with the most popular experts of all, the most popular the most recent."""
    sentinel = config.num_layers * config.num_experts
    chosen = np.argsort(-popularity.ravel(), kind="stable")[: config.host_experts]
    chain = np.concatenate(([sentinel], chosen, [sentinel]))
    state.host_next[chain[:-1]] = chain[1:]
    state.host_prev[chain[1:]] = chain[:-1]
    state.in_host[chosen] = 1


def make_decision(config: PolicyConfig) -> Decision:
    """Return decision buffers large enough for any visit of `config`."""
    experts = config.num_experts
    moves = experts * (1 + config.depth) + 1
    i32, i64 = np.int32, np.int64
    return Decision(
        item_expert=np.zeros(experts, i32), item_tokens=np.zeros(experts, i32), item_kernel=np.zeros(experts, i32),
        item_transfer=np.zeros(experts, i64), item_wait_key=np.zeros(experts, i32), item_format=np.zeros(experts, i32),
        cpu_expert=np.zeros(experts, i32), cpu_tokens=np.zeros(experts, i32), cpu_format=np.zeros(experts, i32),
        move_key=np.zeros(moves, i32), move_class=np.zeros(moves, i32), move_target=np.zeros(moves, i64),
        move_kernel=np.zeros(moves, i32), move_wait_kernel=np.zeros(moves, i64),
        move_wait_writeback=np.zeros(moves, i64), move_slot=np.zeros(moves, i32),
        move_format=np.zeros(moves, i32), move_disk=np.zeros(moves, i64),
        back_key=np.zeros(moves, i32), back_format=np.zeros(moves, i32), back_wait_kernel=np.zeros(moves, i64),
        back_move=np.zeros(moves, i32),
        promoted=np.zeros(2 * experts + 1, i64),
        promoted_target=np.zeros(2 * experts + 1, i64), size=np.zeros(NUM_SIZES, i64),
    )  # fmt: skip
