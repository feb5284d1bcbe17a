"""What an engine adds up in time, and how a row of its timeline is written.

Modelled: the places of a run's `clock`, and the few things that both halves of the compiled twin do alike. Ignored: when
anything happens; that is the engines' business.
"""

from __future__ import annotations

from ...base.jit import jit_inline, jit_inner, jit_lean
from ..policies.state import ITEM_EXPERT, ITEM_FORMAT, ITEM_TOKENS, Array, Decision, PolicyConfig
from ..timeline import (
    HOST,
    OP_EXPERT,
    OP_HOST_LAUNCH,
    OP_HOST_LAYER,
    OP_HOST_SUBMIT,
    ROW_BYTES,
    ROW_END,
    ROW_EXPERT,
    ROW_LANE,
    ROW_LAYER,
    ROW_OP,
    ROW_START,
    ROW_STEP,
    ROW_TOKENS,
)  # fmt: skip
from .costs import HOST_KERNEL, HOST_LAYER, HOST_TRANSFER, CostTables

# `clock` indices: what a run carries from one piece of a recording to the next, and what it adds up.
(
    NOW, COMPUTE_END, KERNELS_DONE, BACKS_DONE, ROWS, STUCK, READY, LATE,
    BUSY_DENSE, BUSY_EXPERT, BUSY_HEAD, BUSY_DEMAND, BUSY_PREFETCH, BUSY_BACK, BUSY_HOST, BUSY_CPU, BUSY_DISK,
    STALL_COPY, STALL_HOST, STALL_CPU, BYTES_H2D, BYTES_D2H, AFTER_H2D, AFTER_D2H, AFTER_DISK, MAKESPAN, STEP, LIMIT, NUM_CLOCK,
) = range(29)  # fmt: skip
# BYTES_… are all that moved; AFTER_… the part of them that moved after the last step had ended (of the disk: read).

# Values of `clock[STUCK]`.
DEADLOCK, QUEUE_FULL, ABANDONED = 1, 2, 3


@jit_inner
def write_row(rows: Array, clock: Array, lane: int, op: int, step: int, layer: int, expert: int, start: int, end: int,
         num_bytes: int, tokens: int) -> None:  # fmt: skip
    """Count one timeline row and write it where rows are wanted; activities that take no time leave none."""
    if end > start:
        at = clock[ROWS]
        if at < rows.shape[0]:
            rows[at, ROW_LANE] = lane
            rows[at, ROW_OP] = op
            rows[at, ROW_STEP] = step
            rows[at, ROW_LAYER] = layer
            rows[at, ROW_EXPERT] = expert
            rows[at, ROW_START] = start
            rows[at, ROW_END] = end
            rows[at, ROW_BYTES] = num_bytes
            rows[at, ROW_TOKENS] = tokens
        clock[ROWS] = at + 1


@jit_inline
def count_bytes(clock: Array, total: int, after: int, num_bytes: int, is_after: bool) -> None:
    """Add bytes that a lane has just moved to its total and, where the last step had ended before, to what came after."""
    clock[total] += num_bytes
    if is_after:
        clock[after] += num_bytes


@jit_lean
def kernel_work(costs: CostTables, out: Decision, first: int, last: int) -> int:
    """Return the nanoseconds of one launch over items `first` to `last` (exclusive)."""
    items = out.items
    work = int(costs.grouped_ns[0])
    for at in range(first, last):
        work += int(costs.kernel_ns[items[at, ITEM_FORMAT], items[at, ITEM_TOKENS]])
    return work


@jit_inner
def write_kernel_row(
    rows: Array, clock: Array, out: Decision, step: int, layer: int, first: int, last: int, start: int, end: int
) -> None:
    """Write one kernel's row: an expert of its own, or -1 for a group, with the tokens of all."""
    items = out.items
    tokens = 0
    for at in range(first, last):
        tokens += items[at, ITEM_TOKENS]
    expert = items[first, ITEM_EXPERT] if last - first == 1 else -1
    write_row(rows, clock, 0, OP_EXPERT, step, layer, expert, start, end, 0, tokens)


@jit_inner
def write_copy_row(rows: Array, clock: Array, config: PolicyConfig, lane: int, op: int, visit: int, key: int, start: int, end: int,
                   num_bytes: int) -> None:  # fmt: skip
    """Write the row of a copy or a read of `key` that was made for `visit`."""
    layer, expert = key // config.num_experts, key % config.num_experts
    write_row(rows, clock, lane, op, visit // config.num_layers, layer, expert, start, end, num_bytes, 0)


@jit_inner
def write_host_rows(
    rows: Array, clock: Array, host: Array, step: int, layer: int, now: int, num_copies: int, num_launches: int
) -> None:
    """Write what the host does at a visit from `now` on: the routing is read, copies submitted, kernels launched."""
    end = now + host[HOST_LAYER]
    write_row(rows, clock, HOST, OP_HOST_LAYER, step, layer, -1, now, end, 0, 0)
    for _ in range(num_copies):
        begin = end
        end = begin + host[HOST_TRANSFER]
        write_row(rows, clock, HOST, OP_HOST_SUBMIT, step, layer, -1, begin, end, 0, 0)
    for _ in range(num_launches):
        begin = end
        end = begin + host[HOST_KERNEL]
        write_row(rows, clock, HOST, OP_HOST_LAUNCH, step, layer, -1, begin, end, 0, 0)
