"""What a run's decisions say of it before it runs: they depend on no time.

Modelled: how often an expert was copied for the very visit that uses it, how many transfers share one wait, how many launches
there are. Counted by compiled code, since a search asks it of every candidate. Ignored: what anything costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...base.jit import jit_lean
from ..policies.offload import begin_step, decide_visit
from ..policies.state import (
    DEMAND,
    FIRST_TRANSFER,
    ITEM_TRANSFER,
    MOVE_CLASS,
    SIZE_CPU,
    SIZE_ITEMS,
    SIZE_KERNELS,
    SIZE_MOVES,
    Array,
    Decision,
    PolicyConfig,
    PolicyState,
    make_decision,
)
from .run_input import RunInput
from .simulators import fresh_state

if TYPE_CHECKING:
    from ..policies.steps import Steps

(USED, FRESH, AHEAD, FETCHES, TRANSFERS, LAUNCHES, ON_CORES, CPU_TASKS, VISITS, DECODED, EXPERTS, TOKENS, NUM_FACTS) = (
    range(13)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """Counts of a run, most of them as shares."""

    fresh_fraction: float
    """Share of the experts used whose transfer the visit that used them asked for."""
    ahead_fraction: float
    """Share of the experts used for the first time after a guess."""
    fetches_per_transfer: float
    """Visits that demand at least one expert, over all transfers."""
    experts_per_visit: float
    """Experts that a visit uses on the device; over decoding where there is any."""
    cpu_tasks_per_core_expert: float
    """Visits that send experts to the host's cores, over all experts that run there."""
    typical_tokens: float
    """Tokens that an expert gets when it is used; over decoding where there is any."""
    launches: int
    """Launches of experts' kernels."""


def run_facts(given: RunInput, *, num_steps: int | None = None) -> RunFacts:
    """Return the facts of a run, or of its first `num_steps` steps, from its decisions made without doing anything."""
    workload = given.workload
    wanted = workload.num_steps if num_steps is None else min(num_steps, workload.num_steps)
    counted = (workload.step_phase[:wanted] == 1).astype(np.uint8)
    if not counted.any():
        counted[:] = 1
    state = fresh_state(given.config, workload, given.capacities, given.weighed)
    decision, count = make_decision(given.config), np.zeros(NUM_FACTS, np.int64)
    first = 0
    for steps in workload.pieces():
        last = min(first + len(steps.step_phase), wanted)
        _count(given.config, steps, state, decision, counted[first:last], count)
        first = last
        if first == wanted:
            break
    found = count.tolist()
    return RunFacts(
        fresh_fraction=found[FRESH] / max(1, found[USED]),
        ahead_fraction=found[AHEAD] / max(1, found[USED]),
        fetches_per_transfer=found[FETCHES] / max(1, found[TRANSFERS]),
        experts_per_visit=found[DECODED] / max(1, found[VISITS]),
        cpu_tasks_per_core_expert=found[CPU_TASKS] / max(1, found[ON_CORES]),
        typical_tokens=found[TOKENS] / max(1, found[EXPERTS]),
        launches=found[LAUNCHES],
    )


@jit_lean
def _count(config: PolicyConfig, steps: Steps, state: PolicyState, out: Decision, counted: Array, count: Array) -> None:
    """Add to `count` what the first `len(counted)` of these steps decide; steps that `counted` marks are those that count."""
    layers = config.num_layers
    for step in range(counted.shape[0]):
        begin_step(config, steps, state, step)
        for layer in range(layers):
            decide_visit(config, steps, state, out, step, layer)
            items, moves, cores = out.size[SIZE_ITEMS], out.size[SIZE_MOVES], out.size[SIZE_CPU]
            count[USED] += items
            for at in range(items):
                asked = out.items[at, ITEM_TRANSFER]
                if asked >= out.size[FIRST_TRANSFER]:
                    count[FRESH] += 1
                elif asked >= 0:
                    count[AHEAD] += 1
            count[TRANSFERS] += moves
            for at in range(moves):
                if out.moves[at, MOVE_CLASS] == DEMAND:
                    count[FETCHES] += 1
                    break
            count[LAUNCHES] += out.size[SIZE_KERNELS]
            count[ON_CORES] += cores
            count[CPU_TASKS] += cores > 0
            if counted[step]:
                visit = step * layers + layer
                count[VISITS] += 1
                count[DECODED] += items
                count[EXPERTS] += steps.visit_start[visit + 1] - steps.visit_start[visit]
                for at in range(steps.visit_start[visit], steps.visit_start[visit + 1]):
                    count[TOKENS] += steps.visit_tokens[at]
