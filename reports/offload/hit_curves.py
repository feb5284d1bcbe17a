"""Hit rate against cache size: what a recency cache of each size would do on the plan's own window, and what the best could.

Modelled: one cache a layer, nothing fetched ahead, the plan's batching and cache scope; hits are counted by the same
decisions as in every simulation, so a schedule's hit rate can be compared with the curve. Belady's cache evicts the expert
whose next use is farthest. Ignored: time, pooled caches (shown at their mean size a layer).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...sim.offload.simulate import Simulation
from ...specs.schedules.offload import OffloadSchedule

MOST_SIZES = 33
"""Sizes at which a curve is evaluated where a layer has more experts than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HitCurve:
    """Hit rate of one cache policy at rising sizes."""

    name: str
    experts_per_layer: tuple[int, ...]
    hit_fraction: tuple[float, ...]
    bytes_per_size: int | None = None
    """Device bytes that one more expert a layer takes, over all layers."""


def hit_curves(simulation: Simulation, schedule: OffloadSchedule) -> tuple[HitCurve, HitCurve]:
    """Return the curves of LRU and of Belady's cache under the batching, bits and cache scope of `schedule`."""
    return hit_curve(simulation, schedule, "lru", "LRU"), hit_curve(
        simulation, schedule, "belady", "Belady: knows the future"
    )


def hit_curve(simulation: Simulation, schedule: OffloadSchedule, policy: str, name: str) -> HitCurve:
    """Return the curve of one cache policy, evaluated at every size or at evenly spaced ones."""
    sizes = curve_sizes(simulation.trace.num_experts)
    found = []
    for size in sizes:
        # Only what decides hits is kept: every schedule's curves then come from the same tables and the same engine.
        alone = OffloadSchedule(name=policy).with_options(
            cache__policy=policy,
            cache__experts_per_layer=size,
            cache__reset=schedule.cache.reset,
            experts__bits=schedule.experts.bits,
            workload__concurrency=schedule.workload.concurrency,
            workload__prefill_chunk_tokens=schedule.workload.prefill_chunk_tokens,
        )
        count = simulation.run(alone).counts
        found.append(float(count.hits / max(int(count.hits + count.misses), 1)))
    each = simulation.trace.num_layers * simulation.expert_bytes(schedule)
    return HitCurve(name=name, experts_per_layer=sizes, hit_fraction=tuple(found), bytes_per_size=each)


def curve_sizes(num_experts: int) -> tuple[int, ...]:
    """Return 1, 2, … num_experts, thinned to at most MOST_SIZES values that keep both ends."""
    count = min(num_experts, MOST_SIZES)
    return tuple(sorted({int(size) for size in np.linspace(1, num_experts, count).round()}))
