"""From which acceptance on drafting pays: a surface over acceptance, draft length and hit rate.

Modelled: the chosen schedule with more and fewer experts on the device, without drafts and with drafts of each length at each acceptance,
simulated over the same tokens; the hit rate is that of the steps that decode, without drafts. The break-even acceptance of a length lies
between two that were simulated, on the straight line between their gains. Ignored: whether so many experts fit the device (a size that does
not is a larger one's), acceptance that falls from position to position.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...sim.offload.drafting.draft import Drafting
from ...sim.offload.metrics import figures_of
from ...sim.offload.simulate import Simulation
from ...specs.drafting import Acceptance
from ...specs.schedules.offload import OffloadSchedule
from ...specs.schedules.presets import load_preset
from ..trials import Trials

CHANCES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
DRAFT_LENGTHS = (1, 2, 3, 4, 6, 8)
SHARES = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0)
"""Of all experts, those on the device."""
MOST_STEPS = 128
"""Decode steps that are simulated for each point of the surface, without drafts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """The surface at one size of the cache."""

    cached_experts: int
    fits: bool
    """The device has room for so many."""
    hit_rate: float
    """Of decode steps without drafts."""
    tokens_per_s: float
    """Generated, without drafts."""
    gains: tuple[tuple[float, ...], ...]
    """[length][acceptance]: speed with drafts over speed without."""
    break_even: tuple[float | None, ...]
    """[length]: acceptance from which drafts of that length pay; None: at none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """When drafting pays."""

    draft: str
    lengths: tuple[int, ...]
    chances: tuple[float, ...]
    levels: tuple[Level, ...]
    """By rising hit rate."""

    def to_dict(self) -> dict[str, Any]:
        """Return the surface as plain values."""
        return dataclasses.asdict(self)


def surface(
    simulation: Simulation, schedule: OffloadSchedule, *, lengths: tuple[int, ...] = DRAFT_LENGTHS, chances: tuple[float, ...] = CHANCES,
    shares: tuple[float, ...] = SHARES,
) -> Surface | None:  # fmt: skip
    """Return when drafting pays on a machine; None where the window decodes nothing.

    simulation: with drafting, of any length and acceptance: what drafts is taken from it. schedule: resolved; its cache is sized anew.
    """
    drafting = simulation.drafting
    if drafting is None:
        return None
    cut = _cut(simulation.drafted(0), schedule)
    if cut is None:
        return None
    sized = [_sized(cut, schedule, share) for share in shares]
    sizes = list(dict.fromkeys(one for one in sized if one is not None))
    drafts = [_with(drafting, length, chance) for length in lengths for chance in chances]
    alike = {one: cut.over(cut.trace, drafting=one, likewise=()) for one in drafts}
    asked = [(simulated, size) for size in sizes for simulated in (cut, *alike.values())]
    for simulated in (cut, *alike.values()):  # tables are made once, before threads ask for them
        simulated.tables(sizes[0][0])
    with Trials() as trials:
        speeds = list(trials.each(lambda pair: _speed(pair[0], pair[1][0]), asked))
    found, each = [], 1 + len(drafts)
    for at, (size, count) in enumerate(sizes):
        plain, *drafted = speeds[at * each : (at + 1) * each]
        gains = np.array(drafted).reshape(len(lengths), len(chances)) / plain
        found.append(
            Level(
                cached_experts=count, fits=_fits(simulation, size, count), hit_rate=_hit_rate(cut, size), tokens_per_s=plain,
                gains=tuple(tuple(float(gain) for gain in row) for row in gains),
                break_even=tuple(_crossing(chances, row) for row in gains),
            )
        )  # fmt: skip
    found.sort(key=lambda level: (level.hit_rate, level.cached_experts))
    return Surface(draft=drafting.kind, lengths=lengths, chances=chances, levels=tuple(found))


def _with(drafting: Drafting, length: int, chance: float) -> Drafting:
    return dataclasses.replace(drafting, length=length, acceptance=Acceptance(chance=chance))


def _cut(simulation: Simulation, schedule: OffloadSchedule) -> Simulation | None:
    """Return the simulation over the window's beginning, up to `MOST_STEPS` passes that decode; None where none does."""
    decode = np.flatnonzero(simulation.workload(schedule).step_phase == 1)
    if not len(decode):
        return None
    last = int(decode[min(len(decode), MOST_STEPS) - 1]) + 1
    return simulation.over(simulation.trace, window_steps=last, likewise=())


def _sized(simulation: Simulation, schedule: OffloadSchedule, share: float) -> tuple[OffloadSchedule, int] | None:
    """Return the schedule with so large a share of all experts on the device, and their number; None where that is none."""
    layers, experts, total = simulation.trace.num_layers, simulation.trace.num_experts, simulation.num_experts
    cache = schedule.cache
    if (
        cache.policy == "none" or cached_of(simulation, schedule) >= total
    ):  # a schedule that a smaller or larger cache can follow
        engine, cores = simulation.profile.engine, simulation.profile.host.cpu is not None
        name = (
            "n-cpu-moe"
            if (engine is not None or schedule.kernel.miss == "cpu") and cores
            else "mixtral-offloading-code"
        )
        upload = (
            schedule.kernel.upload_tokens if schedule.kernel.upload_tokens is not None else simulation.upload_tokens
        )
        schedule = dataclasses.replace(load_preset(name), workload=schedule.workload, experts=schedule.experts)
        schedule, cache = schedule.with_upload(upload), schedule.cache
        schedule = schedule.with_options(cache__host_layers=None)
    whole = cache.placement in ("front", "back")
    if whole or cache.pooled_experts is not None:
        count = min(total, round(share * layers) * experts if whole else round(share * total))
        sizes: dict[str, int | None] = {"cache__pooled_experts": count, "cache__experts_per_layer": None}
    else:
        each = min(experts, round(share * experts))
        count, sizes = (
            each * layers,
            {"cache__experts_per_layer": each, "cache__first_layer_extra": 0, "cache__pooled_experts": None},
        )
    return (schedule.with_options(**sizes), count) if count else None


def cached_of(simulation: Simulation, schedule: OffloadSchedule) -> int:
    """Return the experts that a resolved schedule's cache holds."""
    return 0 if schedule.cache.policy == "none" else schedule.cache.slots(simulation.trace.num_layers)


def _fits(simulation: Simulation, schedule: OffloadSchedule, count: int) -> bool:
    return simulation.lacking_bytes(schedule, cached_experts=count) <= 0


def _speed(simulation: Simulation, schedule: OffloadSchedule) -> float:
    outcome = simulation.run(schedule)
    return figures_of(outcome.step_end, simulation.workload(schedule))["decode_tokens_per_s"] or 0.0


def _hit_rate(simulation: Simulation, schedule: OffloadSchedule) -> float:
    """Return the hit rate of the passes that decode: hits of all less those of the passes before the first of them.

    Prompts that come between are counted with the decoding around them.
    """
    first = int(np.flatnonzero(simulation.workload(schedule).step_phase == 1)[0])
    whole = simulation.run(schedule).counts
    before = simulation.run(schedule, max_steps=first).counts if first else None
    hits = int(whole.hits) - (int(before.hits) if before is not None else 0)
    misses = int(whole.misses) - (int(before.misses) if before is not None else 0)
    return hits / max(1, hits + misses)


def _crossing(chances: tuple[float, ...], gains: np.ndarray[Any, Any]) -> float | None:
    """Return the acceptance from which on gains exceed one; None where the last does not."""
    if gains[-1] <= 1:
        return None
    under = np.flatnonzero(gains <= 1)
    if not len(under):
        return chances[0]
    at = int(under[-1])
    share = (1 - gains[at]) / (gains[at + 1] - gains[at])
    return float(chances[at] + share * (chances[at + 1] - chances[at]))
