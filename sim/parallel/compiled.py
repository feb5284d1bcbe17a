"""The compiled simulator of the expert-parallel model: the same semantics as `ep_model`, as array loops.

Modelled: all ranks run one program and wait for the same exchanges, so operations are settled one by one for all ranks as
soon as the exchanges they wait for have a known end; then the network's next arbitration is found and done. Nothing that
is unknown at that moment can be requested before it, because every stage takes at least a nanosecond. Ignored: what
`ep_model` ignores.
"""

from __future__ import annotations

from ...base.jit import jit_lean
from .tables import EpTables
from .timeline import (
    EP_BYTES, EP_END, EP_GROUP, EP_LANE, EP_LAYER, EP_MICRO, EP_OP, EP_RANK, EP_START, EP_TOKENS, LANE_COMPUTE, LANE_INTER,
)  # fmt: skip
from .program import CLASS_COMBINE, FREE, IN_TURN, NONE, NUM_TIERS, Program
from ..policies.state import Array

_NEVER = 2**62
# `clock` indices.
CLOCK_ROWS, CLOCK_STUCK, CLOCK_MAKESPAN, NUM_EP_CLOCK = range(4)
# Columns of `progress`, one line an exchange: when its next stage may begin, its stages done, the longest port of each tier.
AT_READY, AT_STAGE, AT_LONGEST_INTER, AT_LONGEST_INTRA, NUM_PROGRESS = range(5)


@jit_lean
def run_program(program: Program, tables: EpTables, op_end: Array, ex_start: Array, ex_end: Array, progress: Array,
                clock: Array, rows: Array) -> None:  # fmt: skip
    """Fill `op_end` [ops, ranks], `ex_start` and `ex_end` [exchanges], and as many `rows` as there is room for.

    progress: int64 [exchanges, NUM_PROGRESS], scratch. clock: int64 [NUM_EP_CLOCK].
    """
    num_ops, num_ranks = tables.work_ns.shape
    num_ex = ex_end.shape[0]
    for ex in range(num_ex):
        ex_start[ex] = NONE
        ex_end[ex] = NONE
        progress[ex, AT_READY] = NONE
        progress[ex, AT_STAGE] = 0
        for tier in range(NUM_TIERS):
            progress[ex, AT_LONGEST_INTER + tier] = 0
            for rank in range(num_ranks):
                progress[ex, AT_LONGEST_INTER + tier] = max(
                    progress[ex, AT_LONGEST_INTER + tier], tables.ex_ns[ex, tier, rank]
                )
    free_inter = 0
    free_intra = 0
    op = 0
    known = 0  # exchanges below have been requested or come after one that has not ended
    low = 0  # exchanges below have ended
    makespan = 0
    while True:
        # 1. Settle every operation whose exchanges have a known end.
        while op < num_ops:
            arrival = 0
            for at in range(program.wait_start[op], program.wait_start[op + 1]):
                end = ex_end[program.wait_list[at]]
                arrival = _NEVER if end == NONE else max(arrival, end)
                if end == NONE:
                    break
            if arrival == _NEVER:
                break
            for rank in range(num_ranks):
                before = op_end[op - 1, rank] if op else 0
                begin = max(before, arrival)
                op_end[op, rank] = begin + tables.work_ns[op, rank]
                makespan = max(makespan, op_end[op, rank])
                if tables.work_ns[op, rank]:
                    what = (program.op_kind[op], program.op_layer[op], program.op_micro[op], program.op_group[op])
                    _row(
                        rows,
                        clock,
                        (rank, LANE_COMPUTE),
                        what,
                        (begin, op_end[op, rank]),
                        0,
                        tables.op_tokens[op, rank],
                    )
            op += 1
        # 2. Request every exchange whose predecessor is settled; one without bytes is over at once.
        while low < num_ex and ex_end[low] != NONE:
            low += 1
        known = max(known, low)
        while known < num_ex and (program.ex_after_op[known] < op):
            known += 1  # of those, some follow another exchange and are looked at again and again until it has ended
        over = False
        for ex in range(low, known):
            if progress[ex, AT_READY] == NONE:
                ready = NONE
                if program.ex_after_ex[ex] != NONE:
                    ready = ex_end[program.ex_after_ex[ex]]
                else:
                    for rank in range(num_ranks):
                        ready = max(ready, op_end[program.ex_after_op[ex], rank])
                progress[ex, AT_READY] = ready
                if ready != NONE and progress[ex, AT_LONGEST_INTER] == 0 and progress[ex, AT_LONGEST_INTRA] == 0:
                    ex_start[ex] = ready
                    ex_end[ex] = ready
                    over = True
        if over:
            continue
        # 3. Find the next instant at which something can begin.
        now = _NEVER
        for ex in range(low, known):
            if progress[ex, AT_READY] != NONE and ex_end[ex] == NONE:
                now = min(now, _earliest(program, progress, ex, free_inter, free_intra))
        if now == _NEVER:
            break
        # 4. One arbitration: whoever is first and finds its tiers free begins.
        for kind in range(CLASS_COMBINE + 1):
            for ex in range(low, known):
                if program.ex_class[ex] != kind or progress[ex, AT_READY] == NONE or ex_end[ex] != NONE:
                    continue
                if _earliest(program, progress, ex, free_inter, free_intra) > now:
                    continue
                if ex_start[ex] == NONE:
                    ex_start[ex] = now
                if program.ex_mode[ex] == FREE:
                    tier = _next_tier(program, progress, ex)
                    end = now + progress[ex, AT_LONGEST_INTER + tier]
                    _ports(program, tables, rows, clock, ex, tier, now)
                    if tier == 0:
                        free_inter = end
                    else:
                        free_intra = end
                    progress[ex, AT_READY] = end
                    second = progress[ex, AT_STAGE] > 0 or tier != program.ex_first[ex]
                    last = second or progress[ex, AT_LONGEST_INTER + 1 - tier] == 0
                    progress[ex, AT_STAGE] = NUM_TIERS if last else 1
                    if progress[ex, AT_STAGE] == NUM_TIERS:
                        ex_end[ex] = end
                else:
                    end = now
                    begin = now
                    for stage in range(NUM_TIERS):
                        tier = program.ex_first[ex] if stage == 0 else 1 - program.ex_first[ex]
                        length = progress[ex, AT_LONGEST_INTER + tier]
                        _ports(program, tables, rows, clock, ex, tier, begin)
                        end = max(end, begin + length)
                        if program.ex_mode[ex] == IN_TURN:
                            begin += length
                    free_inter = end
                    free_intra = end
                    ex_end[ex] = end
                makespan = max(makespan, ex_end[ex])
    clock[CLOCK_MAKESPAN] = makespan
    clock[CLOCK_STUCK] = op < num_ops or low < num_ex


@jit_lean
def _next_tier(program: Program, progress: Array, ex: int) -> int:
    """Return the tier of an exchange's next stage, passing over a first stage without bytes."""
    tier: int = program.ex_first[ex]
    if progress[ex, AT_STAGE] or progress[ex, AT_LONGEST_INTER + tier] == 0:
        tier = 1 - tier
    return tier


@jit_lean
def _earliest(program: Program, progress: Array, ex: int, free_inter: int, free_intra: int) -> int:
    """Return when the next stage of a requested exchange may begin, as far as its tiers are concerned."""
    earliest: int = progress[ex, AT_READY]
    free = program.ex_mode[ex] == FREE
    if not free or _next_tier(program, progress, ex) == 0:
        earliest = max(earliest, free_inter)
    if not free or _next_tier(program, progress, ex) == 1:
        earliest = max(earliest, free_intra)
    return earliest


@jit_lean
def _ports(program: Program, tables: EpTables, rows: Array, clock: Array, ex: int, tier: int, begin: int) -> None:
    """Count or write the rows of every rank's port."""
    for rank in range(tables.ex_ns.shape[2]):
        length = tables.ex_ns[ex, tier, rank]
        if length:
            what = (program.ex_kind[ex], program.ex_layer[ex], program.ex_micro[ex], program.ex_group[ex])
            num_bytes, tokens = tables.ex_bytes[ex, tier, rank], tables.ex_tokens[ex, tier, rank]
            _row(rows, clock, (rank, LANE_INTER + tier), what, (begin, begin + length), num_bytes, tokens)


@jit_lean
def _row(
    rows: Array, clock: Array, where: tuple[int, int], what: tuple[int, int, int, int], span: tuple[int, int], num_bytes: int,
    tokens: int,
) -> None:  # fmt: skip
    """Count one timeline row and write it where there is room.

    where: (rank, lane). what: (operation, layer, micro-batch, group). span: (start, end).
    """
    rank, lane = where
    op, layer, micro, group = what
    start, end = span
    at = clock[CLOCK_ROWS]
    if at < rows.shape[0]:
        rows[at, EP_RANK] = rank
        rows[at, EP_LANE] = lane
        rows[at, EP_OP] = op
        rows[at, EP_LAYER] = layer
        rows[at, EP_MICRO] = micro
        rows[at, EP_GROUP] = group
        rows[at, EP_START] = start
        rows[at, EP_END] = end
        rows[at, EP_BYTES] = num_bytes
        rows[at, EP_TOKENS] = tokens
    clock[CLOCK_ROWS] = at + 1
