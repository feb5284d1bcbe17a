"""One visit of one MoE layer: what is already there, what must be fetched, what leaves, what is fetched ahead.

`decide_visit` is the whole decision. The SimPy model, the compiled twin and the executor call this very function, so their
hits, misses, bytes and tokens agree exactly. Its order is fixed: look the set up once, before anything is inserted; serve
hits that were used before, then hits that a prefetch brought, then misses, each in recorded order; then fetch ahead.
Ignored: time. A hit may still be on its way; the engines wait for its transfer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...base.jit import jit_inline, jit_inner, jit_lean
from .caching import admit, appraise, clear_cache, evict, find_victim, pool_of, release, take_free_slot, touch
from .host_tier import use_from_host
from .misses import send_misses_to_cores
from .prefetching import rank_guesses, worth_fetching
from .remembering import learn_visit, match_request, remember_request
from .state import (
    ABSENT, AFFINITY, BACKLOG_NS, BACK_FORMAT, BACK_KEY, BACK_MOVE, BACK_WAIT_KERNEL, BELADY, CACHED, CANCELLED, COPY_NS,
    CPU_RUNS, DEMAND, EXTRA_FETCHES, FIRST_BACK, FIRST_KERNEL, FIRST_TRANSFER, FORMAT, FREQUENCY, GUESS_NONE, HITS,
    HITS_GUESSED, ITEM_EXPERT, ITEM_FORMAT, ITEM_KERNEL, ITEM_KEY, ITEM_TOKENS, ITEM_TRANSFER, LOW_FETCHES, MISSES,
    MISS_FETCH, MOVE_CLASS, MOVE_DISK, MOVE_FORMAT, MOVE_KERNEL, MOVE_KEY, MOVE_SLOT, MOVE_TARGET, MOVE_WAIT_BACK,
    MOVE_WAIT_KERNEL, NEXT_KERNEL, NEXT_STREAM, NEXT_TRANSFER, NEXT_USE, NEXT_WRITEBACK, NONE, NUM_STREAM, PEAK_TRANSIENT,
    PREFETCH, PREFETCHES, PREFETCHES_DROPPED, PREFETCHES_USED, PROMOTED, PROMOTED_TARGET, RANKED, ROUTED, SENT_TARGET,
    SIZE_BACKS, SIZE_ITEMS, SIZE_KERNELS, SIZE_MOVES, SIZE_PROMOTED, SLOT_BACK, SLOT_KERNEL, SLOT_OF, SLOT_PENDING,
    SLOT_PENDING_TARGET, STAGED, STAGED_KEY, STAGED_SLOT, STATIC, TARGET, TOUCHED, TRANSFER, TRANSIENT, TRANSIENT_NOW, USED,
    VISIT_NS, WHERE, WHOLE_LAYER, WRITEBACKS,
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
    """Drop a prefetch whose copy has not begun, if it was made for this visit and the visit does not use it."""
    keys, slots, staged, count = state.keys, state.slots, state.staged, state.count
    place = step * config.num_layers + layer
    if keys[TRANSFER, key] != transfer or keys[USED, key] or keys[TARGET, key] > steps.first_visit + place:
        return False
    for index in range(steps.visit_start[place], steps.visit_start[place + 1]):
        if layer * config.num_experts + steps.visit_expert[index] == key:
            return False
    if keys[WHERE, key] == ABSENT:
        return False
    if keys[SLOT_OF, key] >= 0:
        slots[keys[SLOT_OF, key], SLOT_PENDING] = -1
    if keys[WHERE, key] == CACHED:
        release(config, state, key)
    elif keys[WHERE, key] == STAGED:
        for buffer in range(staged.shape[0]):
            if staged[buffer, STAGED_KEY] == key:
                staged[buffer, STAGED_KEY] = -1
        keys[SLOT_OF, key] = -1
    else:
        count[TRANSIENT_NOW] -= 1
    keys[WHERE, key] = ABSENT
    count[PREFETCHES] -= 1
    count[LOW_FETCHES] -= keys[FORMAT, key]
    count[CANCELLED] += 1
    return True


@jit_lean
def decide_visit(config: PolicyConfig, steps: Steps, state: PolicyState, out: Decision, step: int, layer: int) -> None:
    """Write into `out` what happens at this visit, and advance `state`. Visits must be decided in order."""
    keys, prices, count, size = state.keys, state.prices, state.count, out.size
    place = step * config.num_layers + layer
    visit = steps.first_visit + place
    size[:] = 0
    size[FIRST_TRANSFER] = count[NEXT_TRANSFER]
    size[FIRST_KERNEL] = count[NEXT_KERNEL]
    size[FIRST_BACK] = count[NEXT_WRITEBACK]
    low, high = steps.visit_start[place], steps.visit_start[place + 1]
    base = layer * config.num_experts
    if config.benefit:  # since the last visit the link has worked off what fits beside one visit's compute
        count[BACKLOG_NS] = max(0, count[BACKLOG_NS] - prices[0, VISIT_NS])
    if config.library or config.policy == AFFINITY:
        learn_visit(config, steps, state, visit, layer, low, high)
    if config.low_rank >= 0:
        _drop_coarse_copies(config, steps, state, base, low, high)
    kernels = _list_hits(config, steps, state, out, visit, base, low, high)
    num_hits = int(size[SIZE_ITEMS])
    # Misses are listed before anything is inserted: a hit that a large set pushes out again is still a hit.
    for index in range(low, high):
        key = base + steps.visit_expert[index]
        if keys[WHERE, key] == ABSENT:
            if config.low_rank >= 0:
                keys[FORMAT, key] = int(steps.visit_rank[index] >= config.low_rank)
            _add_item(out, steps.visit_expert[index], steps.visit_tokens[index], kernels, -1, 0, keys[FORMAT, key])
    tokens = steps.step_start[step + 1] - steps.step_start[step]
    if config.miss != MISS_FETCH and not 0 < config.upload_tokens <= tokens:
        on_cores = send_misses_to_cores(config, state, out, base, num_hits)
        count[MISSES] += on_cores
        count[CPU_RUNS] += on_cores
    # The visit's own experts are marked before any victim is sought: none may go while the pool has room for all.
    for index in range(low, high):
        key = base + steps.visit_expert[index]
        keys[TOUCHED, key] = visit
        keys[FREQUENCY, key] += steps.visit_tokens[index]
        appraise(config, state, key)
        if config.policy == BELADY:
            keys[NEXT_USE, key] = steps.visit_next_use[index]
    _use_hits(state, out, base, num_hits)
    if config.policy == NONE:
        _await_block(config, state, out, base)
    _seat_staged_hits(config, state, out, visit, base, num_hits)
    kernels = _fetch_misses(config, state, out, visit, base, num_hits, kernels)
    if config.fetch_layer:
        _fetch_rest_of_layer(config, state, out, visit, base)
    for index in range(low, high):
        touch(config, state, base + steps.visit_touch[index])
    size[SIZE_KERNELS] = kernels
    count[NEXT_KERNEL] += kernels
    if config.predictor != GUESS_NONE:
        for distance in range(1, min(config.depth, config.num_layers - 1 - layer) + 1):
            guesses = rank_guesses(config, steps, state, step, layer + distance, distance)
            _fetch_ahead(config, state, out, visit, distance, base + distance * config.num_experts, guesses)
    if config.policy == NONE:
        _drop_transients(config, state, base)


@jit_inline
def _add_item(out: Decision, expert: int, tokens: int, kernel: int, transfer: int, wait_key: int, fmt: int) -> None:
    items, size = out.items, out.size
    at = size[SIZE_ITEMS]
    items[at, ITEM_EXPERT] = expert
    items[at, ITEM_TOKENS] = tokens
    items[at, ITEM_KERNEL] = kernel
    items[at, ITEM_TRANSFER] = transfer
    items[at, ITEM_KEY] = wait_key
    items[at, ITEM_FORMAT] = fmt
    size[SIZE_ITEMS] = at + 1


@jit_inline
def _list_hits(config: PolicyConfig, steps: Steps, state: PolicyState, out: Decision, visit: int, base: int,
               low: int, high: int) -> int:  # fmt: skip
    """List the hits in kernel order, used ones first, then guessed ones by transfer; return the kernels so far."""
    keys, count, items, size = state.keys, state.count, out.items, out.size
    kernels = 0
    guessed = 0
    for index in range(low, high):
        key = base + steps.visit_expert[index]
        if keys[WHERE, key] != ABSENT:
            if keys[USED, key]:
                _add_item(
                    out, steps.visit_expert[index], steps.visit_tokens[index], kernels, -1, key, keys[FORMAT, key]
                )
                if not config.grouped:
                    kernels += 1
            else:
                guessed += 1
    used = size[SIZE_ITEMS]
    if config.grouped and used > 0:
        kernels = 1
    if guessed:
        for index in range(low, high):
            key = base + steps.visit_expert[index]
            if keys[WHERE, key] != ABSENT and not keys[USED, key]:
                _add_item(out, steps.visit_expert[index], steps.visit_tokens[index], 0, keys[TRANSFER, key], key,
                          keys[FORMAT, key])  # fmt: skip
        for at in range(used + 1, size[SIZE_ITEMS]):  # insertion sort by transfer id: the order of arrival
            expert, tokens, wait_key = items[at, ITEM_EXPERT], items[at, ITEM_TOKENS], items[at, ITEM_KEY]
            transfer, fmt = items[at, ITEM_TRANSFER], items[at, ITEM_FORMAT]
            slot = at
            while slot > used and items[slot - 1, ITEM_TRANSFER] > transfer:
                items[slot, ITEM_EXPERT] = items[slot - 1, ITEM_EXPERT]
                items[slot, ITEM_TOKENS] = items[slot - 1, ITEM_TOKENS]
                items[slot, ITEM_KEY] = items[slot - 1, ITEM_KEY]
                items[slot, ITEM_TRANSFER] = items[slot - 1, ITEM_TRANSFER]
                items[slot, ITEM_FORMAT] = items[slot - 1, ITEM_FORMAT]
                slot -= 1
            items[slot, ITEM_EXPERT] = expert
            items[slot, ITEM_TOKENS] = tokens
            items[slot, ITEM_KEY] = wait_key
            items[slot, ITEM_TRANSFER] = transfer
            items[slot, ITEM_FORMAT] = fmt
        for at in range(used, size[SIZE_ITEMS]):
            items[at, ITEM_KERNEL] = kernels
            if not config.grouped:
                kernels += 1
        if config.grouped:
            kernels += 1
    count[HITS] += size[SIZE_ITEMS]
    count[HITS_GUESSED] += guessed
    return kernels


@jit_inner
def _drop_coarse_copies(config: PolicyConfig, steps: Steps, state: PolicyState, base: int, low: int, high: int) -> None:
    """Drop resident copies of the second format that this visit needs in the first: they are fetched anew."""
    keys = state.keys
    for index in range(low, high):
        key = base + steps.visit_expert[index]
        if keys[FORMAT, key] and keys[WHERE, key] == CACHED and steps.visit_rank[index] < config.low_rank:
            release(config, state, key)


@jit_inline
def _use_hits(state: PolicyState, out: Decision, base: int, num_hits: int) -> None:
    """Mark hits as used, tie their slots to the kernels that read them, and promote the transfers still awaited."""
    keys, slots, count, items, size = state.keys, state.slots, state.count, out.items, out.size
    for at in range(num_hits):
        key = base + items[at, ITEM_EXPERT]
        slot = keys[SLOT_OF, key]
        if slot >= 0:
            slots[slot, SLOT_KERNEL] = size[FIRST_KERNEL] + items[at, ITEM_KERNEL]
            slots[slot, SLOT_PENDING] = -1
        if not keys[USED, key]:
            keys[USED, key] = 1
            count[PREFETCHES_USED] += 1
            _promote(out, items[at, ITEM_TRANSFER], keys[SENT_TARGET, key])


@jit_inline
def _await_block(config: PolicyConfig, state: PolicyState, out: Decision, base: int) -> None:
    """Demand everything that was fetched ahead for this layer: without a cache its buffers are given back after the visit."""
    keys = state.keys
    for key in range(base, base + config.num_experts):
        if keys[WHERE, key] == TRANSIENT and not keys[USED, key]:
            _promote(out, keys[TRANSFER, key], keys[SENT_TARGET, key])


@jit_inline
def _promote(out: Decision, transfer: int, target: int) -> None:
    """Note that an earlier transfer is now demanded, keeping the list in rising order and free of repeats."""
    promotions, size = out.promotions, out.size
    at = size[SIZE_PROMOTED]
    while at > 0 and promotions[at - 1, PROMOTED] > transfer:
        at -= 1
    if at > 0 and promotions[at - 1, PROMOTED] == transfer:
        return
    for index in range(size[SIZE_PROMOTED], at, -1):
        promotions[index, PROMOTED] = promotions[index - 1, PROMOTED]
        promotions[index, PROMOTED_TARGET] = promotions[index - 1, PROMOTED_TARGET]
    promotions[at, PROMOTED] = transfer
    promotions[at, PROMOTED_TARGET] = target
    size[SIZE_PROMOTED] += 1


@jit_inline
def _write_back(state: PolicyState, out: Decision, key: int, slot: int) -> None:
    """Queue the copy of an evicted expert to the host; the slot may not be filled before it has left."""
    keys, slots, count, backs, size = state.keys, state.slots, state.count, out.backs, out.size
    at = size[SIZE_BACKS]
    backs[at, BACK_KEY] = key
    backs[at, BACK_FORMAT] = keys[FORMAT, key]
    backs[at, BACK_WAIT_KERNEL] = slots[slot, SLOT_KERNEL]
    backs[at, BACK_MOVE] = size[SIZE_MOVES]
    size[SIZE_BACKS] = at + 1
    slots[slot, SLOT_BACK] = count[NEXT_WRITEBACK]
    count[NEXT_WRITEBACK] += 1
    count[WRITEBACKS] += 1


@jit_inline
def _make_room(config: PolicyConfig, state: PolicyState, out: Decision, key: int, visit: int, prefetching: bool) -> int:
    """Return a slot of `key`'s pool, evicting where it is full; -1 when a prefetch may not evict anyone."""
    keys = state.keys
    pool = pool_of(config, key)
    slot = take_free_slot(state, pool)
    if slot >= 0:
        return slot
    victim = find_victim(config, state, pool, visit, prefetching)
    if victim < 0:
        return -1
    was_used = keys[USED, victim]
    slot = evict(config, state, victim)
    # A victim that was never used is dropped, not written back: its bytes may still be on their way.
    if config.write_back and was_used:
        _write_back(state, out, victim, slot)
    return slot


@jit_inline
def _seat_staged_hits(
    config: PolicyConfig, state: PolicyState, out: Decision, visit: int, base: int, num_hits: int
) -> None:
    """Move staged experts that are used into the cache: the buffer and the freed slot change places, no bytes move."""
    keys, staged, items = state.keys, state.staged, out.items
    for at in range(num_hits):
        key = base + items[at, ITEM_EXPERT]
        if keys[WHERE, key] != STAGED or config.policy == STATIC:
            continue
        buffer = 0
        while staged[buffer, STAGED_KEY] != key:
            buffer += 1
        slot = _make_room(config, state, out, key, visit, False)
        held = staged[buffer, STAGED_SLOT]
        staged[buffer, STAGED_SLOT] = slot
        staged[buffer, STAGED_KEY] = -1
        admit(config, state, key, held)


@jit_inline
def _add_move(config: PolicyConfig, state: PolicyState, out: Decision, key: int, kind: int, target: int, kernel: int,
              slot: int) -> None:  # fmt: skip
    """Submit one transfer into `slot` (-1: a transient buffer), behind everything that still uses the slot."""
    keys, slots, prices, count, moves, size = state.keys, state.slots, state.prices, state.count, out.moves, out.size
    at = size[SIZE_MOVES]
    transfer = count[NEXT_TRANSFER]
    moves[at, MOVE_KEY] = key
    moves[at, MOVE_CLASS] = kind
    moves[at, MOVE_TARGET] = target
    moves[at, MOVE_KERNEL] = kernel
    moves[at, MOVE_SLOT] = slot
    moves[at, MOVE_FORMAT] = keys[FORMAT, key]
    moves[at, MOVE_DISK] = use_from_host(config, state, key)
    count[LOW_FETCHES] += keys[FORMAT, key]
    if config.benefit and kind == PREFETCH:  # the stream waits for demands anyway: they leave no backlog behind
        count[BACKLOG_NS] += prices[keys[FORMAT, key], COPY_NS]
    moves[at, MOVE_WAIT_KERNEL] = -1
    moves[at, MOVE_WAIT_BACK] = -1
    if slot >= 0:
        moves[at, MOVE_WAIT_KERNEL] = slots[slot, SLOT_KERNEL]
        moves[at, MOVE_WAIT_BACK] = slots[slot, SLOT_BACK]
        # An unused prefetch into this slot may still be under way. It was admitted, so it finishes, and before this one.
        if slots[slot, SLOT_PENDING] >= 0:
            _promote(out, slots[slot, SLOT_PENDING], slots[slot, SLOT_PENDING_TARGET])
        slots[slot, SLOT_PENDING] = transfer if kind == PREFETCH else -1
        slots[slot, SLOT_PENDING_TARGET] = target
    keys[TRANSFER, key] = transfer
    keys[TARGET, key] = target
    keys[SENT_TARGET, key] = target
    count[NEXT_TRANSFER] += 1
    size[SIZE_MOVES] = at + 1


@jit_inline
def _fetch_misses(config: PolicyConfig, state: PolicyState, out: Decision, visit: int, base: int, num_hits: int,
                  kernels: int) -> int:  # fmt: skip
    """Fetch every listed miss, in recorded order; return the kernels of the whole visit.

    Grouped misses share a kernel until one needs a slot that this very kernel reads; then a new kernel (a wave) starts.
    """
    keys, slots, count, items, size = state.keys, state.slots, state.count, out.items, out.size
    kernel = kernels
    for at in range(num_hits, size[SIZE_ITEMS]):
        key = base + items[at, ITEM_EXPERT]
        slot = -1
        if config.policy == STATIC:
            slot = slots.shape[0] - NUM_STREAM + count[NEXT_STREAM] % NUM_STREAM
            count[NEXT_STREAM] += 1
        elif config.policy != NONE:
            slot = _make_room(config, state, out, key, visit, False)
        if at > num_hits and (
            not config.grouped or (slot >= 0 and slots[slot, SLOT_KERNEL] == size[FIRST_KERNEL] + kernel)
        ):
            kernel += 1
        items[at, ITEM_KERNEL] = kernel
        items[at, ITEM_TRANSFER] = count[NEXT_TRANSFER]
        items[at, ITEM_KEY] = key
        _add_move(config, state, out, key, DEMAND, visit, kernel, slot)
        keys[USED, key] = 1
        if slot >= 0:
            slots[slot, SLOT_KERNEL] = size[FIRST_KERNEL] + kernel
        if config.policy == NONE:
            keys[WHERE, key] = TRANSIENT
            _count_transient(state)
        elif config.policy != STATIC:
            admit(config, state, key, slot)
        count[MISSES] += 1
    return kernel + 1 if size[SIZE_ITEMS] > num_hits else kernels


@jit_inline
def _count_transient(state: PolicyState) -> None:
    """Count one more expert in transient memory, and the most there ever were."""
    count = state.count
    count[TRANSIENT_NOW] += 1
    count[PEAK_TRANSIENT] = max(count[PEAK_TRANSIENT], count[TRANSIENT_NOW])


@jit_inner
def _fetch_rest_of_layer(config: PolicyConfig, state: PolicyState, out: Decision, visit: int, base: int) -> None:
    """Fetch the layer's other experts too; every kernel of the visit, or the last one, waits for the last of them."""
    keys, count, items, moves, size = state.keys, state.count, out.items, out.moves, out.size
    for expert in range(config.num_experts):
        if keys[WHERE, base + expert] == ABSENT:
            _add_move(config, state, out, base + expert, DEMAND, visit, 0, -1)
            keys[WHERE, base + expert] = TRANSIENT
            keys[USED, base + expert] = 0
            _count_transient(state)
            count[EXTRA_FETCHES] += 1
    last = size[SIZE_MOVES] - 1
    # A layer that is streamed ends with its last expert's arrival, used or not: the next one needs the buffers.
    first_waiting = 0 if config.fetch_layer == WHOLE_LAYER else size[SIZE_ITEMS] - 1
    for at in range(first_waiting, size[SIZE_ITEMS]):
        items[at, ITEM_TRANSFER] = count[NEXT_TRANSFER] - 1
        items[at, ITEM_KEY] = moves[last, MOVE_KEY]
    if config.fetch_layer == WHOLE_LAYER:
        for at in range(size[SIZE_MOVES]):
            moves[at, MOVE_KERNEL] = 0


@jit_inner
def _drop_transients(config: PolicyConfig, state: PolicyState, base: int) -> None:
    """Forget this layer's transient experts: without a cache they live for one visit."""
    keys, count = state.keys, state.count
    for key in range(base, base + config.num_experts):
        if keys[WHERE, key] == TRANSIENT:
            keys[WHERE, key] = ABSENT
            count[TRANSIENT_NOW] -= 1
            count[PREFETCHES_DROPPED] += keys[USED, key] == 0 and config.fetch_layer == ROUTED


@jit_inner
def _fetch_ahead(config: PolicyConfig, state: PolicyState, out: Decision, visit: int, distance: int, base: int,
                 num_guesses: int) -> None:  # fmt: skip
    """Fetch the ranked guesses for a later visit, best first, until none may be admitted any more."""
    keys, staged, guesses, count = state.keys, state.staged, state.guesses, state.count
    target = visit + distance
    for rank in range(num_guesses):
        key = base + guesses[rank, RANKED]
        if keys[WHERE, key] != ABSENT:
            if not keys[USED, key]:
                keys[TARGET, key] = max(keys[TARGET, key], target)
            continue
        if (config.threshold_65536 or config.benefit) and not worth_fetching(config, state, rank, distance, 0):
            return
        if config.low_rank >= 0:
            keys[FORMAT, key] = 0  # how important a guess will be is not known yet
        if config.policy == NONE:
            slot = -1
            keys[WHERE, key] = TRANSIENT
            _count_transient(state)
        elif config.staging > 0:
            buffer = _free_buffer(state, visit)
            if buffer < 0:
                return
            before = staged[buffer, STAGED_KEY]
            if before >= 0:
                keys[WHERE, before] = ABSENT
                keys[SLOT_OF, before] = -1
                count[PREFETCHES_DROPPED] += keys[USED, before] == 0
            slot = staged[buffer, STAGED_SLOT]
            staged[buffer, STAGED_KEY] = key
            keys[WHERE, key] = STAGED
            keys[SLOT_OF, key] = slot
        else:
            slot = _make_room(config, state, out, key, visit, True)
            if slot < 0:
                return
            admit(config, state, key, slot)
        _add_move(config, state, out, key, PREFETCH, target, -1, slot)
        keys[USED, key] = 0
        count[PREFETCHES] += 1


@jit_inline
def _free_buffer(state: PolicyState, visit: int) -> int:
    """Return an empty staging buffer, else the one whose guess expired first (or was used), or -1."""
    keys, staged = state.keys, state.staged
    best = -1
    for buffer in range(staged.shape[0]):
        key = staged[buffer, STAGED_KEY]
        if key < 0:
            return buffer
        # A used expert is still staged only under a static cache, which takes no one in.
        if keys[TARGET, key] <= visit and (best < 0 or keys[TARGET, key] < keys[TARGET, staged[best, STAGED_KEY]]):
            best = buffer
    return best
