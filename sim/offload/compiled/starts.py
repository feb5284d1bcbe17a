"""What begins at an instant: the fourth phase of the compiled simulator, one arbitration.

Modelled: each idle lane takes its first request, if that may start. Ignored: how much slower it runs beside others (`compiled`).
"""

from __future__ import annotations

from ....base.jit import jit_inline
from ....base.records import Array
from ...policies.state import DEMAND, NONE, PREFETCH, Decision, PolicyConfig
from ...timeline import COMPUTE, CPU, D2H, DISK, H2D, OP_EXPERT, RATE_ONE
from ..costs import CostTables
from ..run_records import NEVER, Queue, Run


@jit_inline
def arbitrate(config: PolicyConfig, costs: CostTables, out: Decision, run: Run, now: int) -> None:
    """Begin what may begin now on every idle lane."""
    lanes, program = run.lanes, run.program[0]
    if lanes[H2D].end == NEVER and _next_transfer(run):
        moving = run.moving[0]
        moving.left -= 1
        moving.began = moving.kind
        _begin(lanes, H2D, now, costs.chunk_ns[moving.format, int(moving.left == 0)])
    if lanes[D2H].end == NEVER:
        ends = run.backs.ends[0]
        if ends.head < ends.tail and run.backs.entries[ends.head].wait_kernel < run.clock[0].kernels_done:
            _begin(lanes, D2H, now, costs.back_ns[run.backs.entries[ends.head].format])
    if lanes[CPU].end == NEVER and program.core < program.num_cores and program.cores_from <= now:
        item = out.cores[program.core]
        if item.read < run.clock[0].reads_done:
            _begin(lanes, CPU, now, costs.cpu_ns[item.format, item.tokens])
    if lanes[DISK].end == NEVER:
        ends = run.reads.ends[0]
        if ends.head < ends.tail:
            _begin(lanes, DISK, now, costs.disk_ns[run.reads.entries[ends.head].format])
    if lanes[COMPUTE].end == NEVER and program.op < program.num_ops and run.ops[program.op].ready <= now:
        _begin_operation(config, out, run, now)


@jit_inline
def _begin(lanes: Array, at: int, now: int, duration: int) -> None:
    lane = lanes[at]
    lane.start = now
    lane.updated = now
    lane.work = duration * RATE_ONE
    lane.rate = RATE_ONE
    lane.end = now + duration


@jit_inline
def _may_move(run: Run, queue: Queue) -> bool:
    """Return whether the first of a queue's transfers may begin: its slot is free and its bytes are in the host's memory."""
    clock, entry = run.clock[0], queue.entries[queue.ends[0].head]
    return bool(
        entry.wait_kernel < clock.kernels_done and entry.wait_back < clock.backs_done and entry.read < clock.reads_done
    )


@jit_inline
def _next_transfer(run: Run) -> bool:
    """Take the next transfer, or the rest of one, from its queue, demands first; return whether there is one that may begin."""
    if run.demands.ends[0].head < run.demands.ends[0].tail:
        if not _may_move(run, run.demands):
            return False
        run.moving[0] = run.demands.entries[run.demands.ends[0].head]
        run.moving[0].kind = DEMAND
        run.demands.ends[0].head += 1
        return True
    entries, ends = run.guesses.entries, run.guesses.ends[0]
    while ends.head < ends.tail and entries[ends.head].left == 0:
        ends.head += 1
    if ends.head == ends.tail or not _may_move(run, run.guesses):
        return False
    run.moving[0] = entries[ends.head]
    run.moving[0].kind = PREFETCH
    ends.head += 1
    return True


@jit_inline
def _may_run(config: PolicyConfig, out: Decision, run: Run) -> bool:
    """Return whether the compute stream's next operation need not wait for others' copies or the host's cores.

    What follows a layer step's experts waits for those on the host's cores and for all that the layer step demanded: also for
    guesses that nobody used, whose places were given away. Without a cache the experts themselves wait for such.
    """
    program, first, ends = run.program[0], out.size[0].first_transfer, run.demands.ends[0]
    moves_demand = run.lanes[H2D].end != NEVER and run.moving[0].kind == DEMAND
    if run.ops[program.op].code != OP_EXPERT:
        return bool(program.core == program.num_cores and ends.head == ends.tail and not moves_demand)
    if program.op == 0 and config.policy == NONE:
        none_waits = ends.head == ends.tail or run.demands.entries[ends.head].id >= first
        return bool(none_waits and not (moves_demand and run.moving[0].id < first))
    return True


@jit_inline
def _begin_operation(config: PolicyConfig, out: Decision, run: Run, now: int) -> None:
    """Begin the compute stream's next operation, if all that it waits for is there."""
    if not _may_run(config, out, run):
        return
    clock, program, items = run.clock[0], run.program[0], out.items
    op = run.ops[program.op]
    while program.awaited < op.last:
        item = items[program.awaited]
        if item.transfer >= 0 and run.arrived[item.key] < item.transfer:
            return
        program.awaited += 1
    stalled_host = max(0, min(now, op.ready) - clock.compute_end)
    stalled_cpu = 0
    if op.code != OP_EXPERT:
        stalled_cpu = max(0, program.cores_end - clock.compute_end - stalled_host)
    clock.stall_host += stalled_host
    clock.stall_cpu += stalled_cpu
    clock.stall_copy += now - clock.compute_end - stalled_host - stalled_cpu
    _begin(run.lanes, COMPUTE, now, op.work)
    if program.op + 1 < program.num_ops:
        program.awaited = run.ops[program.op + 1].first
