"""What the offload decisions see and write: plain arrays in named tuples, so that compiled code and Python share them.

Modelled: logical state only. An expert is resident from the decision that admits it; whether its bytes have arrived is
time, and time is not here. Keys: `key = moe_layer * num_experts + expert`. A *visit* is one MoE layer of one step,
counted `step * num_layers + moe_layer` from the start of the run. A *slot* is a place in device memory for one expert.
A *kernel number* counts expert kernels in the order they are launched; it is what a transfer waits for before it may
overwrite a slot. Ignored: bytes, durations, everything physical.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ...base.errors import Internal
from ...specs.schedules.offload import CACHE_POLICIES, FETCHES, MISS_CHOICES, PLACEMENTS, PREDICTORS, OffloadSchedule

Array: TypeAlias = npt.NDArray[Any]

# Options as numbers, in the order of `schedule.CACHE_POLICIES` and its companions.
NONE, LRU, LFU, STATIC, BELADY, LEAST_STALE, AFFINITY, ACTIVATION, LFUDA = range(9)
GUESS_NONE, GUESS_ALL, GUESS_NEXT_GATE, GUESS_DIAL, GUESS_PRE_GATE, GUESS_ORACLE, GUESS_ACTIVATION = range(7)
ROUTED, WHOLE_LAYER, LAYER_STREAMED = range(3)
MISS_FETCH, MISS_CPU, MISS_CHEAPER, MISS_BALANCED = range(4)

# Where an expert is.
ABSENT, CACHED, STAGED, TRANSIENT = 0, 1, 2, 3

# Classes of transfers, in the order in which the copy engine serves them.
DEMAND, PREFETCH = 0, 1

# `PolicyState.count` indices.
(
    NEXT_TRANSFER, NEXT_KERNEL, NEXT_WRITEBACK, NEXT_STREAM,
    HITS, HITS_GUESSED, MISSES, PREFETCHES, PREFETCHES_USED, EXTRA_FETCHES, WRITEBACKS,
    PREFETCHES_DROPPED, EVICTIONS, PEAK_TRANSIENT, TRANSIENT_NOW, GUESSES_TRUE, TRUTHS,
    CPU_RUNS, CANCELLED, DISK_READS, LOW_FETCHES, BACKLOG_NS, LIBRARY_SIZE, LIBRARY_NEXT, NUM_COUNTS,
) = range(25)  # fmt: skip

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
    upload_tokens: int  # passes of at least so many tokens fetch their misses; 0: as `miss` says
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


# Rows of `PolicyState.keys`, one column an expert: what is asked of all experts of a layer lies side by side.
(
    WHERE,  # ABSENT, CACHED, STAGED or TRANSIENT
    USED,  # 0 from a prefetch until the first use
    FORMAT,  # weight format of the expert's copy; the latest one's under `low_rank`
    SLOT_OF,  # slot while CACHED or STAGED, else -1
    TOUCHED,  # last visit that used this expert
    FREQUENCY,  # tokens that used this expert; under lfuda since it last left the cache
    LINK_PREV,  # recency list; the column num_keys + p is pool p's sentinel
    LINK_NEXT,
    TARGET,  # visit an unused prefetch was made for
    TRANSFER,  # the latest transfer of this expert, -1 when it was there from the start
    SENT_TARGET,  # visit the latest transfer was first made for; where it stands in its queue
    NEXT_USE,  # next visit that will use it (belady only)
    MERIT,  # how likely an expert is thought to be wanted again (affinity, activation and lfuda only)
    IN_HOST,  # 0 where the expert must be read from disk
    HOST_PREV,  # recency of the host's memory; the column num_keys is the sentinel
    HOST_NEXT,
    NUM_KEY_ROWS,
) = range(17)
# From here on columns. Of `PolicyState.slots`, one line a slot: cache, staging, then stream.
(
    SLOT_KERNEL,  # last kernel that reads the slot, -1 when none
    SLOT_BACK,  # last write-back that reads the slot, -1 when none
    SLOT_PENDING,  # an unused prefetch into the slot, perhaps still on its way, -1 when none
    SLOT_PENDING_TARGET,  # the visit that prefetch was made for
    FREE_SLOT,  # not of this slot: the stacks of free slots of each pool, pool p from its POOL_BASE
    NUM_SLOT_COLUMNS,
) = range(6)
# Columns of `PolicyState.pools`, one line a pool and one more, which has only a base; the age is lfuda's.
POOL_SIZE, POOL_CAPACITY, POOL_BASE, POOL_AGE, NUM_POOL_COLUMNS = range(5)
# Columns of `PolicyState.staged`, one line a staging buffer: the key in it, -1 when empty, and its slot.
STAGED_KEY, STAGED_SLOT, NUM_STAGED_COLUMNS = range(3)
# Columns of `PolicyState.guesses`, scratch, one line an expert: SCORE by expert; by rank, the order in which guesses are
# fetched and the scores in that order (probabilities times 65536, or sums of them).
SCORE, RANKED, RANKED_SCORE, NUM_GUESS_COLUMNS = range(4)
# Lines of `PolicyState.requests`: tokens of the current request, those of the library's nearest entry, then the library.
REQUEST, MATCHED, LIBRARY = range(3)
# Columns of `PolicyState.prices` and of `PolicyState.work_ns`.
COPY_NS, VISIT_NS = range(2)
ON_DEVICE, ON_CORES = range(2)

# A static cache lets its misses pass through two buffers, so that one fills while the other is read.
NUM_STREAM = 2


class StateArrays(NamedTuple):
    """Everything the decisions remember, in few arrays of whole numbers: compiled code passes each as nine values.

    `num_keys = num_layers * num_experts`; slots number the cache, staging and stream places together.
    """

    keys: Array  # int64 [NUM_KEY_ROWS, num_keys + num_pools]
    slots: Array  # int64 [num_slots, NUM_SLOT_COLUMNS]
    pools: Array  # int64 [num_pools + 1, NUM_POOL_COLUMNS]
    staged: Array  # int64 [staging, NUM_STAGED_COLUMNS]
    guesses: Array  # int64 [num_experts, NUM_GUESS_COLUMNS]
    followers: (
        Array  # int32 [num_layers, num_experts, num_experts]: how often one expert's visit was followed by another's
    )
    requests: Array  # int64 [2 + library, num_keys]: tokens that used each expert (activation only)
    prices: Array  # int64 [num_formats, 2]: one expert's transfer, and a mean visit (see `Prices`)
    work_ns: Array  # int64 [num_formats, max_expert_tokens + 1, 2]: one expert on the device and on the host's cores
    count: Array  # type: ignore[assignment]  # int64 [NUM_COUNTS]; nobody asks a state for tuple.count


class DecisionArrays(NamedTuple):
    """What one visit decided, in buffers that are overwritten by the next visit. Lengths are in `size`."""

    items: Array  # int64 [num_experts, NUM_ITEM_COLUMNS]: experts in kernel order
    cores: Array  # int64 [num_experts, NUM_CORE_COLUMNS]: experts that run on the host's cores, one after the other
    moves: Array  # int64 [most, NUM_MOVE_COLUMNS]: transfers as submitted; ids run on from size[FIRST_TRANSFER]
    backs: Array  # int64 [most, NUM_BACK_COLUMNS]: write-backs; ids run on from size[FIRST_BACK]
    promotions: (
        Array  # int64 [most, NUM_PROMOTION_COLUMNS]: earlier transfers that are now demanded, rising: used guesses, and
    )
    # those whose slot or buffer is given to another
    size: Array  # int64 [NUM_SIZES]: lengths of the lists above, then the first ids of this visit


# Columns of `Decision.items`; `Decision.cores` has the first three.
(
    ITEM_EXPERT,
    ITEM_TOKENS,
    ITEM_FORMAT,  # weight format it is computed in
    ITEM_KERNEL,  # kernel of each, counted from 0 within the visit, not falling
    ITEM_TRANSFER,  # transfer that must have arrived, -1 when none
    ITEM_KEY,  # key of that transfer
    NUM_ITEM_COLUMNS,
) = range(7)
NUM_CORE_COLUMNS = 3
(
    MOVE_KEY,
    MOVE_CLASS,  # DEMAND or PREFETCH
    MOVE_TARGET,  # visit it is for
    MOVE_KERNEL,  # kernel of this visit that needs it, -1 for prefetches
    MOVE_WAIT_KERNEL,  # kernel number that must have finished with the slot, -1 when none
    MOVE_WAIT_BACK,  # write-back that must have left the slot, -1 when none
    MOVE_SLOT,  # slot it fills, -1 for a transient buffer
    MOVE_FORMAT,  # weight format that moves
    MOVE_DISK,  # the disk read that must have ended, counted from 0, -1 when the host has the expert
    NUM_MOVE_COLUMNS,
) = range(10)
(
    BACK_KEY,
    BACK_FORMAT,
    BACK_WAIT_KERNEL,  # kernel number that must have finished with the slot, -1 when none
    BACK_MOVE,  # the write-back is submitted together with this transfer of the visit
    NUM_BACK_COLUMNS,
) = range(5)
# A promoted transfer and the visit it was made for.
PROMOTED, PROMOTED_TARGET, NUM_PROMOTION_COLUMNS = range(3)
(SIZE_ITEMS, SIZE_KERNELS, SIZE_MOVES, SIZE_BACKS, SIZE_PROMOTED, SIZE_CPU, FIRST_TRANSFER, FIRST_KERNEL, FIRST_BACK,
 NUM_SIZES) = range(10)  # fmt: skip


class _Column:
    """One column under a name of its own, as a view: `out.item_expert` is `out.items[:, ITEM_EXPERT]`."""

    def __init__(self, array: str, column: int) -> None:
        self.array, self.column = array, column

    def __get__(self, owner: Any, kind: type | None = None) -> Array:
        view: Array = getattr(owner, self.array)[:, self.column]
        return view


class _KeyRow:
    """One row of `keys` under a name of its own, as a view without the sentinels."""

    def __init__(self, row: int) -> None:
        self.row = row

    def __get__(self, owner: PolicyState, kind: type | None = None) -> Array:
        view: Array = owner.keys[self.row, : owner.num_keys]
        return view


class PolicyState(StateArrays):
    """The arrays of a state, with what they hold by name for Python; compiled code says `state.keys[WHERE, key]`."""

    __slots__ = ()

    where, used, format = _KeyRow(WHERE), _KeyRow(USED), _KeyRow(FORMAT)
    slot_of, touched, frequency = _KeyRow(SLOT_OF), _KeyRow(TOUCHED), _KeyRow(FREQUENCY)
    target, transfer, sent_target = _KeyRow(TARGET), _KeyRow(TRANSFER), _KeyRow(SENT_TARGET)
    next_use, merit, in_host = _KeyRow(NEXT_USE), _KeyRow(MERIT), _KeyRow(IN_HOST)
    slot_kernel, slot_writeback = _Column("slots", SLOT_KERNEL), _Column("slots", SLOT_BACK)
    slot_pending, slot_pending_target = _Column("slots", SLOT_PENDING), _Column("slots", SLOT_PENDING_TARGET)
    pool_base, pool_free = _Column("pools", POOL_BASE), _Column("slots", FREE_SLOT)
    staged_key, staged_slot = _Column("staged", STAGED_KEY), _Column("staged", STAGED_SLOT)

    @property
    def num_keys(self) -> int:
        """Experts of all layers: the lines of `keys` that are no sentinels."""
        return int(self.keys.shape[1]) - (len(self.pools) - 1)

    @property
    def pool_size(self) -> Array:
        """Slots taken in each pool."""
        return self.pools[:-1, POOL_SIZE]

    @property
    def pool_capacity(self) -> Array:
        """Slots of each pool."""
        return self.pools[:-1, POOL_CAPACITY]

    @property
    def stream_slot(self) -> Array:
        """Slots that a static cache's misses pass through: those behind the cache's and the staging buffers'."""
        return np.arange(self.pools[-1, POOL_BASE] + len(self.staged), len(self.slots))


class Decision(DecisionArrays):
    """The arrays of a decision, with their columns by name for Python."""

    __slots__ = ()

    item_expert, item_tokens = _Column("items", ITEM_EXPERT), _Column("items", ITEM_TOKENS)
    item_kernel, item_transfer = _Column("items", ITEM_KERNEL), _Column("items", ITEM_TRANSFER)
    item_wait_key, item_format = _Column("items", ITEM_KEY), _Column("items", ITEM_FORMAT)
    cpu_expert, cpu_tokens = _Column("cores", ITEM_EXPERT), _Column("cores", ITEM_TOKENS)
    cpu_format = _Column("cores", ITEM_FORMAT)
    move_key, move_class, move_target = (
        _Column("moves", MOVE_KEY),
        _Column("moves", MOVE_CLASS),
        _Column("moves", MOVE_TARGET),
    )
    move_kernel, move_slot, move_format = (
        _Column("moves", MOVE_KERNEL),
        _Column("moves", MOVE_SLOT),
        _Column("moves", MOVE_FORMAT),
    )
    move_wait_kernel, move_wait_writeback = _Column("moves", MOVE_WAIT_KERNEL), _Column("moves", MOVE_WAIT_BACK)
    move_disk = _Column("moves", MOVE_DISK)
    back_key, back_format = _Column("backs", BACK_KEY), _Column("backs", BACK_FORMAT)
    back_wait_kernel, back_move = _Column("backs", BACK_WAIT_KERNEL), _Column("backs", BACK_MOVE)
    promoted, promoted_target = _Column("promotions", PROMOTED), _Column("promotions", PROMOTED_TARGET)


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
        upload_tokens=schedule.kernel.upload_tokens or 0,
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
    if needs_prices(config) and prices is None:
        raise Internal("decisions that weigh costs were given none")
    pools = np.zeros((num_pools + 1, NUM_POOL_COLUMNS), np.int64)
    if config.policy != NONE:
        pools[:-1, POOL_CAPACITY] = capacities
        pools[1:, POOL_BASE] = np.cumsum(capacities)
    num_cached = int(pools[-1, POOL_BASE])
    staged = np.full((config.staging, NUM_STAGED_COLUMNS), -1, np.int64)
    staged[:, STAGED_SLOT] = np.arange(num_cached, num_cached + config.staging)
    num_slots = num_cached + config.staging + (NUM_STREAM if config.policy == STATIC else 0)
    slots = np.full((num_slots, NUM_SLOT_COLUMNS), -1, np.int64)
    for low, high in itertools.pairwise(
        pools[:, POOL_BASE]
    ):  # the stack pops from its end, so the lowest is used first
        slots[low:high, FREE_SLOT] = np.arange(high - 1, low - 1, -1)
    keys = np.zeros((NUM_KEY_ROWS, num_keys + num_pools), np.int64)
    for row in (SLOT_OF, TOUCHED, TARGET, TRANSFER, SENT_TARGET):
        keys[row] = -1
    for row in (LINK_PREV, LINK_NEXT, HOST_PREV, HOST_NEXT):  # empty lists: everyone is his own neighbour
        keys[row] = np.arange(keys.shape[1])
    keys[IN_HOST] = config.host_experts == 0
    keys[NEXT_USE, :num_keys] = FAR if first_use is None else first_use
    if formats is not None:
        keys[FORMAT, :num_keys] = formats
    pairs = (config.num_layers, config.num_experts, config.num_experts) if config.policy == AFFINITY else (0, 0, 0)
    weighed = no_prices() if prices is None else prices
    work = np.zeros((*weighed.device_ns.shape, 2), np.int64)
    work[..., ON_DEVICE] = weighed.device_ns
    if weighed.cpu_ns.size:
        work[..., ON_CORES] = weighed.cpu_ns
    state = PolicyState(
        keys=keys, slots=slots, pools=pools, staged=staged,
        guesses=np.zeros((config.num_experts, NUM_GUESS_COLUMNS), np.int64),
        followers=np.zeros(pairs, np.int32),
        requests=np.zeros((LIBRARY + config.library, num_keys) if config.library else (0, 0), np.int64),
        prices=np.stack(np.broadcast_arrays(weighed.copy_ns, weighed.visit_ns), axis=1),
        work_ns=work,
        count=np.zeros(NUM_COUNTS, np.int64),
    )  # fmt: skip
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
    """Fill the host's memory with the most popular experts that are not on the device, the most popular the most recent."""
    sentinel = config.num_layers * config.num_experts
    chosen = np.lexsort((-popularity.ravel(), state.where == CACHED))[: config.host_experts]
    chain = np.concatenate(([sentinel], chosen, [sentinel]))
    state.keys[HOST_NEXT, chain[:-1]] = chain[1:]
    state.keys[HOST_PREV, chain[1:]] = chain[:-1]
    state.in_host[chosen] = 1


def make_decision(config: PolicyConfig) -> Decision:
    """Return decision buffers large enough for any visit of `config`."""
    experts = config.num_experts
    moves = experts * (1 + config.depth) + 1

    def lines(most: int, columns: int) -> Array:
        return np.zeros((most, columns), np.int64)

    return Decision(
        items=lines(experts, NUM_ITEM_COLUMNS), cores=lines(experts, NUM_CORE_COLUMNS), moves=lines(moves, NUM_MOVE_COLUMNS),
        backs=lines(moves, NUM_BACK_COLUMNS), promotions=lines(experts + moves, NUM_PROMOTION_COLUMNS),
        size=np.zeros(NUM_SIZES, np.int64),
    )  # fmt: skip
