"""The compiled simulator of layers over cards where a prompt's passes follow each other: several are under way at once.

Modelled: everything lies on the cards, so that nothing is copied. A card does one pass at a time, in order, with a host program of its
own. A pass begins on the first card when the one before has left it, and goes on with a card's layers when both the pass and the card are
free. A card is left when its last kernel has ended and what follows it is launched; the last one after the host's share of the pass. At
most `stages[-1]` passes are under way. Passes that decode, and a prompt's first, begin when the pass before has ended. Ignored: passes of
several requests at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....base.jit import jit_inline, jit_lean
from ...policies.offload import begin_step, decide_layer_step
from ...policies.state import Decision, PolicyConfig, PolicyState
from ...timeline import COMPUTE, OP_DENSE, OP_HEAD, OP_HOST_LAUNCH, OP_HOST_STEP
from ..costs import CostTables
from ..run_records import ABANDONED, DEADLOCK, Run
from .rows import is_hopeless, kernel_work, write_host_row, write_host_rows, write_kernel_row, write_row

if TYPE_CHECKING:
    from ...policies.steps import Steps


@jit_lean
def run_over_cards(
    config: PolicyConfig, steps: Steps, costs: CostTables, state: PolicyState, out: Decision, run: Run
) -> None:
    """Advance `run` over `steps`, writing each step's end; a decision that moves anything stops it with `clock.stuck`."""
    clock, host, layers, flight = run.clock[0], costs.host_ns[0], config.num_layers, run.flight[0]
    rowing = run.rows.shape[0] > 0
    for step in range(run.step_end.shape[0]):
        begin_step(config, steps, state, step)
        line = costs.step_class[clock.step]
        tokens = steps.step_start[step + 1] - steps.step_start[step]
        last_end = clock.now
        now, before = _begins(steps, costs, run, step)
        ready = now + host.kernel
        clock.busy_host += host.kernel
        if rowing:
            write_host_row(run.rows, run.clock, OP_HOST_LAUNCH, (clock.step, 0), (now, ready))
        for layer in range(layers):
            card = costs.stages[layer]
            if layer > 0 and card != costs.stages[layer - 1]:
                _leave(costs, run, costs.stages[layer - 1], before, max(before, ready))
            begin = max(before, ready, run.card_free[card])
            clock.stall_host += begin - max(before, min(begin, run.card_idle[card]))
            end = begin + costs.dense_ns[line, layer]
            clock.busy_dense += end - begin
            if rowing:
                write_row(run.rows, run.clock, (COMPUTE, OP_DENSE), (clock.step, layer, -1), (begin, end), 0, tokens)
            decide_layer_step(config, steps, state, out, step, layer)
            if out.size[0].moves + out.size[0].backs + out.size[0].cores > 0:
                clock.stuck = DEADLOCK
                return
            before, ready = _experts(costs, out, run, layer, end)
        card = costs.stages[layers]
        if card != costs.stages[layers - 1]:
            _leave(costs, run, costs.stages[layers - 1], before, max(before, ready))
        begin = max(before, ready, run.card_free[card])
        clock.stall_host += begin - max(before, min(begin, run.card_idle[card]))
        end = begin + costs.head_ns[line]
        clock.busy_head += end - begin
        clock.compute_end = end
        clock.now = end + host.step
        clock.busy_host += host.step
        if rowing:
            write_row(run.rows, run.clock, (COMPUTE, OP_HEAD), (clock.step, layers - 1, -1), (begin, end), 0, tokens)
            write_host_row(run.rows, run.clock, OP_HOST_STEP, (clock.step, layers - 1), (end, clock.now))
        _leave(costs, run, card, end, clock.now)
        run.step_end[step] = clock.now
        run.pass_end[(flight.passes - 1) % run.pass_end.shape[0]] = clock.now
        if is_hopeless(run, step, last_end, clock.now):
            clock.stuck = ABANDONED
            return
        clock.step += 1
    clock.makespan = clock.now


@jit_inline
def _begins(steps: Steps, costs: CostTables, run: Run, step: int) -> tuple[int, int]:
    """Return when a pass begins and since when nothing but the host kept it; count it among those of its prompt."""
    clock, flight, most = run.clock[0], run.flight[0], run.pass_end.shape[0]
    prompt = steps.step_phase[step] == 0
    if not prompt or steps.step_first[step] == 1 or flight.prompt == 0:
        flight.passes = 1
        flight.prompt = int(prompt)
        return int(clock.now), int(clock.compute_end)
    begin, idle = flight.left_first, run.card_idle[costs.stages[0]]
    if flight.passes >= most:
        ended = run.pass_end[flight.passes % most]
        begin, idle = max(begin, ended), max(idle, ended - costs.host_ns[0].step)
    flight.passes += 1
    return int(begin), int(idle)


@jit_inline
def _leave(costs: CostTables, run: Run, card: int, idle: int, now: int) -> None:
    """Set a card free that a pass has done with; idle: when its last kernel ended."""
    run.card_idle[card] = idle
    run.card_free[card] = now
    if card == costs.stages[0]:  # cards hold layers that follow each other
        run.flight[0].left_first = now


@jit_inline
def _experts(costs: CostTables, out: Decision, run: Run, layer: int, now: int) -> tuple[int, int]:
    """Run a layer step's kernels from the end of its dense part; return when they end and when what follows is launched."""
    clock, host, size, items = run.clock[0], costs.host_ns[0], out.size[0], out.items
    kernels, submits = size.kernels, now + host.layer
    if run.rows.shape[0]:
        write_host_rows(run.rows, run.clock, costs, (clock.step, layer), now, 0, kernels + 1)
    clock.busy_host += host.layer + (kernels + 1) * host.kernel
    stream, item = now, 0
    for kernel in range(kernels):
        first = item
        while item < size.items and items[item].kernel == kernel:
            item += 1
        begin = max(stream, submits + (kernel + 1) * host.kernel)
        clock.stall_host += begin - stream
        stream = begin + kernel_work(costs, out, first, item)
        clock.busy_expert += stream - begin
        clock.kernels_done += 1
        if run.rows.shape[0]:
            write_kernel_row(run.rows, run.clock, out, (clock.step, layer), first, item, (begin, stream))
    return stream, submits + (kernels + 1) * host.kernel
