"""The compiled core of the search: annealing of one layer's placement with incremental evaluation.

Modelled: the state is a placement plus, for every (expert, source rank), the rank its tokens go to. A move swaps two slots,
overwrites a copy's slot with a further copy of another expert, or re-points one (expert, source rank). Per token the state
counts choices on every rank and node, so that a move touches only the tokens of the experts it names; per step it keeps
the ports of `objective`, whole numbers that a full count reproduces exactly. Randomness is a hash of (seed, move,
draw). Ignored: what the run-time router will do token by token (`replica_choice` decides that later).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...base.jit import jit
from ...specs.schedules.parallel import ALL_TO_ALLS
from .counter_hash import hash_below, hash_fraction
from .objective import Prices, port_seconds

Counts = npt.NDArray[np.int64]

EVERY_CHOICE, TWO_STAGES = ALL_TO_ALLS.index("all-choices"), ALL_TO_ALLS.index("hierarchical")
MAX_CHOICES = 255  # choices of one token are counted in bytes

SWAP_SHARE, OVERWRITE_SHARE = 0.4, 0.2  # of proposals, where copies exist; the rest re-points
MOVES_PER_WEIGHT = 256  # moves between changes of the price of a row


class Buckets(NamedTuple):
    """The tokens of all steps, grouped by who sends them where."""

    start: Counts
    """int64 [num_logical · num_ranks · num_steps + 1]: bucket ((e · ranks) + s) · steps + b begins here."""
    token: npt.NDArray[np.int32]
    """int32 [tokens · top_k]: tokens of each bucket."""
    source: npt.NDArray[np.int32]
    """int32 [tokens]: source rank of each token."""
    step: npt.NDArray[np.int32]
    """int32 [tokens]: step of each token."""


class State(NamedTuple):
    """Everything a move changes."""

    slots: Counts
    """int64 [num_slots]: expert in each slot."""
    target: Counts
    """int64 [num_logical, num_ranks]: rank that tokens of (expert, source rank) go to."""
    held: Counts
    """int64 [num_logical, num_ranks]: slots of a rank that hold an expert."""
    copies: Counts
    """int64 [num_logical]: slots that hold an expert."""
    visits: npt.NDArray[np.uint8]
    """uint8 [tokens, num_ranks + num_nodes]: choices of a token on each rank, then on each node."""
    ports: Counts
    """int64 [num_steps, 5, num_ranks]: tokens through every port and units of work, as `objective.work_ports` orders them."""
    rows: Counts
    """int64 [num_steps, num_logical, num_ranks]: rows an expert has on a rank."""


class Changes(NamedTuple):
    """The (expert, source rank) pairs a move re-points; only the first `count` rows hold."""

    expert: Counts
    source: Counts
    before: Counts
    after: Counts


class Rules(NamedTuple):
    """What does not change while a layer is searched."""

    ranks_per_node: int
    kind: int
    """The exchange, as its place in `specs.schedules.parallel.ALL_TO_ALLS`."""
    work: Counts
    """int64 [n]: units of work of an expert with so many rows."""


@jit
def mean_seconds(ports: Counts, prices: Prices, work_weight: float) -> float:
    """Return the mean layer time over steps, added up in order; `ports: [num_steps, 5, num_ranks]`."""
    total = 0.0
    for step in range(ports.shape[0]):
        total += float(port_seconds(ports[step], prices, work_weight))
    return total / float(ports.shape[0])


@jit
def fill_state(state: State, buckets: Buckets, experts: Counts, rules: Rules) -> None:
    """Count `visits`, `rows` and `ports` of `state` from scratch for `experts: [tokens, top_k]` under `state.target`.

    Visits are counted as far as the exchange asks for them: not where every choice is sent, nodes only where tokens cross once to each.
    """
    visits, ports, rows, ranks_per_node = state.visits, state.ports, state.rows, rules.ranks_per_node
    num_ranks = state.target.shape[1]
    visits[:] = 0
    ports[:] = 0
    rows[:] = 0
    for token in range(experts.shape[0]):
        source, step = buckets.source[token], buckets.step[token]
        home, seat = source // ranks_per_node, source % ranks_per_node
        for choice in range(experts.shape[1]):
            expert = experts[token, choice]
            rank = state.target[expert, source]
            rows[step, expert, rank] += 1
            if rules.kind != EVERY_CHOICE:
                visits[token, rank] += 1
            if rules.kind == TWO_STAGES:
                visits[token, num_ranks + rank // ranks_per_node] += 1
            if rules.kind != TWO_STAGES and rank != source and (rules.kind == EVERY_CHOICE or visits[token, rank] == 1):
                tier = 2 if rank // ranks_per_node == home else 0
                ports[step, tier, source] += 1
                ports[step, tier + 1, rank] += 1
        if rules.kind != TWO_STAGES:
            continue
        for node in range(num_ranks // ranks_per_node):
            gateway = node * ranks_per_node + seat
            if visits[token, num_ranks + node] > 0 and node != home:
                ports[step, 0, source] += 1
                ports[step, 1, gateway] += 1
            for rank in range(node * ranks_per_node, (node + 1) * ranks_per_node):
                if visits[token, rank] > 0 and rank != gateway:
                    ports[step, 2, gateway] += 1
                    ports[step, 3, rank] += 1
    for step in range(ports.shape[0]):
        for expert in range(rows.shape[1]):
            for rank in range(num_ranks):
                ports[step, 4, rank] += rules.work[rows[step, expert, rank]]


@jit
def repoint(state: State, buckets: Buckets, expert: int, source: int, before: int, after: int, rules: Rules) -> None:
    """Send the tokens of (expert, source rank) to rank `after` instead of `before`, keeping every count exact."""
    visits, ports, rows, ranks_per_node = state.visits, state.ports, state.rows, rules.ranks_per_node
    num_steps, num_ranks = ports.shape[0], ports.shape[2]
    home, seat = source // ranks_per_node, source % ranks_per_node
    node_before, node_after = before // ranks_per_node, after // ranks_per_node
    gate_before, gate_after = node_before * ranks_per_node + seat, node_after * ranks_per_node + seat
    column_before, column_after = num_ranks + node_before, num_ranks + node_after
    crosses = rules.kind == TWO_STAGES and node_before != node_after
    bucket = (expert * num_ranks + source) * num_steps
    for step in range(num_steps):
        first, last = buckets.start[bucket + step], buckets.start[bucket + step + 1]
        come, gone, cross_come, cross_gone = 0, 0, 0, 0
        many = last - first
        if rules.kind == EVERY_CHOICE:
            come, gone = many, many
            first = last
        for place in range(first, last):
            token = buckets.token[place]
            there = visits[token, after]
            visits[token, after] = there + 1
            come += there == 0
            here = visits[token, before] - 1
            visits[token, before] = here
            gone += here == 0
            if crosses:
                node_there = visits[token, column_after]
                visits[token, column_after] = node_there + 1
                cross_come += node_there == 0
                node_here = visits[token, column_before] - 1
                visits[token, column_before] = node_here
                cross_gone += node_here == 0
        had, has = rows[step, expert, before], rows[step, expert, after]
        rows[step, expert, before] = had - many
        rows[step, expert, after] = has + many
        ports[step, 4, before] += rules.work[had - many] - rules.work[had]
        ports[step, 4, after] += rules.work[has + many] - rules.work[has]
        if rules.kind != TWO_STAGES:
            if after != source:
                tier = 2 if node_after == home else 0
                ports[step, tier, source] += come
                ports[step, tier + 1, after] += come
            if before != source:
                tier = 2 if node_before == home else 0
                ports[step, tier, source] -= gone
                ports[step, tier + 1, before] -= gone
            continue
        if gate_after != after:
            ports[step, 2, gate_after] += come
            ports[step, 3, after] += come
        if gate_before != before:
            ports[step, 2, gate_before] -= gone
            ports[step, 3, before] -= gone
        if node_after != home:
            ports[step, 0, source] += cross_come
            ports[step, 1, gate_after] += cross_come
        if node_before != home:
            ports[step, 0, source] -= cross_gone
            ports[step, 1, gate_before] -= cross_gone


@jit
def _revisit(
    state: State, buckets: Buckets, expert: int, source: int, before: int, after: int, ranks_per_node: int, kind: int
) -> None:
    """Move visits and rows of (expert, source rank) from `before` to `after`, not ports (to take a move back)."""
    visits, rows = state.visits, state.rows
    num_steps, num_ranks = state.ports.shape[0], state.ports.shape[2]
    column_before = num_ranks + before // ranks_per_node
    column_after = num_ranks + after // ranks_per_node
    bucket = (expert * num_ranks + source) * num_steps
    for step in range(num_steps):
        many = buckets.start[bucket + step + 1] - buckets.start[bucket + step]
        rows[step, expert, before] -= many
        rows[step, expert, after] += many
    if kind == EVERY_CHOICE:
        return
    crosses = kind == TWO_STAGES and column_before != column_after
    for place in range(buckets.start[bucket], buckets.start[bucket + num_steps]):
        token = buckets.token[place]
        visits[token, after] += 1
        visits[token, before] -= 1
        if crosses:
            visits[token, column_after] += 1
            visits[token, column_before] -= 1


@jit
def _nearest_other(
    state: State, expert: int, source: int, avoid: int, ranks_per_node: int, seed: int, move: int
) -> int:
    """Return the rank of another copy for a source: its own rank, else one on its node, else any; drawn among equals."""
    num_ranks = state.target.shape[1]
    if source != avoid and state.held[expert, source] > 0:
        return source
    home = source // ranks_per_node
    chosen, found, found_at_home = avoid, 0, 0
    for rank in range(num_ranks):
        if rank == avoid or state.held[expert, rank] == 0:
            continue
        at_home = rank // ranks_per_node == home
        if at_home:
            found_at_home += 1
            if hash_below(found_at_home, seed, move, 16 + source, rank) == 0:
                chosen = rank
        elif found_at_home == 0:
            found += 1
            if hash_below(found, seed, move, 16 + source, rank) == 0:
                chosen = rank
    return chosen


@jit
def _propose_swap(state: State, slot_a: int, slot_b: int, slots_per_rank: int, changes: Changes) -> int:
    """Note the changes of swapping two slots; return how many, or −1 when the swap would change or gain nothing."""
    rank_a, rank_b = slot_a // slots_per_rank, slot_b // slots_per_rank
    expert_a, expert_b = state.slots[slot_a], state.slots[slot_b]
    if rank_a == rank_b or state.held[expert_a, rank_b] > 0 or state.held[expert_b, rank_a] > 0:
        return -1
    count = 0
    for source in range(state.target.shape[1]):
        if state.target[expert_a, source] == rank_a:
            _note(changes, count, expert_a, source, rank_a, rank_b)
            count += 1
        if state.target[expert_b, source] == rank_b:
            _note(changes, count, expert_b, source, rank_b, rank_a)
            count += 1
    return count


@jit
def _propose_overwrite(state: State, slot: int, expert: int, slots_per_rank: int, ranks_per_node: int, seed: int, move: int,
                       changes: Changes) -> int:  # fmt: skip
    """Note the changes of overwriting a spare copy by a copy of `expert`; return how many, or −1 when that is not allowed.

    Sources of the lost copy go to their nearest other copy. The new copy takes its own rank's tokens, those of its node
    that went to another node, and a random half of those that now go elsewhere on its node.
    """
    rank = slot // slots_per_rank
    lost = state.slots[slot]
    if state.copies[lost] < 2 or state.held[expert, rank] > 0:
        return -1
    node = rank // ranks_per_node
    count = 0
    for source in range(state.target.shape[1]):
        if state.target[lost, source] == rank and state.held[lost, rank] == 1:
            other = _nearest_other(state, lost, source, rank, ranks_per_node, seed, move)
            _note(changes, count, lost, source, rank, other)
            count += 1
        old = state.target[expert, source]
        source_here, old_here = source // ranks_per_node == node, old // ranks_per_node == node
        takes = source == rank or (source_here and not old_here)
        if not takes and (source_here or old_here) and source != old:
            takes = hash_fraction(seed, move, 8, source) < 0.5
        if takes:
            _note(changes, count, expert, source, old, rank)
            count += 1
    return count


@jit
def _note(changes: Changes, count: int, expert: int, source: int, before: int, after: int) -> None:
    """Write row `count` of the changes."""
    changes.expert[count] = expert
    changes.source[count] = source
    changes.before[count] = before
    changes.after[count] = after


@jit
def anneal(
    state: State,
    buckets: Buckets,
    rules: Rules,
    prices: Prices,
    first_row_weight: float,
    num_moves: int,
    hot_s: float,
    cold_s: float,
    seed: int,
    best_slots: Counts,
    best_target: Counts,
) -> tuple[float, int, int]:
    """Return (best mean seconds, moves evaluated, moves accepted) after `num_moves` proposals.

    The temperature falls geometrically from `hot_s` to `cold_s`, and the price of work grows linearly from
    `first_row_weight` times to once its own: with the full price from the start almost every swap overfills some rank, and
    the search ends up worse even in what it minimises. `state` must be filled; it ends at the last accepted placement, and
    `best_slots`, `best_target` at the best one at full price. Proposals that change nothing count but cost nothing.
    """
    num_slots = len(state.slots)
    num_logical, num_ranks = state.target.shape
    slots_per_rank, ranks_per_node = num_slots // num_ranks, rules.ranks_per_node
    saved = np.empty_like(state.ports)
    room = 2 * num_ranks
    changes = Changes(
        np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    )
    weight = first_row_weight
    best = mean_seconds(state.ports, prices, 1.0)
    current = mean_seconds(state.ports, prices, weight)
    best_slots[:] = state.slots
    best_target[:] = state.target
    evaluated, accepted = 0, 0
    for move in range(num_moves):
        if move % MOVES_PER_WEIGHT == 0:
            weight = first_row_weight + (1.0 - first_row_weight) * move / num_moves
            current = mean_seconds(state.ports, prices, weight)
        kind = hash_fraction(seed, move, 0, 0) if num_slots > num_logical else 0.0
        slot_a, slot_b, expert = hash_below(num_slots, seed, move, 1, 0), 0, 0
        if kind < SWAP_SHARE:
            slot_b = hash_below(num_slots, seed, move, 2, 0)
            count = _propose_swap(state, slot_a, slot_b, slots_per_rank, changes)
        elif kind < SWAP_SHARE + OVERWRITE_SHARE:
            expert = hash_below(num_logical, seed, move, 2, 0)
            count = _propose_overwrite(state, slot_a, expert, slots_per_rank, ranks_per_node, seed, move, changes)
        else:
            expert = state.slots[slot_a]
            source = hash_below(num_ranks, seed, move, 2, 0)
            before, after = state.target[expert, source], slot_a // slots_per_rank
            _note(changes, 0, expert, source, before, after)
            count = 1 if before != after else -1
        if count < 0:
            continue
        evaluated += 1
        saved[:] = state.ports
        for row in range(count):
            before, after = changes.before[row], changes.after[row]
            repoint(state, buckets, changes.expert[row], changes.source[row], before, after, rules)
        seconds = mean_seconds(state.ports, prices, weight)
        temperature = hot_s * (cold_s / hot_s) ** (move / num_moves)
        if seconds > current and hash_fraction(seed, move, 3, 0) >= math.exp((current - seconds) / temperature):
            for row in range(count):
                back_from, back_to = changes.after[row], changes.before[row]
                expert_back, source_back = changes.expert[row], changes.source[row]
                _revisit(state, buckets, expert_back, source_back, back_from, back_to, ranks_per_node, rules.kind)
            state.ports[:] = saved
            continue
        accepted += 1
        current = seconds
        for row in range(count):
            state.target[changes.expert[row], changes.source[row]] = changes.after[row]
        if kind < SWAP_SHARE:
            expert_a, expert_b = state.slots[slot_a], state.slots[slot_b]
            state.slots[slot_a], state.slots[slot_b] = expert_b, expert_a
            state.held[expert_a, slot_a // slots_per_rank] -= 1
            state.held[expert_a, slot_b // slots_per_rank] += 1
            state.held[expert_b, slot_b // slots_per_rank] -= 1
            state.held[expert_b, slot_a // slots_per_rank] += 1
        elif kind < SWAP_SHARE + OVERWRITE_SHARE:
            lost = state.slots[slot_a]
            state.slots[slot_a] = expert
            state.held[lost, slot_a // slots_per_rank] -= 1
            state.held[expert, slot_a // slots_per_rank] += 1
            state.copies[lost] -= 1
            state.copies[expert] += 1
        full = mean_seconds(state.ports, prices, 1.0)
        if full < best:
            best = full
            best_slots[:] = state.slots
            best_target[:] = state.target
    return best, evaluated, accepted
