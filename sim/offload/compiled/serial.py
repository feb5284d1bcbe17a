"""The compiled simulator of schedules whose copies and kernels share one stream.

Modelled: the stream runs, in program order, what the host has launched: dense part, write-backs and copies, kernels. Nothing
overlaps, so a step is a sum, and no queue is needed. Ignored: what the decisions are (`policies.offload`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....base.jit import jit_inline, jit_inner, jit_lean
from ...policies.offload import begin_step, decide_layer_step
from ...policies.state import DEMAND, Decision, PolicyConfig, PolicyState
from ...timeline import (
    COMPUTE,
    D2H,
    H2D,
    OP_BACK,
    OP_DEMAND,
    OP_DENSE,
    OP_HEAD,
    OP_HOST_LAUNCH,
    OP_HOST_STEP,
    OP_PREFETCH,
)
from .rows import is_hopeless, kernel_work, write_host_row, write_host_rows, write_kernel_row, write_row
from ..costs import CostTables
from ..run_records import ABANDONED, Run

if TYPE_CHECKING:
    from ...policies.steps import Steps


@jit_lean
def run_serial(
    config: PolicyConfig, steps: Steps, costs: CostTables, state: PolicyState, out: Decision, run: Run
) -> None:
    """Advance `run` over `steps` when copies and kernels share one stream, writing each step's end."""
    clock, host, layers = run.clock[0], costs.host_ns[0], config.num_layers
    rowing = run.rows.shape[0] > 0
    for step in range(run.step_end.shape[0]):
        begin_step(config, steps, state, step)
        line = costs.step_class[clock.step]
        tokens = steps.step_start[step + 1] - steps.step_start[step]
        now = clock.now
        launched = now + host.kernel
        if rowing:
            write_host_row(run.rows, run.clock, OP_HOST_LAUNCH, (clock.step, 0), (now, launched))
        clock.busy_host += host.kernel
        stream = now
        for layer in range(layers):
            begin = max(stream, launched)
            stream = begin + costs.dense_ns[line, layer]
            clock.stall_host += begin - clock.compute_end
            clock.busy_dense += stream - begin
            clock.compute_end = stream
            if rowing:
                place = (clock.step, layer, -1)
                write_row(run.rows, run.clock, (COMPUTE, OP_DENSE), place, (begin, stream), 0, tokens)
            decide_layer_step(config, steps, state, out, step, layer)
            stream, launched = _layer_step(config, costs, out, run, layer, stream)
        begin = max(stream, launched)
        stream = begin + costs.head_ns[line]
        clock.stall_host += begin - clock.compute_end
        clock.busy_head += stream - begin
        clock.compute_end = stream
        clock.now = stream + host.step
        if rowing:
            write_row(run.rows, run.clock, (COMPUTE, OP_HEAD), (clock.step, layers - 1, -1), (begin, stream), 0, tokens)
            write_host_row(run.rows, run.clock, OP_HOST_STEP, (clock.step, layers - 1), (stream, clock.now))
        clock.busy_host += host.step
        run.step_end[step] = clock.now
        if is_hopeless(run, step, now, clock.now):
            clock.stuck = ABANDONED
            return
        clock.step += 1
    clock.makespan = clock.now


@jit_inline
def _layer_step(
    config: PolicyConfig, costs: CostTables, out: Decision, run: Run, layer: int, stream: int
) -> tuple[int, int]:
    """Run what a layer step decided, from `stream` on; return when it ends and when the host has launched what follows."""
    clock, host, size, items = run.clock[0], costs.host_ns[0], out.size[0], out.items
    for at in range(size.items):  # on one stream every earlier copy has ended before this layer began
        clock.ready += items[at].transfer >= 0 and items[at].transfer < size.first_transfer
    copies, kernels = size.moves + size.backs, size.kernels
    # Host first: the routing is read, every copy is submitted, every kernel launched, in this order.
    at_layer = stream + host.layer
    submits = at_layer + copies * host.transfer
    if run.rows.shape[0]:
        write_host_rows(run.rows, run.clock, costs, (clock.step, layer), stream, copies, kernels + 1)
    clock.busy_host += host.layer + copies * host.transfer + (kernels + 1) * host.kernel
    move = 0
    back = 0
    item = 0
    copied = 0
    for kernel in range(kernels + 1):
        # Before a kernel run the copies it needs, each behind the write-backs submitted with it; prefetches and
        # what is left come after the last kernel.
        while move < size.moves and (
            kernel == kernels or (out.moves[move].kind == DEMAND and out.moves[move].kernel <= kernel)
        ):
            while back < size.backs and out.backs[back].move <= move:
                begin = max(stream, at_layer + (move + back + 1) * host.transfer)
                stream = _write_back(config, costs, out, run, back, begin)
                copied += stream - begin
                back += 1
            begin = max(stream, at_layer + (move + back + 1) * host.transfer)
            stream = _move(config, costs, out, run, move, begin)
            copied += stream - begin
            move += 1
        if kernel == kernels:
            break
        first = item
        while item < size.items and items[item].kernel == kernel:
            item += 1
        begin = max(stream, submits + (kernel + 1) * host.kernel)
        stream = begin + kernel_work(costs, out, first, item)
        clock.stall_copy += copied
        clock.stall_host += begin - clock.compute_end - copied
        clock.busy_expert += stream - begin
        clock.compute_end = stream
        copied = 0
        if run.rows.shape[0]:
            write_kernel_row(run.rows, run.clock, out, (clock.step, layer), first, item, (begin, stream))
    while back < size.backs:
        begin = max(stream, at_layer + (move + back + 1) * host.transfer)
        stream = _write_back(config, costs, out, run, back, begin)
        copied += stream - begin
        back += 1
    clock.stall_copy += copied
    clock.stall_host -= copied
    return stream, submits + (kernels + 1) * host.kernel


@jit_inner
def _move(config: PolicyConfig, costs: CostTables, out: Decision, run: Run, at: int, begin: int) -> int:
    """Run one transfer's chunks back to back; return when they end."""
    move, clock = out.moves[at], run.clock[0]
    demand = move.kind == DEMAND
    place = (clock.step, move.key // config.num_experts, move.key % config.num_experts)
    what = (H2D, OP_DEMAND if demand else OP_PREFETCH)
    for chunk in range(costs.num_chunks[move.format]):
        last = int(chunk == costs.num_chunks[move.format] - 1)
        end = begin + costs.chunk_ns[move.format, last]
        write_row(run.rows, run.clock, what, place, (begin, end), costs.chunk_bytes[move.format, last], 0)
        if demand:
            clock.busy_demand += end - begin
        else:
            clock.busy_prefetch += end - begin
        begin = end
    clock.bytes_h2d += costs.expert_bytes[move.format]
    return begin


@jit_inner
def _write_back(config: PolicyConfig, costs: CostTables, out: Decision, run: Run, at: int, begin: int) -> int:
    """Run one write-back; return when it ends."""
    back, clock = out.backs[at], run.clock[0]
    end = begin + int(costs.back_ns[back.format])
    num_bytes = costs.expert_bytes[back.format]
    place = (clock.step, back.key // config.num_experts, back.key % config.num_experts)
    write_row(run.rows, run.clock, (D2H, OP_BACK), place, (begin, end), num_bytes, 0)
    clock.busy_back += end - begin
    clock.bytes_d2h += num_bytes
    return end
