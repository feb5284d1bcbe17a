"""One visit of one MoE layer: what is already there, what must be fetched, what leaves, what is fetched ahead.

`decide_visit` is the whole decision. The SimPy model, the compiled twin and the executor call this very function, so their
hits, misses, bytes and tokens agree exactly. Its order is fixed: look the set up once, before anything is inserted; serve
hits that were used before, then hits that a prefetch brought, then misses, each in recorded order; then fetch ahead.
Ignored: time. A hit may still be on its way; the engines wait for its transfer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...jit import jit_lean
from .caching import admit, clear_cache, evict, find_victim, pool_of, release, take_free_slot, touch
from .host_tier import use_from_host
from .misses import send_misses_to_cores
from .prefetching import rank_guesses, worth_fetching
from .remembering import learn_visit, match_request, remember_request
from .state import (
    ABSENT, AFFINITY, BACKLOG_NS, BELADY, CACHED, CANCELLED, CPU_RUNS, DEMAND, EXTRA_FETCHES, FIRST_BACK,
    FIRST_KERNEL, FIRST_TRANSFER, GUESS_NONE, HITS, HITS_GUESSED, LOW_FETCHES, MISS_FETCH, MISSES,
    NEXT_KERNEL, NEXT_STREAM, NEXT_TRANSFER, NEXT_WRITEBACK, NONE, PEAK_TRANSIENT, PREFETCH,
    PREFETCHES, PREFETCHES_DROPPED, PREFETCHES_USED, ROUTED, SIZE_BACKS, SIZE_ITEMS, SIZE_KERNELS, SIZE_MOVES, SIZE_PROMOTED,
    STAGED, STATIC, TRANSIENT, TRANSIENT_NOW, WHOLE_LAYER, WRITEBACKS,
    Decision, PolicyConfig, PolicyState,
)  # fmt: skip

if TYPE_CHECKING:
    from ..workload import Steps


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
    place = step * config.num_layers + layer
    if state.transfer[key] != transfer or state.used[key] or state.target[key] > steps.first_visit + place:
        return False
    for index in range(steps.visit_start[place], steps.visit_start[place + 1]):
        if layer * config.num_experts + steps.visit_expert[index] == key:
            return False
    if state.where[key] == ABSENT:
        return False
    if state.slot_of[key] >= 0:
        state.slot_pending[state.slot_of[key]] = -1
    if state.where[key] == CACHED:
        release(config, state, key)
    elif state.where[key] == STAGED:
        for buffer in range(state.staged_key.shape[0]):
            if state.staged_key[buffer] == key:
                state.staged_key[buffer] = -1
        state.slot_of[key] = -1
    else:
        state.count[TRANSIENT_NOW] -= 1
    state.where[key] = ABSENT
    state.count[PREFETCHES] -= 1
    state.count[LOW_FETCHES] -= state.format[key]
    state.count[CANCELLED] += 1
    return True


@jit_lean
def decide_visit(config: PolicyConfig, steps: Steps, state: PolicyState, out: Decision, step: int, layer: int) -> None:
    """Write into `out` what happens at this visit, and advance `state`. Visits must be decided in order."""
    place = step * config.num_layers + layer
    visit = steps.first_visit + place
    out.size[:] = 0
    out.size[FIRST_TRANSFER] = state.count[NEXT_TRANSFER]
    out.size[FIRST_KERNEL] = state.count[NEXT_KERNEL]
    out.size[FIRST_BACK] = state.count[NEXT_WRITEBACK]
    low, high = steps.visit_start[place], steps.visit_start[place + 1]
    base = layer * config.num_experts
    if config.benefit:  # since the last visit the link has worked off what fits beside one visit's compute
        state.count[BACKLOG_NS] = max(0, state.count[BACKLOG_NS] - state.prices.visit_ns[0])
    if config.library or config.policy == AFFINITY:
        learn_visit(config, steps, state, visit, layer, low, high)
    if config.low_rank >= 0:
        _drop_coarse_copies(config, steps, state, base, low, high)
    kernels = _list_hits(config, steps, state, out, visit, base, low, high)
    num_hits = int(out.size[SIZE_ITEMS])
    # Misses are listed before anything is inserted: a hit that a large set pushes out again is still a hit.
    for index in range(low, high):
        key = base + steps.visit_expert[index]
        if state.where[key] == ABSENT:
            if config.low_rank >= 0:
                state.format[key] = int(steps.visit_rank[index] >= config.low_rank)
            _add_item(out, steps.visit_expert[index], steps.visit_tokens[index], kernels, -1, 0, state.format[key])
    if config.miss != MISS_FETCH:
        on_cores = send_misses_to_cores(config, state, out, base, num_hits)
        state.count[MISSES] += on_cores
        state.count[CPU_RUNS] += on_cores
    # The visit's own experts are marked before any victim is sought: none may go while the pool has room for all.
    for index in range(low, high):
        key = base + steps.visit_expert[index]
        state.touched[key] = visit
        state.frequency[key] += steps.visit_tokens[index]
        if config.policy == BELADY:
            state.next_use[key] = steps.visit_next_use[index]
    _use_hits(state, out, base, num_hits)
    _seat_staged_hits(config, state, out, visit, base, num_hits)
    kernels = _fetch_misses(config, state, out, visit, base, num_hits, kernels)
    if config.fetch_layer:
        _fetch_rest_of_layer(config, state, out, visit, base)
    for index in range(low, high):
        touch(config, state, base + steps.visit_touch[index])
    out.size[SIZE_KERNELS] = kernels
    state.count[NEXT_KERNEL] += kernels
    if config.predictor != GUESS_NONE:
        for distance in range(1, min(config.depth, config.num_layers - 1 - layer) + 1):
            count = rank_guesses(config, steps, state, step, layer + distance, distance)
            _fetch_ahead(config, state, out, visit, distance, base + distance * config.num_experts, count)
    if config.policy == NONE:
        _drop_transients(config, state, base)


@jit_lean
def _add_item(out: Decision, expert: int, tokens: int, kernel: int, transfer: int, wait_key: int, fmt: int) -> None:
    at = out.size[SIZE_ITEMS]
    out.item_expert[at] = expert
    out.item_tokens[at] = tokens
    out.item_kernel[at] = kernel
    out.item_transfer[at] = transfer
    out.item_wait_key[at] = wait_key
    out.item_format[at] = fmt
    out.size[SIZE_ITEMS] = at + 1


@jit_lean
def _list_hits(config: PolicyConfig, steps: Steps, state: PolicyState, out: Decision, visit: int, base: int,
               low: int, high: int) -> int:  # fmt: skip
    """List the hits in kernel order, used ones first, then guessed ones by transfer; return the kernels so far."""
    kernels = 0
    guessed = 0
    for index in range(low, high):
        key = base + steps.visit_expert[index]
        if state.where[key] != ABSENT:
            if state.used[key]:
                _add_item(
                    out, steps.visit_expert[index], steps.visit_tokens[index], kernels, -1, key, state.format[key]
                )
                if not config.grouped:
                    kernels += 1
            else:
                guessed += 1
    used = out.size[SIZE_ITEMS]
    if config.grouped and used > 0:
        kernels = 1
    if guessed:
        for index in range(low, high):
            key = base + steps.visit_expert[index]
            if state.where[key] != ABSENT and not state.used[key]:
                _add_item(out, steps.visit_expert[index], steps.visit_tokens[index], 0, state.transfer[key], key,
                          state.format[key])  # fmt: skip
        for at in range(used + 1, out.size[SIZE_ITEMS]):  # insertion sort by transfer id: the order of arrival
            expert, tokens, wait_key = out.item_expert[at], out.item_tokens[at], out.item_wait_key[at]
            transfer, fmt = out.item_transfer[at], out.item_format[at]
            slot = at
            while slot > used and out.item_transfer[slot - 1] > transfer:
                out.item_expert[slot] = out.item_expert[slot - 1]
                out.item_tokens[slot] = out.item_tokens[slot - 1]
                out.item_wait_key[slot] = out.item_wait_key[slot - 1]
                out.item_transfer[slot] = out.item_transfer[slot - 1]
                out.item_format[slot] = out.item_format[slot - 1]
                slot -= 1
            out.item_expert[slot] = expert
            out.item_tokens[slot] = tokens
            out.item_wait_key[slot] = wait_key
            out.item_transfer[slot] = transfer
            out.item_format[slot] = fmt
        for at in range(used, out.size[SIZE_ITEMS]):
            out.item_kernel[at] = kernels
            if not config.grouped:
                kernels += 1
        if config.grouped:
            kernels += 1
    state.count[HITS] += out.size[SIZE_ITEMS]
    state.count[HITS_GUESSED] += guessed
    return kernels


@jit_lean
def _drop_coarse_copies(config: PolicyConfig, steps: Steps, state: PolicyState, base: int, low: int, high: int) -> None:
    """Drop resident copies of the second format that this visit needs in the first: they are fetched anew."""
    for index in range(low, high):
        key = base + steps.visit_expert[index]
        if state.format[key] and state.where[key] == CACHED and steps.visit_rank[index] < config.low_rank:
            release(config, state, key)


@jit_lean
def _use_hits(state: PolicyState, out: Decision, base: int, num_hits: int) -> None:
    """Mark hits as used, tie their slots to the kernels that read them, and promote the transfers still awaited."""
    for at in range(num_hits):
        key = base + out.item_expert[at]
        slot = state.slot_of[key]
        if slot >= 0:
            state.slot_kernel[slot] = out.size[FIRST_KERNEL] + out.item_kernel[at]
            state.slot_pending[slot] = -1
        if not state.used[key]:
            state.used[key] = 1
            state.count[PREFETCHES_USED] += 1
            _promote(out, out.item_transfer[at], state.sent_target[key])


@jit_lean
def _promote(out: Decision, transfer: int, target: int) -> None:
    """Note that an earlier transfer is now demanded, keeping the list in rising order and free of repeats."""
    at = out.size[SIZE_PROMOTED]
    while at > 0 and out.promoted[at - 1] > transfer:
        at -= 1
    if at > 0 and out.promoted[at - 1] == transfer:
        return
    for index in range(out.size[SIZE_PROMOTED], at, -1):
        out.promoted[index] = out.promoted[index - 1]
        out.promoted_target[index] = out.promoted_target[index - 1]
    out.promoted[at] = transfer
    out.promoted_target[at] = target
    out.size[SIZE_PROMOTED] += 1


@jit_lean
def _write_back(state: PolicyState, out: Decision, key: int, slot: int) -> None:
    """Queue the copy of an evicted expert to the host; the slot may not be filled before it has left."""
    at = out.size[SIZE_BACKS]
    out.back_key[at] = key
    out.back_format[at] = state.format[key]
    out.back_wait_kernel[at] = state.slot_kernel[slot]
    out.back_move[at] = out.size[SIZE_MOVES]
    out.size[SIZE_BACKS] = at + 1
    state.slot_writeback[slot] = state.count[NEXT_WRITEBACK]
    state.count[NEXT_WRITEBACK] += 1
    state.count[WRITEBACKS] += 1


@jit_lean
def _make_room(config: PolicyConfig, state: PolicyState, out: Decision, key: int, visit: int, prefetching: bool) -> int:
    """Return a slot of `key`'s pool, evicting where it is full; -1 when a prefetch may not evict anyone."""
    pool = pool_of(config, key)
    slot = take_free_slot(state, pool)
    if slot >= 0:
        return slot
    victim = find_victim(config, state, pool, visit, prefetching)
    if victim < 0:
        return -1
    was_used = state.used[victim]
    slot = evict(config, state, victim)
    # A victim that was never used is dropped, not written back: its bytes may still be on their way.
    if config.write_back and was_used:
        _write_back(state, out, victim, slot)
    return slot


@jit_lean
def _seat_staged_hits(
    config: PolicyConfig, state: PolicyState, out: Decision, visit: int, base: int, num_hits: int
) -> None:
    """Move staged experts that are used into the cache: the buffer and the freed slot change places, no bytes move."""
    for at in range(num_hits):
        key = base + out.item_expert[at]
        if state.where[key] != STAGED or config.policy == STATIC:
            continue
        buffer = 0
        while state.staged_key[buffer] != key:
            buffer += 1
        slot = _make_room(config, state, out, key, visit, False)
        held = state.staged_slot[buffer]
        state.staged_slot[buffer] = slot
        state.staged_key[buffer] = -1
        admit(config, state, key, held)


@jit_lean
def _add_move(config: PolicyConfig, state: PolicyState, out: Decision, key: int, kind: int, target: int, kernel: int,
              slot: int) -> None:  # fmt: skip
    """Submit one transfer into `slot` (-1: a transient buffer), behind everything that still uses the slot."""
    at = out.size[SIZE_MOVES]
    transfer = state.count[NEXT_TRANSFER]
    out.move_key[at] = key
    out.move_class[at] = kind
    out.move_target[at] = target
    out.move_kernel[at] = kernel
    out.move_slot[at] = slot
    out.move_format[at] = state.format[key]
    out.move_disk[at] = use_from_host(config, state, key)
    state.count[LOW_FETCHES] += state.format[key]
    if config.benefit and kind == PREFETCH:  # the stream waits for demands anyway: they leave no backlog behind
        state.count[BACKLOG_NS] += state.prices.copy_ns[state.format[key]]
    out.move_wait_kernel[at] = -1
    out.move_wait_writeback[at] = -1
    if slot >= 0:
        out.move_wait_kernel[at] = state.slot_kernel[slot]
        out.move_wait_writeback[at] = state.slot_writeback[slot]
        # An unused prefetch into this slot may still be queued. It was admitted, so it finishes, and before this one:
        # a demand would pass it, hence the promotion; a prefetch is behind it already.
        if kind == DEMAND and state.slot_pending[slot] >= 0:
            _promote(out, state.slot_pending[slot], state.slot_pending_target[slot])
        state.slot_pending[slot] = transfer if kind == PREFETCH else -1
        state.slot_pending_target[slot] = target
    state.transfer[key] = transfer
    state.target[key] = target
    state.sent_target[key] = target
    state.count[NEXT_TRANSFER] += 1
    out.size[SIZE_MOVES] = at + 1


@jit_lean
def _fetch_misses(config: PolicyConfig, state: PolicyState, out: Decision, visit: int, base: int, num_hits: int,
                  kernels: int) -> int:  # fmt: skip
    """Fetch every listed miss, in recorded order; return the kernels of the whole visit.

    Grouped misses share a kernel until one needs a slot that this very kernel reads; then a new kernel (a wave) starts.
    """
    kernel = kernels
    for at in range(num_hits, out.size[SIZE_ITEMS]):
        key = base + out.item_expert[at]
        slot = -1
        if config.policy == STATIC:
            slot = state.stream_slot[state.count[NEXT_STREAM] % state.stream_slot.shape[0]]
            state.count[NEXT_STREAM] += 1
        elif config.policy != NONE:
            slot = _make_room(config, state, out, key, visit, False)
        if at > num_hits and (
            not config.grouped or (slot >= 0 and state.slot_kernel[slot] == out.size[FIRST_KERNEL] + kernel)
        ):
            kernel += 1
        out.item_kernel[at] = kernel
        out.item_transfer[at] = state.count[NEXT_TRANSFER]
        out.item_wait_key[at] = key
        _add_move(config, state, out, key, DEMAND, visit, kernel, slot)
        state.used[key] = 1
        if slot >= 0:
            state.slot_kernel[slot] = out.size[FIRST_KERNEL] + kernel
        if config.policy == NONE:
            state.where[key] = TRANSIENT
            _count_transient(state)
        elif config.policy != STATIC:
            admit(config, state, key, slot)
        state.count[MISSES] += 1
    return kernel + 1 if out.size[SIZE_ITEMS] > num_hits else kernels


@jit_lean
def _count_transient(state: PolicyState) -> None:
    """Count one more expert in transient memory, and the most there ever were."""
    state.count[TRANSIENT_NOW] += 1
    state.count[PEAK_TRANSIENT] = max(state.count[PEAK_TRANSIENT], state.count[TRANSIENT_NOW])


@jit_lean
def _fetch_rest_of_layer(config: PolicyConfig, state: PolicyState, out: Decision, visit: int, base: int) -> None:
    """Fetch the layer's other experts too; every kernel of the visit, or the last one, waits for the last of them."""
    for expert in range(config.num_experts):
        if state.where[base + expert] == ABSENT:
            _add_move(config, state, out, base + expert, DEMAND, visit, 0, -1)
            state.where[base + expert] = TRANSIENT
            state.used[base + expert] = 0
            _count_transient(state)
            state.count[EXTRA_FETCHES] += 1
    last = out.size[SIZE_MOVES] - 1
    # A layer that is streamed ends with its last expert's arrival, used or not: the next one needs the buffers.
    first_waiting = 0 if config.fetch_layer == WHOLE_LAYER else out.size[SIZE_ITEMS] - 1
    for at in range(first_waiting, out.size[SIZE_ITEMS]):
        out.item_transfer[at] = state.count[NEXT_TRANSFER] - 1
        out.item_wait_key[at] = out.move_key[last]
    if config.fetch_layer == WHOLE_LAYER:
        for at in range(out.size[SIZE_MOVES]):
            out.move_kernel[at] = 0


@jit_lean
def _drop_transients(config: PolicyConfig, state: PolicyState, base: int) -> None:
    """Forget this layer's transient experts: without a cache they live for one visit."""
    for key in range(base, base + config.num_experts):
        if state.where[key] == TRANSIENT:
            state.where[key] = ABSENT
            state.count[TRANSIENT_NOW] -= 1
            state.count[PREFETCHES_DROPPED] += state.used[key] == 0 and config.fetch_layer == ROUTED


@jit_lean
def _fetch_ahead(config: PolicyConfig, state: PolicyState, out: Decision, visit: int, distance: int, base: int,
                 count: int) -> None:  # fmt: skip
    """Fetch the ranked guesses for a later visit, best first, until none may be admitted any more."""
    target = visit + distance
    for rank in range(count):
        key = base + state.ranked[rank]
        if state.where[key] != ABSENT:
            if not state.used[key]:
                state.target[key] = max(state.target[key], target)
            continue
        if (config.threshold_65536 or config.benefit) and not worth_fetching(config, state, rank, distance, 0):
            return
        if config.low_rank >= 0:
            state.format[key] = 0  # how important a guess will be is not known yet
        if config.policy == NONE:
            slot = -1
            state.where[key] = TRANSIENT
            _count_transient(state)
        elif config.staging > 0:
            buffer = _free_buffer(state, visit)
            if buffer < 0:
                return
            before = state.staged_key[buffer]
            if before >= 0:
                state.where[before] = ABSENT
                state.slot_of[before] = -1
                state.count[PREFETCHES_DROPPED] += state.used[before] == 0
            slot = state.staged_slot[buffer]
            state.staged_key[buffer] = key
            state.where[key] = STAGED
            state.slot_of[key] = slot
        else:
            slot = _make_room(config, state, out, key, visit, True)
            if slot < 0:
                return
            admit(config, state, key, slot)
        _add_move(config, state, out, key, PREFETCH, target, -1, slot)
        state.used[key] = 0
        state.count[PREFETCHES] += 1


@jit_lean
def _free_buffer(state: PolicyState, visit: int) -> int:
    """Return an empty staging buffer, else the one whose guess expired first (or was used), or -1."""
    best = -1
    for buffer in range(state.staged_key.shape[0]):
        key = state.staged_key[buffer]
        if key < 0:
            return buffer
        # A used expert is still staged only under a static cache, which takes no one in.
        if state.target[key] <= visit and (best < 0 or state.target[key] < state.target[state.staged_key[best]]):
            best = buffer
    return best
