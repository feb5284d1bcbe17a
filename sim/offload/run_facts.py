"""What a run's decisions say of it before it runs: they depend on no time.

Modelled: how often an expert was copied for the very layer step that uses it, how many transfers share one wait, how many launches
there are. Counted by compiled code, since a search asks it of every candidate. Ignored: what anything costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...base.jit import jit_lean
from ...base.records import Array, records, whole_numbers
from ..policies.offload import begin_step, decide_layer_step
from ..policies.policy_file import raise_fault
from ..policies.state import (
    DEMAND,
    Decision,
    PolicyConfig,
    PolicyState,
    make_decision,
)
from .run_input import RunInput
from .simulators import fresh_state

if TYPE_CHECKING:
    from ..policies.steps import Steps

FACTS = whole_numbers(
    "used", "fresh", "ahead", "fetches", "transfers", "launches", "on_cores", "cpu_tasks", "layer_steps", "decoded", "experts",
    "tokens",
)  # fmt: skip
"""Counts that the facts of a run are shares of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """Counts of a run, most of them as shares."""

    fresh_fraction: float
    """Share of the experts used whose transfer the layer step that used them asked for."""
    ahead_fraction: float
    """Share of the experts used for the first time after a guess."""
    fetches_per_transfer: float
    """Layer steps that demand at least one expert, over all transfers."""
    experts_per_layer_step: float
    """Experts that a layer step uses on the device; over decoding where there is any."""
    cpu_tasks_per_core_expert: float
    """Layer steps that send experts to the host's cores, over all experts that run there."""
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
    decision, count = make_decision(given.config), records(FACTS)
    first = 0
    for steps in workload.pieces(given.config):
        last = min(first + len(steps.step_phase), wanted)
        _count(given.config, steps, state, decision, counted[first:last], count)
        first = last
        if first == wanted:
            break
    raise_fault(given.config, state)
    found = count[0]
    return RunFacts(
        fresh_fraction=int(found.fresh) / max(1, int(found.used)),
        ahead_fraction=int(found.ahead) / max(1, int(found.used)),
        fetches_per_transfer=int(found.fetches) / max(1, int(found.transfers)),
        experts_per_layer_step=int(found.decoded) / max(1, int(found.layer_steps)),
        cpu_tasks_per_core_expert=int(found.cpu_tasks) / max(1, int(found.on_cores)),
        typical_tokens=int(found.tokens) / max(1, int(found.experts)),
        launches=int(found.launches),
    )


@jit_lean
def _count(config: PolicyConfig, steps: Steps, state: PolicyState, out: Decision, counted: Array, found: Array) -> None:
    """Add to `found` what the first `len(counted)` of these steps decide; steps that `counted` marks are those that count."""
    layers, count = config.num_layers, found[0]
    for step in range(counted.shape[0]):
        begin_step(config, steps, state, step)
        for layer in range(layers):
            decide_layer_step(config, steps, state, out, step, layer)
            items, moves, cores = out.size[0].items, out.size[0].moves, out.size[0].cores
            count.used += items
            for at in range(items):
                asked = out.items[at].transfer
                if asked >= out.size[0].first_transfer:
                    count.fresh += 1
                elif asked >= 0:
                    count.ahead += 1
            count.transfers += moves
            for at in range(moves):
                if out.moves[at].kind == DEMAND:
                    count.fetches += 1
                    break
            count.launches += out.size[0].kernels
            count.on_cores += cores
            count.cpu_tasks += cores > 0
            if counted[step]:
                layer_step = step * layers + layer
                count.layer_steps += 1
                count.decoded += items
                count.experts += steps.layer_step_start[layer_step + 1] - steps.layer_step_start[layer_step]
                for at in range(steps.layer_step_start[layer_step], steps.layer_step_start[layer_step + 1]):
                    count.tokens += steps.layer_step_tokens[at]
