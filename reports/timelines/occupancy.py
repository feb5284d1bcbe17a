"""How many experts the device holds after every decision, by taking the decisions again.

Modelled: rows of a timeline say what arrived, not what left, so occupancy cannot be read off them; but decisions run on a
logical clock and are functions of the recording and the schedule alone, so they can be replayed without any time. Counted:
experts in the cache, in staging buffers and in transient memory, from the decision that admits them. Ignored: the two
buffers that a static cache's misses pass through; bytes still on their way (an expert counts as held once admitted).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...sim.offload.simulate import Simulation
from ...sim.offload.simulators import decided_layer_steps, fresh_state
from ...sim.policies.state import Array
from ...specs.schedules.offload import OffloadSchedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """Experts held on the device, over all layers."""

    experts: Array
    """int64 [num_steps, num_layers]: held when that layer step's decision has been made."""
    expert_bytes: int


def cache_occupancy(simulation: Simulation, schedule: OffloadSchedule, *, num_steps: int | None = None) -> Occupancy:
    """Return what a resolved schedule holds after each decision of the first `num_steps` steps (all when None)."""
    given = simulation.given(schedule)
    config, workload = given.config, given.workload
    state = fresh_state(config, workload, given.capacities, given.weighed)
    count = workload.num_steps if num_steps is None else min(num_steps, workload.num_steps)
    held = np.zeros((count, config.num_layers), np.int64)
    nothing_kept = schedule.cache.policy == "none"
    for step, layer, decision in decided_layer_steps(config, workload, state, num_steps=count):
        if nothing_kept:
            # What the layer step uses is let go of when the decision returns, yet is held until its kernels are done.
            used = decision.size[0].moves if config.fetch_layer else decision.size[0].items
            held[step, layer] = used + state.counts[0].transient_now
        else:
            held[step, layer] = state.pools["taken"][:-1].sum() + np.count_nonzero(state.staged["key"] >= 0)
    return Occupancy(experts=held, expert_bytes=simulation.expert_bytes(schedule))
