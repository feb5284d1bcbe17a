"""What a run's decisions say of it before it runs: they depend on no time.

Modelled: how often an expert was copied for the very visit that uses it, and how many transfers share one wait. Ignored: what
anything costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..sim.engines import fresh_state
from ..sim.policies.offload import begin_step, decide_visit
from ..sim.policies.state import DEMAND, SIZE_ITEMS, SIZE_MOVES, make_decision
from .execute import RunInput


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """Counts of a whole run, as shares."""

    fresh_fraction: float
    """Share of the experts used that wait for a transfer, of this visit or guessed before it."""
    fetches_per_transfer: float
    """Visits that demand at least one expert, over all transfers."""
    experts_per_visit: float
    """Experts that a visit uses; over decoding where there is any."""


def run_facts(given: RunInput) -> RunFacts:
    """Return the facts of a run, from its decisions made without doing anything."""
    state = fresh_state(given.config, given.workload, given.capacities, given.weighed)
    out = make_decision(given.config)
    used = fresh = fetches = transfers = decoded = visits = 0
    decode = given.workload.steps.step_phase == 1
    counted = decode if decode.any() else np.ones_like(decode)
    for step in range(given.workload.num_steps):
        begin_step(given.config, given.workload.steps, state, step)
        for layer in range(given.config.num_layers):
            decide_visit(given.config, given.workload.steps, state, out, step, layer)
            items, moves = int(out.size[SIZE_ITEMS]), int(out.size[SIZE_MOVES])
            used += items
            if counted[step]:
                decoded, visits = decoded + items, visits + 1
            fresh += int(np.count_nonzero(out.item_transfer[:items] >= 0))
            transfers += moves
            fetches += bool((out.move_class[:moves] == DEMAND).any())
    return RunFacts(
        fresh_fraction=fresh / used if used else 0.0,
        fetches_per_transfer=fetches / transfers if transfers else 0.0,
        experts_per_visit=decoded / max(1, visits),
    )
