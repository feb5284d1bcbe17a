"""What the offload decisions see and write: plain arrays in named tuples, so that compiled code and Python share them.

Modelled: logical state only. An expert is resident from the decision that admits it; whether its bytes have arrived is
time, and time is not here. Keys: `key = moe_layer * num_experts + expert`. A *layer step* is one MoE layer of one step,
counted `step * num_layers + moe_layer` from the start of the run. A *slot* is a place in device memory for one expert.
A *kernel number* counts expert kernels in the order they are launched; it is what a transfer waits for before it may
overwrite a slot. Ignored: bytes, durations, everything physical.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...base.errors import Internal
from ...base.records import Array as Array
from ...base.records import lines_of, records
from ...specs.schedules import rules
from ...specs.schedules.offload import CACHE_POLICIES, FETCHES, MISS_CHOICES, PLACEMENTS, PREDICTORS, OffloadSchedule
from .bundled import knows_future
from .records import (
    ASKED,
    BACK,
    BUFFER,
    CORE_ITEM,
    COUNTS,
    FAULT,
    GUESS,
    ITEM,
    KEY,
    MARK,
    MOVE,
    POOL,
    PRICE,
    PROMOTION,
    QUEUED_KEY,
    RULES,
    SIZES,
    SLOT,
    WORK,
)

# Options as numbers, in the order of `schedule.CACHE_POLICIES` and its companions.
NONE, LRU, LFU, STATIC, BELADY, LEAST_STALE, AFFINITY, ACTIVATION, LFUDA, CUSTOM = range(10)
GUESS_NONE, GUESS_ALL, GUESS_NEXT_GATE, GUESS_DIAL, GUESS_PRE_GATE, GUESS_ORACLE, GUESS_ACTIVATION = range(7)
ROUTED, WHOLE_LAYER, LAYER_STREAMED = range(3)
MISS_FETCH, MISS_CPU, MISS_CHEAPER, MISS_BALANCED, MISS_CUSTOM = range(5)

# Where an expert is.
ABSENT, CACHED, STAGED, TRANSIENT = 0, 1, 2, 3

# Classes of transfers, in the order in which the copy engine serves them.
DEMAND, PREFETCH = 0, 1

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
    scored: int  # 0, or one more than the number of the policy file's rule that ranks guesses
    future: int  # 1 where victims are chosen by next uses
    placement: int  # of a static cache, in the order of `schedule.PLACEMENTS`


class Prices(NamedTuple):
    """Predicted costs that decisions may weigh, in nanoseconds; the run's own cost tables, never observed time."""

    copy_ns: Array  # int64 [num_formats]: one expert's transfer
    device_ns: Array  # int64 [num_formats, max_expert_tokens + 1]: one expert on the device
    cpu_ns: Array  # int64 [num_formats, max_expert_tokens + 1]: one expert on the host's cores; empty where unknown
    layer_step_ns: Array  # int64 [1]: what the stream is busy with from one layer step to the next


def no_prices() -> Prices:
    """Return prices for schedules that weigh nothing."""
    none = np.zeros((1, 0), np.int64)
    return Prices(copy_ns=np.zeros(2, np.int64), device_ns=none, cpu_ns=none, layer_step_ns=np.zeros(1, np.int64))


# The most values that a rule is given, and the place behind them where a guess's score is answered.
MOST_ASKED = 16
ANSWER = MOST_ASKED - 1

# A static cache lets its misses pass through two buffers, so that one fills while the other is read.
NUM_STREAM = 2


class PolicyState(NamedTuple):
    """Everything the decisions remember, in few arrays: compiled code passes each as seven values.

    `num_keys = num_layers * num_experts`; slots number the cache, staging and stream places together.
    """

    keys: Array  # KEY [num_keys + num_pools]: experts, then the sentinels of the pools' recency lists
    slots: Array  # SLOT [num_slots]
    pools: Array  # POOL [num_pools + 1]
    staged: Array  # BUFFER [staging]
    guesses: Array  # GUESS [num_experts]
    followers: Array  # int32 [num_layers, num_experts, num_experts]: how often one expert was followed by another
    requests: Array  # ASKED [num_keys], of length zero where decisions do not look at earlier requests
    library: Array  # int64 [library, num_keys]: tokens that used each expert in earlier requests
    queue: (
        Array  # QUEUED_KEY [num_keys]: a heap, where one pool gives up what the fewest tokens used; else of length zero
    )
    marks: Array  # MARK [num_keys], likewise
    prices: Array  # PRICE [num_formats]
    work_ns: Array  # WORK [num_formats, max_expert_tokens + 1]
    counts: Array  # COUNTS [1]
    rules: Array  # RULES [1]
    fault: Array  # FAULT [1]
    asked: Array  # float64 [MOST_ASKED]: what the rule at fault was given

    @property
    def num_keys(self) -> int:
        """Experts of all layers: the lines of `keys` that are no sentinels."""
        return len(self.keys) - (len(self.pools) - 1)

    @property
    def experts(self) -> Array:
        """The lines of `keys` that are no sentinels, as a view."""
        return self.keys[: self.num_keys]


class Decision(NamedTuple):
    """What one layer step decided, in buffers that are overwritten by the next. Lengths are in `size`."""

    items: Array  # ITEM [num_experts]: experts in kernel order
    cores: Array  # CORE_ITEM [num_experts]: experts that run on the host's cores, one after the other
    moves: Array  # MOVE [most]: transfers as submitted; ids run on from `size[0].first_transfer`
    backs: Array  # BACK [most]: write-backs; ids run on from `size[0].first_back`
    promotions: Array  # PROMOTION [most]: earlier transfers that are now demanded, rising: used guesses, and
    # those whose slot or buffer is given to another
    size: Array  # SIZES [1]


class Decided(NamedTuple):
    """A decision read for Python: lists as long as what was decided, of lines with the same names."""

    items: list[Any]
    cores: list[Any]
    moves: list[Any]
    backs: list[Any]
    promotions: list[Any]
    size: Any


def read_decision(out: Decision) -> Decided:
    """Return what a layer step decided; it stays as it is when the buffers are overwritten."""
    (size,) = lines_of(out.size)
    return Decided(
        items=lines_of(out.items[: size.items]), cores=lines_of(out.cores[: size.cores]), moves=lines_of(out.moves[: size.moves]),
        backs=lines_of(out.backs[: size.backs]), promotions=lines_of(out.promotions[: size.promoted]), size=size,
    )  # fmt: skip


def uses_requests(schedule: OffloadSchedule) -> bool:
    """Return whether decisions look at what earlier requests used."""
    return schedule.predictor.kind == "activation" or schedule.cache.policy == "activation"


def needs_prices(config: PolicyConfig) -> bool:
    """Return whether decisions weigh predicted costs."""
    return config.miss >= MISS_CHEAPER or config.benefit == 1 or config.scored > 0


def _number(name: str, bundled: tuple[str, ...], kind: str) -> int:
    """Return the number of a name: bundled ones first, then those that policy files have added."""
    return (*bundled, *rules.added(kind)).index(name)


def make_config(schedule: OffloadSchedule, *, num_layers: int, num_experts: int, top_k: int,
                guess_distances: int, guess_width: int) -> PolicyConfig:  # fmt: skip
    """Return the compiled form of `schedule`'s logical options."""
    cache, predictor = schedule.cache, schedule.predictor
    return PolicyConfig(
        policy=_number(cache.policy, CACHE_POLICIES, rules.VICTIM),
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
        miss=_number(schedule.kernel.miss, MISS_CHOICES, rules.MISS),
        threshold_65536=round(predictor.threshold * 65536),
        benefit=int(predictor.benefit),
        library=predictor.library if uses_requests(schedule) else 0,
        cancel=int(schedule.copy.cancel),
        low_rank=-1 if schedule.experts.low_rank is None else schedule.experts.low_rank,
        host_experts=schedule.copy.host_experts or 0,
        upload_tokens=schedule.kernel.upload_tokens or 0,
        scored=0 if predictor.score is None else 1 + rules.added(rules.PREFETCH).index(predictor.score),
        future=int(knows_future(cache.policy)),
        placement=PLACEMENTS.index(cache.placement),
    )  # fmt: skip


def make_state(
    config: PolicyConfig, *, capacities: Array, popularity: Array | None, first_use: Array | None,
    formats: Array | None = None, prices: Prices | None = None,
) -> PolicyState:  # fmt: skip
    """Return the state before the first layer step.

    capacities: int [num_pools] slots of each layer's cache, or of the one pooled cache.
    popularity: int [num_layers, num_experts] tokens per expert, needed by a static cache, which starts full.
    first_use: int64 [num_keys] first layer step that uses each expert (FAR when none does), needed by belady.
    formats: int [num_keys] weight format of each expert; None: all are of the first.
    prices: predicted costs, needed where `needs_prices` says so.
    """
    num_keys = config.num_layers * config.num_experts
    num_pools = 1 if config.pooled else config.num_layers
    if needs_prices(config) and prices is None:
        raise Internal("decisions that weigh costs were given none")
    pools = records(POOL, num_pools + 1)
    if config.policy != NONE:
        pools["capacity"][:-1] = capacities
        pools["first_slot"][1:] = np.cumsum(capacities)
    num_cached = int(pools[-1].first_slot)
    staged = records(BUFFER, config.staging, fill=-1)
    staged["slot"] = np.arange(num_cached, num_cached + config.staging)
    slots = records(SLOT, num_cached + config.staging + (NUM_STREAM if config.policy == STATIC else 0), fill=-1)
    slots["buffer"][num_cached : num_cached + config.staging] = np.arange(config.staging)
    # The stack pops from its end, so the lowest is used first.
    low, high = pools["first_slot"][:-1], pools["first_slot"][1:]
    slots["free_slot"][:num_cached] = np.repeat(low + high - 1, high - low) - np.arange(num_cached)
    keys = records(KEY, num_keys + num_pools)
    for field in ("slot", "touched", "target", "transfer", "sent_target"):
        keys[field] = -1
    for field in ("prev", "next", "host_prev", "host_next"):  # empty lists: everyone is his own neighbour
        keys[field] = np.arange(len(keys))
    keys["in_host"] = config.host_experts == 0
    keys["next_use"][:num_keys] = FAR if first_use is None else first_use
    if formats is not None:
        keys["format"][:num_keys] = formats
    pairs = (config.num_layers, config.num_experts, config.num_experts) if config.policy == AFFINITY else (0, 0, 0)
    weighed = no_prices() if prices is None else prices
    work = np.zeros(weighed.device_ns.shape, WORK)
    work["on_device"] = weighed.device_ns
    if weighed.cpu_ns.size:
        work["on_cores"] = weighed.cpu_ns
    num_queued = num_keys if config.policy == LFU and config.pooled else 0
    price = records(PRICE, len(weighed.copy_ns))
    price["copy_ns"], price["layer_step_ns"] = weighed.copy_ns, weighed.layer_step_ns
    state = PolicyState(
        keys=keys, slots=slots, pools=pools, staged=staged, guesses=records(GUESS, config.num_experts),
        followers=np.zeros(pairs, np.int32), requests=records(ASKED, num_keys if config.library else 0),
        library=np.zeros((config.library, num_keys) if config.library else (0, 0), np.int64),
        queue=records(QUEUED_KEY, num_queued), marks=records(MARK, num_queued), prices=price, work_ns=work,
        counts=records(COUNTS), rules=records(RULES), fault=records(FAULT), asked=np.zeros(MOST_ASKED),
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
    order = order_of_places(counts, PLACEMENTS[config.placement], pooled=bool(config.pooled))
    pools, experts, width = state.pools[:-1], state.experts, order.shape[1]
    rank: Array = np.arange(width)
    held: Array = rank < pools["capacity"][:, None]
    chosen = (order + np.arange(len(order))[:, None] * width)[held]
    experts["slot"][chosen] = (pools["first_slot"][:, None] + rank)[held]
    experts["where"][chosen] = CACHED
    experts["used"][chosen] = 1
    pools["taken"] = held.sum(axis=1)


def order_of_places(popularity: Array, placement: str, *, pooled: bool) -> Array:
    """Return experts in the order in which a static cache takes them: [num_layers, num_experts], or, of one pool, [1, all of them].

    popularity: int [num_layers, num_experts]; placement: one of `schedule.PLACEMENTS`.
    """
    counts = popularity
    if placement != "popularity":
        places: Array = np.indices(popularity.shape)
        layer: Array = places[0]
        expert: Array = places[1]
        counts = {"uniform": -expert, "front": -layer, "back": layer}[placement]
    if pooled:
        counts = counts.reshape(1, -1)
    # Stable sorting of falling counts settles equal counts by rising key, the same way everywhere.
    order: Array = np.argsort(-counts, axis=1, kind="stable")
    return order


def _load_host(config: PolicyConfig, state: PolicyState, popularity: Array) -> None:
    """Fill the host's memory with the most popular experts that are not on the device, the most popular the most recent."""
    sentinel = config.num_layers * config.num_experts
    chosen = np.lexsort((-popularity.ravel(), state.experts["where"] == CACHED))[: config.host_experts]
    chain = np.concatenate(([sentinel], chosen, [sentinel]))
    state.keys["host_next"][chain[:-1]] = chain[1:]
    state.keys["host_prev"][chain[1:]] = chain[:-1]
    state.keys["in_host"][chosen] = 1


def make_decision(config: PolicyConfig) -> Decision:
    """Return decision buffers large enough for any layer step of `config`."""
    experts = config.num_experts
    moves = experts * (1 + config.depth) + 1
    return Decision(
        items=records(ITEM, experts), cores=records(CORE_ITEM, experts), moves=records(MOVE, moves), backs=records(BACK, moves),
        promotions=records(PROMOTION, experts + moves), size=records(SIZES),
    )  # fmt: skip
