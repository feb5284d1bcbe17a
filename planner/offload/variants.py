"""Micro-batches and types of keys and values: which of them a search is made with, and whether another is better for what it found.

Modelled: what a prompt costs hardly depends on which experts a cache holds, and what decoding costs depends on the micro-batch by memory
alone. So a few schedules of every kind, over a part of the window, choose the variant that the search is made with; the best of the search,
and all that the machine's engine can be told, are then run under every variant, as long as they may still be better. A later type of keys
and values replaces an earlier one only where it gains something. Ignored: a schedule that is nowhere near the best under the variant
that was searched and the best of all under another; `exhaustive` searches every one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ...base.errors import DoesNotFit, InputError
from ...sim.offload.memory.device import STREAM_SLOTS
from ...sim.offload.simulate import Simulation
from ...specs.schedules.offload import OffloadSchedule
from ..trials import Tally, Trials
from .bounds import Bound, Bounds
from .objective import Limits, decided_by_window
from .parts import part_of
from .race import RUNGS, part_weights, phases_of
from .scoring import Scored, front_point, merit, score
from .space import Candidate, candidates, levels

NO_GAIN = 0.002
"""A gain below this fraction is none: what people asked for first stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to cut prompts and to keep keys and values."""

    simulation: Simulation
    """With the bytes of a value."""
    kv_type: str
    ubatch: int | None
    """Prompt tokens of a pass; None: a prompt is one pass."""
    rank: int = 0
    """Place of its type of keys and values among those asked for."""

    def of(self, base: OffloadSchedule) -> OffloadSchedule:
        """Return what a search under this variant may not change."""
        return base.with_options(workload__prefill_chunk_tokens=self.ubatch)

    @property
    def words(self) -> str:
        """The variant in words."""
        cut = "whole prompts" if self.ubatch is None else f"a micro-batch of {self.ubatch} tokens"
        return f"{cut}, keys and values as {self.kv_type}"


Told: TypeAlias = Callable[[Variant, int], Sequence[tuple[OffloadSchedule, int]]]
"""What an engine can be told under a variant with so many requests at once: resolved schedules, and experts each keeps on the device."""


def _nothing(variant: Variant, concurrency: int) -> Sequence[tuple[OffloadSchedule, int]]:
    return ()


_Bounded: TypeAlias = tuple[Variant, Candidate, Bound]


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What is best."""

    objective: str
    limits: Limits
    floor_ns: int = 0
    """What a window may take where the objective is the least memory."""


@dataclass(slots=True, kw_only=True)
class Better:
    """What the machine's engine, or another variant, has beside the best of a search."""

    best: Scored
    variant: Variant
    tally: Tally = field(default_factory=Tally)
    lower_bound_ns: int = 2**62
    """No schedule that was looked at here can take less."""


@dataclass(slots=True, kw_only=True)
class Variants:
    """All variants that may be chosen: types of keys and values in the order asked for, of each the micro-batches, rising."""

    every: tuple[Variant, ...]
    told: Told = _nothing
    _bounds: dict[tuple[int, OffloadSchedule], Bounds] = field(default_factory=dict)

    def first(self, base: OffloadSchedule, objective: str) -> Variant:
        """Return the variant under which a few schedules of every kind reach the best figure; raises DoesNotFit where none has room."""
        if len(self.every) == 1:
            return self.every[0]
        reached: list[tuple[float, Variant]] = []
        refused: list[DoesNotFit] = []
        for variant in self.every:
            try:
                reached.append((min(self._probed(variant, base, objective), default=math.inf), variant))
            except DoesNotFit as reason:
                refused.append(reason)
        if not reached:
            raise min(refused, key=lambda reason: reason.missing_bytes)
        best = reached[0]
        for one in reached[1:]:
            if one[0] < best[0] * (1 - (NO_GAIN if one[1].rank > best[1].rank else 0)):
                best = one
        return best[1]

    def improved(
        self, found: Scored, variant: Variant, base: OffloadSchedule, aim: Aim, until: float = math.inf
    ) -> Better:
        """Return the best of what a search found under `variant`, of that under every other one, and of what the engine can be told.

        until: clock reading after which no further batch is begun.
        """
        trials = Trials(until=until)
        better = Better(best=found, variant=variant, tally=trials.tally)
        waiting = []
        for other in self.every:
            over = self._with_bits(other, base)
            waiting += [(other, Candidate(schedule=one, level=held, cached_slots=held)) for one, held in over]
            if other is not variant and aim.objective != "least_memory":
                waiting += [(other, one) for one in _moved(found.candidate, variant, other, base)]
        # The most promising first: a good one early makes all later ones easy to give up.
        bounded = [(other, one, self._bounds_of(other, base).of(one)) for other, one in waiting]
        bounded.sort(key=lambda each: each[2].whole_ns)
        better.lower_bound_ns = min((bound.whole_ns for _, _, bound in bounded), default=better.lower_bound_ns)
        with trials:
            for batch in trials.batches(bounded, lambda: True):
                limit = self._limit_ns(better, base, aim)
                hopeful = [each for each in batch if not limit or each[2].whole_ns < limit]
                trials.tally.num_pruned += len(batch) - len(hopeful)

                def scored(each: _Bounded, limit: int = limit) -> Scored | None:
                    simulation = each[0].simulation
                    return score(simulation, each[1], each[2], simulation.workload(each[0].of(base)), limit)

                for (other, _, _), one in zip(hopeful, trials.each(scored, hopeful), strict=True):
                    trials.tally.num_abandoned += one is None
                    trials.tally.num_evaluated += one is not None
                    if one is not None and self._beats(one, other, better, aim):
                        better.best, better.variant = one, other
        return better

    def unsearched(self, searched: Variant, base: OffloadSchedule, low_bits: str | None) -> tuple[int, int]:
        """Return how many schedules all other variants have, and the time that none of them can go below."""
        number, least = 0, 2**62
        for variant in self.every:
            if variant is searched:
                continue
            mine, bounds = variant.of(base), self._bounds_of(variant, base)
            try:
                every = levels(variant.simulation, mine)
            except DoesNotFit:
                continue
            for level in every:
                for one in candidates(variant.simulation, mine, level, low_bits, [], exhaustive=False):
                    number += 1
                    least = min(least, bounds.of(one).whole_ns)
        return number, least

    # --- parts ------------------------------------------------------------------------------------------------------------

    def _limit_ns(self, better: Better, base: OffloadSchedule, aim: Aim) -> int:
        """Return what a run may take at most where it is to be better; 0 where its time alone does not decide."""
        if aim.objective == "least_memory":
            return aim.floor_ns
        whole = decided_by_window(aim.objective, better.variant.simulation.workload(better.variant.of(base)))
        return better.best.total_ns if whole and not aim.limits.excess(better.best.figures) else 0

    def _beats(self, one: Scored, variant: Variant, better: Better, aim: Aim) -> bool:
        candidate = one.candidate
        held = {"cached_experts": candidate.cached_slots, "transient_experts": one.transient}
        if variant.simulation.lacking_bytes(candidate.schedule, **held) > 0:
            return False
        if aim.objective == "least_memory":
            mine, theirs = (
                (front_point(each.simulation, scored.candidate.level, scored).device_bytes, scored.total_ns)
                for each, scored in ((variant, one), (better.variant, better.best))
            )
            return mine < theirs and one.total_ns <= aim.floor_ns
        excess, value, total = merit(one, aim.objective, aim.limits)
        if variant.rank > better.variant.rank:
            value = value / (1 - NO_GAIN)
        return (excess, value, total) < merit(better.best, aim.objective, aim.limits)

    def _with_bits(self, variant: Variant, base: OffloadSchedule) -> list[tuple[OffloadSchedule, int]]:
        """Return what the engine can be told that stores experts as `base` does."""
        told = self.told(variant, base.workload.concurrency)
        return [(one, held) for one, held in told if one.experts.bits == base.experts.bits]

    def _bounds_of(self, variant: Variant, base: OffloadSchedule) -> Bounds:
        key = (id(variant), base)
        if key not in self._bounds:
            self._bounds[key] = Bounds(variant.simulation, variant.of(base))
        return self._bounds[key]

    def _probed(self, variant: Variant, base: OffloadSchedule, objective: str) -> Iterator[float]:
        """Yield the time of the window, estimated from a part of it, of a few schedules of every kind."""
        simulation, mine = variant.simulation, variant.of(base)
        passes, prompt_passes, _ = RUNGS[0]
        workload = simulation.workload(mine)
        steps = part_of(workload, passes, prompt_passes)
        part, weights = simulation.part(steps), part_weights(workload, steps, phases_of(objective))
        for schedule in _probes(simulation, mine):
            try:
                held = simulation.within_host(schedule, cached_experts=schedule.cache.pooled_experts or 0)
            except DoesNotFit:
                continue
            yield part.weighed_ns(held, weights)


def _probes(simulation: Simulation, base: OffloadSchedule) -> Iterator[OffloadSchedule]:
    """Yield a schedule of every kind whose memory or prompts depend on the variant, with all the slots there are."""
    most = simulation.slots_that_fit(base)
    each = simulation.trace.num_experts
    cores = simulation.profile.host.cpu is not None
    kept = most if most >= simulation.num_experts else max(1, most - STREAM_SLOTS)
    asked: list[dict[str, object]] = [
        {"cache__policy": "static", "cache__pooled_experts": kept},
        {"cache__policy": "lru", "cache__pooled_experts": most},
    ]
    if cores:
        asked += [
            {"cache__policy": "static", "cache__pooled_experts": kept, "kernel__miss": "balanced"},
            {"cache__policy": "lru", "cache__pooled_experts": most, "kernel__miss": "cheaper"},
            {"cache__policy": "none", "kernel__miss": "cpu"},
        ]
        if kept >= each:
            asked.append({
                "cache__policy": "static", "cache__pooled_experts": kept // each * each, "cache__placement": "back", "kernel__miss": "cpu",
            })  # fmt: skip
    for options in asked:
        yield base.with_options(kernel__grouping="grouped", **options).with_upload(simulation.upload_tokens)


def _moved(found: Candidate, variant: Variant, other: Variant, base: OffloadSchedule) -> Iterator[Candidate]:
    """Yield a candidate under another variant: with as many slots more or fewer as that one leaves room for."""
    layers, each = variant.simulation.trace.num_layers, variant.simulation.trace.num_experts
    try:
        room = other.simulation.slots_that_fit(other.of(base)) - variant.simulation.slots_that_fit(variant.of(base))
    except DoesNotFit:
        return
    schedule = found.schedule.with_options(workload__prefill_chunk_tokens=other.ubatch, copy__host_experts=None)
    cache = schedule.cache
    slots = min(found.cached_slots + room, other.simulation.num_experts)
    if cache.policy == "none":
        slots = 0
    elif cache.pooled_experts is not None:
        slots = slots // each * each if cache.placement in ("front", "back") else slots
        schedule = schedule.with_options(cache__pooled_experts=slots)
    else:
        each = (slots - cache.first_layer_extra) // layers
        schedule = schedule.with_options(cache__experts_per_layer=max(1, each))
        slots = schedule.cache.slots(layers) if each else 0
    if slots < 1 and cache.policy != "none":
        return
    try:
        held = other.simulation.within_host(schedule, cached_experts=slots)
    except (DoesNotFit, InputError):
        return
    yield Candidate(schedule=held, level=max(1, found.level + room), cached_slots=slots)
