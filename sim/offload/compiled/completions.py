"""What ends at an instant: the first phase of the compiled simulator.

Modelled: at most one activity of each lane ends at a time; what moved is counted, and the rest of a transfer that is moved in
chunks goes back to its queue. Ignored: what then begins (`starts`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....base.jit import jit_inline
from ...policies.state import DEMAND, Decision, PolicyConfig
from ...timeline import (
    COMPUTE,
    CPU,
    D2H,
    DISK,
    H2D,
    OP_BACK,
    OP_CPU,
    OP_DEMAND,
    OP_DENSE,
    OP_DISK,
    OP_EXPERT,
    OP_PREFETCH,
)
from .queues import place_before, settle_demand, settle_guess
from .rows import write_copy_row, write_kernel_row, write_row
from ..costs import CostTables
from ..run_records import NEVER, QUEUE_FULL, Run

if TYPE_CHECKING:
    from ...policies.steps import Steps


@jit_inline
def complete(config: PolicyConfig, steps: Steps, costs: CostTables, out: Decision, run: Run, now: int) -> bool:
    """End what ends now on every lane; return whether the compute stream has run all that was launched."""
    lanes = run.lanes
    finished = False
    if lanes[COMPUTE].end <= now:
        finished = _end_operation(steps, out, run, now)
    if lanes[H2D].end <= now:
        _end_chunk(config, costs, run, now)
    if lanes[D2H].end <= now:
        _end_back(config, costs, run, now)
    if lanes[CPU].end <= now:
        _end_core(out, run, now)
    if lanes[DISK].end <= now:
        _end_read(config, costs, run, now)
    return finished


@jit_inline
def _end_operation(steps: Steps, out: Decision, run: Run, now: int) -> bool:
    clock, program, lane = run.clock[0], run.program[0], run.lanes[COMPUTE]
    lane.end = NEVER
    clock.compute_end = now
    op = run.ops[program.op]
    if op.code == OP_EXPERT:
        clock.kernels_done += 1
        clock.busy_expert += now - lane.start
        if run.rows.shape[0]:
            place = (clock.step, program.layer)
            write_kernel_row(run.rows, run.clock, out, place, op.first, op.last, (lane.start, now))
    else:
        if op.code == OP_DENSE:
            clock.busy_dense += now - lane.start
        else:
            clock.busy_head += now - lane.start
        if run.rows.shape[0]:
            tokens = steps.step_start[program.step + 1] - steps.step_start[program.step]
            layer = program.layer + 1 if op.code == OP_DENSE else program.layer
            write_row(run.rows, run.clock, (COMPUTE, op.code), (clock.step, layer, -1), (lane.start, now), 0, tokens)
    program.op += 1
    return bool(program.op == program.num_ops)


@jit_inline
def _end_chunk(config: PolicyConfig, costs: CostTables, run: Run, now: int) -> None:
    clock, lane, moving = run.clock[0], run.lanes[H2D], run.moving[0]
    lane.end = NEVER
    demanded = moving.began == DEMAND
    if demanded:
        clock.busy_demand += now - lane.start
    else:
        clock.busy_prefetch += now - lane.start
    num_bytes = costs.chunk_bytes[moving.format, int(moving.left == 0)]
    clock.bytes_h2d += num_bytes
    if now > run.program[0].end:
        clock.after_h2d += num_bytes
    if run.rows.shape[0]:
        what = (H2D, OP_DEMAND if demanded else OP_PREFETCH)
        write_copy_row(run.rows, run.clock, config, what, moving.target, moving.key, (lane.start, now), num_bytes)
    if moving.left == 0:
        run.arrived[moving.key] = max(run.arrived[moving.key], moving.id)
    elif moving.kind == DEMAND:  # the rest of a cut transfer goes back to the front of its queue
        if place_before(run.demands) < 0:
            clock.stuck = QUEUE_FULL
        else:
            settle_demand(run.demands, run.moving)
    elif place_before(run.guesses) < 0:
        clock.stuck = QUEUE_FULL
    else:
        settle_guess(run.guesses, run.moving)


@jit_inline
def _end_back(config: PolicyConfig, costs: CostTables, run: Run, now: int) -> None:
    clock, lane, queue = run.clock[0], run.lanes[D2H], run.backs
    back = queue.entries[queue.ends[0].head]
    num_bytes = costs.expert_bytes[back.format]
    lane.end = NEVER
    clock.backs_done += 1
    clock.busy_back += now - lane.start
    clock.bytes_d2h += num_bytes
    if now > run.program[0].end:
        clock.after_d2h += num_bytes
    if run.rows.shape[0]:
        write_copy_row(run.rows, run.clock, config, (D2H, OP_BACK), back.target, back.key, (lane.start, now), num_bytes)
    queue.ends[0].head += 1


@jit_inline
def _end_core(out: Decision, run: Run, now: int) -> None:
    clock, program, lane = run.clock[0], run.program[0], run.lanes[CPU]
    lane.end = NEVER
    clock.busy_cpu += now - lane.start
    if run.rows.shape[0]:
        item = out.cores[program.core]
        place = (clock.step, program.layer, item.expert)
        write_row(run.rows, run.clock, (CPU, OP_CPU), place, (lane.start, now), 0, item.tokens)
    program.core += 1
    program.cores_end = now


@jit_inline
def _end_read(config: PolicyConfig, costs: CostTables, run: Run, now: int) -> None:
    clock, lane, queue = run.clock[0], run.lanes[DISK], run.reads
    read = queue.entries[queue.ends[0].head]
    num_bytes = costs.expert_bytes[read.format]
    lane.end = NEVER
    clock.reads_done += 1
    clock.busy_disk += now - lane.start
    if now > run.program[0].end:
        clock.after_disk += num_bytes
    if run.rows.shape[0]:
        write_copy_row(
            run.rows, run.clock, config, (DISK, OP_DISK), read.target, read.key, (lane.start, now), num_bytes
        )
    queue.ends[0].head += 1
