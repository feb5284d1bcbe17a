"""The compiled twin of schedules whose copies and kernels share one stream.

Modelled: the stream runs, in program order, what the host has launched: dense part, write-backs and copies, kernels. Nothing
overlaps, so a step is a sum, and no queue is needed. Ignored: what the decisions are (`policies.offload`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...base.jit import jit_inner, jit_lean
from ..policies.offload import begin_step, decide_visit
from ..policies.state import (
    BACK_FORMAT,
    BACK_KEY,
    BACK_MOVE,
    DEMAND,
    FIRST_TRANSFER,
    ITEM_KERNEL,
    ITEM_TRANSFER,
    MOVE_CLASS,
    MOVE_FORMAT,
    MOVE_KERNEL,
    MOVE_KEY,
    SIZE_BACKS,
    SIZE_ITEMS,
    SIZE_KERNELS,
    SIZE_MOVES,
    Array,
    Decision,
    PolicyConfig,
    PolicyState,
)  # fmt: skip
from ..timeline import (
    D2H,
    H2D,
    HOST,
    OP_BACK,
    OP_DEMAND,
    OP_DENSE,
    OP_HEAD,
    OP_HOST_LAUNCH,
    OP_HOST_STEP,
    OP_PREFETCH,
)  # fmt: skip
from .clock_fields import (
    ABANDONED,
    BUSY_BACK,
    BUSY_DEMAND,
    BUSY_DENSE,
    BUSY_EXPERT,
    BUSY_HEAD,
    BUSY_HOST,
    BUSY_PREFETCH,
    BYTES_D2H,
    BYTES_H2D,
    COMPUTE_END,
    LIMIT,
    MAKESPAN,
    NOW,
    READY,
    STALL_COPY,
    STALL_HOST,
    STEP,
    STUCK,
    kernel_work,
    write_host_rows,
    write_kernel_row,
    write_row,
)  # fmt: skip
from .costs import HOST_KERNEL, HOST_LAYER, HOST_STEP, HOST_TRANSFER, CostTables

if TYPE_CHECKING:
    from ..policies.steps import Steps


@jit_lean
def run_serial(config: PolicyConfig, steps: Steps, costs: CostTables, state: PolicyState, out: Decision, clock: Array,
               later: Array, step_end: Array, rows: Array) -> None:  # fmt: skip
    """Advance `clock` over `steps` when copies and kernels share one stream, writing each step's end."""
    layers, experts = config.num_layers, config.num_experts
    host = costs.host_ns
    rowing = rows.shape[0] > 0
    now = clock[NOW]
    compute_end = clock[COMPUTE_END]
    for step in range(step_end.shape[0]):
        begin_step(config, steps, state, step)
        line = costs.step_class[clock[STEP]]
        tokens = steps.step_start[step + 1] - steps.step_start[step]
        stamp = clock[STEP]
        launched = now + host[HOST_KERNEL]
        if rowing:
            write_row(rows, clock, HOST, OP_HOST_LAUNCH, stamp, 0, -1, now, launched, 0, 0)
        clock[BUSY_HOST] += host[HOST_KERNEL]
        stream = now
        for layer in range(layers):
            begin = max(stream, launched)
            stream = begin + costs.dense_ns[line, layer]
            clock[STALL_HOST] += begin - compute_end
            clock[BUSY_DENSE] += stream - begin
            compute_end = stream
            if rowing:
                write_row(rows, clock, 0, OP_DENSE, stamp, layer, -1, begin, stream, 0, tokens)
            decide_visit(config, steps, state, out, step, layer)
            moves, kernels, items = out.size[SIZE_MOVES], out.size[SIZE_KERNELS], out.size[SIZE_ITEMS]
            for at in range(items):  # on one stream every earlier copy has ended before this layer began
                clock[READY] += (
                    out.items[at, ITEM_TRANSFER] >= 0 and out.items[at, ITEM_TRANSFER] < out.size[FIRST_TRANSFER]
                )
            backs = out.size[SIZE_BACKS]
            # Host first: the routing is read, every copy is submitted, every kernel launched, in this order.
            at_layer = stream + host[HOST_LAYER]
            submits = at_layer + (moves + backs) * host[HOST_TRANSFER]
            if rowing:
                write_host_rows(rows, clock, host, stamp, layer, stream, moves + backs, kernels + 1)
            clock[BUSY_HOST] += (
                host[HOST_LAYER] + (moves + backs) * host[HOST_TRANSFER] + (kernels + 1) * host[HOST_KERNEL]
            )
            launched = submits + (kernels + 1) * host[HOST_KERNEL]
            move = 0
            back = 0
            item = 0
            copied = 0
            for kernel in range(kernels + 1):
                # Before a kernel run the copies it needs, each behind the write-backs submitted with it; prefetches and
                # what is left come after the last kernel.
                while move < moves and (
                    kernel == kernels
                    or (out.moves[move, MOVE_CLASS] == DEMAND and out.moves[move, MOVE_KERNEL] <= kernel)
                ):
                    while back < backs and out.backs[back, BACK_MOVE] <= move:
                        begin = max(stream, at_layer + (move + back + 1) * host[HOST_TRANSFER])
                        stream = _serial_back(costs, out, clock, rows, stamp, experts, back, begin)
                        copied += stream - begin
                        back += 1
                    begin = max(stream, at_layer + (move + back + 1) * host[HOST_TRANSFER])
                    stream = _serial_move(costs, out, clock, rows, stamp, layers, experts, move, begin)
                    copied += stream - begin
                    move += 1
                if kernel == kernels:
                    break
                first = item
                while item < items and out.items[item, ITEM_KERNEL] == kernel:
                    item += 1
                begin = max(stream, submits + (kernel + 1) * host[HOST_KERNEL])
                stream = begin + kernel_work(costs, out, first, item)
                clock[STALL_COPY] += copied
                clock[STALL_HOST] += begin - compute_end - copied
                clock[BUSY_EXPERT] += stream - begin
                compute_end = stream
                copied = 0
                if rowing:
                    write_kernel_row(rows, clock, out, stamp, layer, first, item, begin, stream)
            while back < backs:
                begin = max(stream, at_layer + (move + back + 1) * host[HOST_TRANSFER])
                stream = _serial_back(costs, out, clock, rows, stamp, experts, back, begin)
                copied += stream - begin
                back += 1
            clock[STALL_COPY] += copied
            clock[STALL_HOST] -= copied
        begin = max(stream, launched)
        stream = begin + costs.head_ns[line]
        clock[STALL_HOST] += begin - compute_end
        clock[BUSY_HEAD] += stream - begin
        compute_end = stream
        now = stream + host[HOST_STEP]
        if rowing:
            write_row(rows, clock, 0, OP_HEAD, stamp, layers - 1, -1, begin, stream, 0, tokens)
            write_row(rows, clock, HOST, OP_HOST_STEP, stamp, layers - 1, -1, stream, now, 0, 0)
        clock[BUSY_HOST] += host[HOST_STEP]
        step_end[step] = now
        if clock[LIMIT] and now + later[step + 1] > clock[LIMIT]:
            clock[STUCK] = ABANDONED
            return
        clock[STEP] += 1
    clock[NOW] = now
    clock[COMPUTE_END] = compute_end
    clock[MAKESPAN] = now


@jit_inner
def _serial_move(costs: CostTables, out: Decision, clock: Array, rows: Array, step: int, layers: int, experts: int,
                 move: int, begin: int) -> int:  # fmt: skip
    """Run one transfer's chunks back to back; return when they end."""
    key = out.moves[move, MOVE_KEY]
    fmt = out.moves[move, MOVE_FORMAT]
    demand = out.moves[move, MOVE_CLASS] == DEMAND
    for chunk in range(costs.num_chunks[fmt]):
        last = int(chunk == costs.num_chunks[fmt] - 1)
        end = begin + costs.chunk_ns[fmt, last]
        write_row(rows, clock, H2D, OP_DEMAND if demand else OP_PREFETCH, step, key // experts, key % experts, begin, end,
             costs.chunk_bytes[fmt, last], 0)  # fmt: skip
        clock[BUSY_DEMAND if demand else BUSY_PREFETCH] += end - begin
        begin = end
    clock[BYTES_H2D] += costs.expert_bytes[fmt]
    return begin


@jit_inner
def _serial_back(
    costs: CostTables, out: Decision, clock: Array, rows: Array, step: int, experts: int, back: int, begin: int
) -> int:
    """Run one write-back; return when it ends."""
    key = out.backs[back, BACK_KEY]
    fmt = out.backs[back, BACK_FORMAT]
    end = begin + int(costs.back_ns[fmt])
    write_row(rows, clock, D2H, OP_BACK, step, key // experts, key % experts, begin, end, costs.expert_bytes[fmt], 0)
    clock[BUSY_BACK] += end - begin
    clock[BYTES_D2H] += costs.expert_bytes[fmt]
    return end
