"""What the host submits at an instant: the third phase of the compiled simulator.

Modelled: promotions first, and what the host's cores ask the disk for, then transfers in order, each behind the write-backs submitted
with it. Ignored: when what is submitted begins (`starts`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....base.jit import jit_inline
from ...policies.state import DEMAND, Decision, PolicyConfig
from ...timeline import H2D
from .queues import find_guess, place_behind
from ..costs import CostTables
from ..run_records import NEVER, Run

if TYPE_CHECKING:
    from ...policies.steps import Steps


@jit_inline
def submit_due(config: PolicyConfig, steps: Steps, costs: CostTables, out: Decision, run: Run, now: int) -> bool:
    """Submit all that is due; return whether there was room."""
    program, size = run.program[0], out.size[0]
    here = steps.first_layer_step + program.step * config.num_layers + program.layer
    while program.submitted < program.num_submits and program.submit_at <= now:
        if program.submitted == 0:
            there_was_room = _promote(out, run) and _read_for_cores(config, out, run, here)
        elif program.back < size.backs and (out.backs[program.back].move <= program.move or program.move == size.moves):
            there_was_room = _submit_back(out, run, here)
        else:
            there_was_room = _submit_move(costs, out, run)
        if not there_was_room:
            return False
        program.submitted += 1
        if program.submitted < program.num_submits:
            program.submit_at += costs.host_ns[0].transfer
    return True


@jit_inline
def _promote(out: Decision, run: Run) -> bool:
    """Make demands of the earlier guesses that the layer step demands."""
    for index in range(out.size[0].promoted):
        wanted = out.promotions[index].transfer
        if run.lanes[H2D].end != NEVER and run.moving[0].id == wanted:
            run.moving[0].kind = DEMAND  # its current chunk is already running; the rest is demanded
            continue
        at = find_guess(run.guesses, out.promotions[index].target, wanted)
        if at >= 0:
            to = place_behind(run.demands)
            if to < 0:
                return False
            run.demands.entries[to] = run.guesses.entries[at]
            run.guesses.entries[at].left = 0  # nothing is left to move: passed over when its turn comes
    return True


@jit_inline
def _read_for_cores(config: PolicyConfig, out: Decision, run: Run, here: int) -> bool:
    """Ask the disk for the experts that the host's cores are to compute and its memory lacks."""
    for index in range(out.size[0].cores):
        item = out.cores[index]
        if item.read >= 0:
            to = place_behind(run.reads)
            if to < 0:
                return False
            entry = run.reads.entries[to]
            entry.key = run.program[0].layer * config.num_experts + item.expert
            entry.target = here
            entry.format = item.format
            entry.read = item.read
    return True


@jit_inline
def _submit_back(out: Decision, run: Run, here: int) -> bool:
    program = run.program[0]
    at = place_behind(run.backs)
    if at < 0:
        return False
    back, entry = out.backs[program.back], run.backs.entries[at]
    entry.id = out.size[0].first_back + program.back
    entry.key = back.key
    entry.format = back.format
    entry.wait_kernel = back.wait_kernel
    entry.target = here
    program.back += 1
    return True


@jit_inline
def _submit_move(costs: CostTables, out: Decision, run: Run) -> bool:
    program = run.program[0]
    move = out.moves[program.move]
    if move.kind == DEMAND:
        at = place_behind(run.demands)
        if at < 0:
            return False
        entry = run.demands.entries[at]
    else:
        at = place_behind(run.guesses)
        if at < 0:
            return False
        entries, head = run.guesses.entries, run.guesses.ends[0].head
        while at > head and entries[at - 1].target > move.target:
            entries[at] = entries[at - 1]
            at -= 1
        entry = entries[at]
    entry.id = out.size[0].first_transfer + program.move
    entry.key = move.key
    entry.target = move.target
    entry.wait_kernel = move.wait_kernel
    entry.wait_back = move.wait_back
    entry.format = move.format
    entry.left = costs.num_chunks[move.format]
    entry.read = move.read
    program.move += 1
    if move.read >= 0:
        to = place_behind(run.reads)
        if to < 0:
            return False
        run.reads.entries[to] = entry
    return True
