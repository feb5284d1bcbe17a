"""The compiled simulator of the offload model: the same semantics as `simpy_model`, as array loops.

Modelled: a compute stream in program order, a host→device copy engine that serves demands before prefetches and one
transfer (or chunk) at a time, a device→host engine and a disk in order, the host's cores on one expert at a time, and a
host whose operations precede what they submit. While several lanes are busy each may run slower: an activity has whole
work left and a rate that changes when its companions do. At one instant, completions come first (`completions`), then the
host's program, then submissions (`submissions`), then one arbitration (`starts`). Ignored: what the decisions are; they are
made by `policies.offload.decide_layer_step`, as in the model. (`serial` has the schedules in which nothing overlaps.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....base.jit import jit_inline, jit_lean
from ....base.records import Array
from ...policies.offload import begin_step, cancel_prefetch, decide_layer_step
from ...policies.state import Decision, PolicyConfig, PolicyState
from ...timeline import (
    COMPUTE,
    CPU,
    D2H,
    DISK,
    H2D,
    NUM_RATED_LANES,
    OP_DENSE,
    OP_EXPERT,
    OP_HEAD,
    OP_HOST_LAUNCH,
    OP_HOST_STEP,
    RATE_ONE,
)
from .rows import is_hopeless, kernel_work, write_host_row, write_host_rows
from .completions import complete
from ..costs import CostTables
from ..run_records import ABANDONED, NEVER, QUEUE_FULL, Run
from .starts import arbitrate
from .submissions import submit_due

if TYPE_CHECKING:
    from ...policies.steps import Steps


@jit_lean
def run_overlapped(
    config: PolicyConfig, steps: Steps, costs: CostTables, state: PolicyState, out: Decision, run: Run
) -> None:
    """Advance `run` over `steps` when copies overlap kernels, writing each step's end; all queues end empty.

    When a queue has too little room the run stops with `clock.stuck` = QUEUE_FULL and is to be repeated with more. With
    `program.more` the run goes on in another call: this one returns when its last step's head is done and leaves lanes and queues
    as they then are. With `clock.limit` set, the run is abandoned once it cannot keep it (`rows.is_hopeless`).
    """
    clock, program, lanes = run.clock[0], run.program[0], run.lanes
    coupled = False
    for lane in range(costs.rate.shape[0]):
        for mask in range(costs.rate.shape[1]):
            coupled = coupled or costs.rate[lane, mask] != RATE_ONE
    num_steps = run.step_end.shape[0]
    program.step, program.layer, program.op, program.num_ops, program.awaited = 0, -1, 0, 0, 0
    program.submitted, program.num_submits = 0, 0
    program.core, program.num_cores, program.cores_end = 0, 0, 0
    program.end = NEVER
    now = clock.now
    if num_steps > 0:
        _begin(config, steps, costs, state, run)
    while True:
        # 1. Completions.
        finished = complete(config, steps, costs, out, run, now)
        if clock.stuck:
            return
        # 2. The program: what the compute stream's last operation lets the host do.
        if finished:
            code = run.ops[program.op - 1].code
            program.op = 0
            if code == OP_DENSE:
                program.layer += 1
                if config.cancel:
                    _cancel(config, steps, costs, state, run)
                decide_layer_step(config, steps, state, out, program.step, program.layer)
                _launch(config, costs, out, run, now)
            else:  # the head is done: the step ends after the host's share
                begin = now + costs.host_ns[0].step
                if run.rows.shape[0]:
                    write_host_row(run.rows, run.clock, OP_HOST_STEP, (clock.step, program.layer), (now, begin))
                clock.busy_host += costs.host_ns[0].step
                run.step_end[program.step] = begin
                if is_hopeless(run, program.step, program.begin, begin):
                    clock.stuck = ABANDONED
                    return
                program.begin = begin
                program.layer = -1
                program.num_ops = 0
                clock.step += 1
                if program.step + 1 < num_steps:
                    program.step += 1
                    _begin(config, steps, costs, state, run)
                elif program.more:
                    break
                else:
                    program.end = begin
        # 3. Submissions that are due.
        if program.submitted < program.num_submits and program.submit_at <= now:
            if not submit_due(config, steps, costs, out, run, now):
                clock.stuck = QUEUE_FULL
                return
        # 4. One arbitration: each idle lane takes its first request, if that may start.
        arbitrate(config, costs, out, run, now)
        # 5. Rates follow the set of busy lanes.
        if coupled:
            _slow_down(costs, lanes, now)
        # 6. The next instant at which anything can happen.
        then = _next_instant(run, now)
        if then == NEVER:
            waiting = run.demands.ends[0].head < run.demands.ends[0].tail
            waiting |= run.guesses.ends[0].head < run.guesses.ends[0].tail
            waiting |= run.backs.ends[0].head < run.backs.ends[0].tail
            clock.stuck = int(waiting or (num_steps > 0 and program.end == NEVER))
            break
        now = then
    clock.now = now
    clock.makespan = max(now, run.step_end[num_steps - 1]) if num_steps > 0 else now


@jit_inline
def _begin(config: PolicyConfig, steps: Steps, costs: CostTables, state: PolicyState, run: Run) -> None:
    """Begin the program's step: the host launches the first dense part."""
    clock, program, first = run.clock[0], run.program[0], run.ops[0]
    begin_step(config, steps, state, program.step)
    begin = program.begin
    ready = begin + costs.host_ns[0].kernel
    if run.rows.shape[0]:
        write_host_row(run.rows, run.clock, OP_HOST_LAUNCH, (clock.step, 0), (begin, ready))
    clock.busy_host += costs.host_ns[0].kernel
    first.ready = ready
    first.work = costs.dense_ns[costs.step_class[clock.step], 0]
    first.code = OP_DENSE
    first.first = 0
    first.last = 0
    program.awaited = 0
    program.num_ops = 1


@jit_inline
def _cancel(config: PolicyConfig, steps: Steps, costs: CostTables, state: PolicyState, run: Run) -> None:
    """Drop prefetches for this layer step that have not begun and turn out wrong."""
    program, queue = run.program[0], run.guesses
    here = steps.first_layer_step + program.step * config.num_layers + program.layer
    for at in range(queue.ends[0].head, queue.ends[0].tail):
        guess = queue.entries[at]
        if guess.target > here:
            break
        untouched = guess.left == costs.num_chunks[guess.format]
        # What must be read from disk first is kept: its read has been asked for.
        if (
            untouched
            and guess.read < 0
            and cancel_prefetch(config, steps, state, program.step, program.layer, guess.key, guess.id)
        ):
            guess.left = 0


@jit_inline
def _launch(config: PolicyConfig, costs: CostTables, out: Decision, run: Run, now: int) -> None:
    """Let the host submit what the layer step has decided, launch its kernels and what follows them."""
    clock, program, ops, items, size = run.clock[0], run.program[0], run.ops, out.items, out.size[0]
    host = costs.host_ns[0]
    base = program.layer * config.num_experts
    num_items, kernels, copies = size.items, size.kernels, size.moves + size.backs
    for at in range(num_items):
        if items[at].transfer >= 0 and items[at].transfer < size.first_transfer:
            if run.arrived[base + items[at].expert] < items[at].transfer:
                clock.late += 1
            else:
                clock.ready += 1
    program.submit_at = now + host.layer
    program.submitted, program.num_submits, program.move, program.back = 0, 1 + copies, 0, 0
    program.core, program.num_cores, program.cores_from, program.cores_end = 0, size.cores, program.submit_at, 0
    submits = program.submit_at + copies * host.transfer
    clock.busy_host += submits - now + (kernels + 1) * host.kernel
    if run.rows.shape[0]:
        write_host_rows(run.rows, run.clock, costs, (clock.step, program.layer), now, copies, kernels + 1)
    item = 0
    for kernel in range(kernels):
        first = item
        while item < num_items and items[item].kernel == kernel:
            item += 1
        ops[kernel].ready = submits + (kernel + 1) * host.kernel
        ops[kernel].work = kernel_work(costs, out, first, item)
        ops[kernel].first = first
        ops[kernel].last = item
        ops[kernel].code = OP_EXPERT
    after = ops[kernels]
    after.ready = submits + (kernels + 1) * host.kernel
    after.first = 0
    after.last = 0
    line = costs.step_class[clock.step]
    if program.layer + 1 < config.num_layers:
        after.code = OP_DENSE
        after.work = costs.dense_ns[line, program.layer + 1]
    else:
        after.code = OP_HEAD
        after.work = costs.head_ns[line]
    program.num_ops = kernels + 1
    program.awaited = ops[0].first


@jit_inline
def _slow_down(costs: CostTables, lanes: Array, now: int) -> None:
    """Give each busy lane the rate that it has beside the others, and its activity the end that follows."""
    mask = 0
    for at in range(NUM_RATED_LANES):
        mask |= int(lanes[at].end != NEVER) << at
    for at in range(NUM_RATED_LANES):
        lane = lanes[at]
        if lane.end != NEVER:
            lane.work -= lane.rate * (now - lane.updated)
            lane.updated = now
            lane.rate = costs.rate[at, mask]
            lane.end = now + (lane.work + lane.rate - 1) // lane.rate


@jit_inline
def _next_instant(run: Run, now: int) -> int:
    """Return when anything can happen next, NEVER when nothing will."""
    program, lanes = run.program[0], run.lanes
    then = min(lanes[COMPUTE].end, lanes[H2D].end, lanes[D2H].end, lanes[CPU].end, lanes[DISK].end)
    if program.submitted < program.num_submits:
        then = min(then, program.submit_at)
    if lanes[CPU].end == NEVER and program.core < program.num_cores and program.cores_from > now:
        then = min(then, program.cores_from)
    if lanes[COMPUTE].end == NEVER and program.op < program.num_ops and run.ops[program.op].ready > now:
        then = min(then, run.ops[program.op].ready)
    return int(then)
