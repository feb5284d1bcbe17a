"""The search: every candidate bounded, most of them simulated by the twin, the answer checked by the SimPy model.

Modelled: levels of memory are searched upwards; a candidate is pruned when its lower bound on time is no better than what
the same or less memory already reached, so pruning never loses the best. What is left races: after 60 and after 400 forward
passes, candidates that lag behind the leader by more than a margin are out. That may lose a schedule that starts badly and
ends well, so margins are wide, the plan says how many were outrun, and `exhaustive` runs every one of them on. Ignored:
randomness; the search is the same every time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..errors import DoesNotFit, InputError
from ..schedule import OffloadSchedule
from ..sim.metrics import counted_tokens
from ..sim.policies.state import PEAK_TRANSIENT
from ..sim.simulate import STREAM_SLOTS, Rehearsal
from ..sim.workload import Workload
from ..units import NS_PER_S
from .bounds import Array, StreamFloor, fewest_loads, remaining_ns, stream_floor
from .space import Candidate, candidates, levels

OBJECTIVES = ("tokens_per_s", "p99_step_s", "least_memory")
# (forward passes, how far behind the leader a candidate may lie and stay): the first sees mostly cold caches, hence its width.
RUNGS = ((60, 0.4), (400, 0.1))
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A candidate that was simulated."""

    candidate: Candidate
    total_ns: int
    p99_ns: float
    transient: int
    """Most experts held at once without a cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPoint:
    """The best schedule found with at most this many slots."""

    level: int
    device_bytes: int
    tokens_per_s: float
    schedule: OffloadSchedule


@dataclass(slots=True)
class SearchResult:
    """What the search over one weight format found."""

    best: Scored
    front: list[FrontPoint]
    num_evaluated: int = 0
    """Simulated to the end of the window."""
    num_abandoned: int = 0
    """Simulated until they could no longer be the best."""
    num_outrun: int = 0
    """Too far behind after a part of the window."""
    num_pruned: int = 0
    """Never simulated: their bound was no better than the best."""
    lower_bound_ns: int = 0
    """No schedule of the space can take less for the whole window."""


class Bounds:
    """Lower bounds of candidates on one window, keeping what it has computed."""

    def __init__(self, rehearsal: Rehearsal, base: OffloadSchedule) -> None:
        self._rehearsal = rehearsal
        self._workload: Workload = rehearsal.workload(base, with_next_use=True)
        self._floors: dict[object, StreamFloor] = {}
        self._loads: dict[tuple[int, bool], Array] = {}
        steps = self._workload.steps
        self._all_loads = np.diff(steps.visit_start[:: self._workload.num_layers])

    def _fewest(self, slots: int, *, pooled: bool) -> Array:
        most = self._rehearsal.num_experts if pooled else self._rehearsal.trace.num_experts
        key = (min(slots, most), pooled)
        if key not in self._loads:
            self._loads[key] = fewest_loads(self._workload, key[0], pooled=pooled)
        return self._loads[key]

    def _floor(self, schedule: OffloadSchedule) -> StreamFloor:
        cores = schedule.kernel.miss != "fetch"
        key = (schedule.kernel.grouping, cores, schedule.experts.low_bits, schedule.copy.chunk_bytes)
        if key not in self._floors:
            tables, _ = self._rehearsal.tables(schedule)
            self._floors[key] = stream_floor(self._workload, tables, grouped=schedule.kernel.grouping == "grouped",
                                             cores=cores)  # fmt: skip
        return self._floors[key]

    def remaining_ns(self, candidate: Candidate) -> tuple[int, Array]:
        """Return (least time of the whole run, [num_steps + 1] least time from each step to the end)."""
        schedule, cache = candidate.schedule, candidate.schedule.cache
        tables, _ = self._rehearsal.tables(schedule)
        layers = self._rehearsal.trace.num_layers
        if schedule.kernel.miss != "fetch":  # what the host's cores compute need not be loaded
            loads, places = np.zeros_like(self._all_loads), 0
        elif cache.policy == "none":
            loads, places = self._all_loads, 0
        else:
            spare = schedule.predictor.staging + (STREAM_SLOTS if cache.policy == "static" else 0)
            pooled = cache.pooled_experts is not None
            slots = (cache.pooled_experts if cache.pooled_experts is not None else cache.experts_per_layer or 0) + spare
            loads, places = self._fewest(slots, pooled=pooled), slots if pooled else slots * layers
        floor, serial = self._floor(schedule), not schedule.copy.overlap
        later = remaining_ns(floor, tables, loads, serial=serial, forgiven=places)
        # A recency cache starts empty: nothing is forgiven at the start. A static one starts full.
        at_start = places if cache.policy == "static" else 0
        whole = remaining_ns(floor, tables, loads, serial=serial, forgiven=at_start)
        return int(whole[0]), later

    def space_ns(self, sample: list[Candidate], most_slots: int) -> int:
        """Return a time that no schedule with `most_slots` expert slots can go below, whatever it does.

        All slots may serve one pool; a cache may start full, so that many loads are forgiven.
        """
        loads = self._fewest(most_slots, pooled=True)
        found = []
        for candidate in sample:
            tables, _ = self._rehearsal.tables(candidate.schedule)
            found.append(
                int(remaining_ns(self._floor(candidate.schedule), tables, loads, serial=False, forgiven=most_slots)[0])
            )
        return min(found, default=0)


def search(rehearsal: Rehearsal, base: OffloadSchedule, *, objective: str = "tokens_per_s", floor_tokens_per_s: float | None = None,
           low_bits: str | None = None, exhaustive: bool = False, progress: Progress | None = None) -> SearchResult:  # fmt: skip
    """Return the best schedule on the rehearsal's window that keeps the bits and batching of `base`.

    low_bits: a second weight format that experts may have. exhaustive: let no candidate be outrun.
    objective: tokens_per_s, p99_step_s, or least_memory (the least device memory that reaches `floor_tokens_per_s`).
    Raises DoesNotFit when no schedule fits the budget, InputError for an unknown objective or a missing floor.
    """
    if objective not in OBJECTIVES:
        raise InputError("objective", objective, f"not one of {', '.join(OBJECTIVES)}", "choose one")
    if objective == "least_memory" and floor_tokens_per_s is None:
        raise InputError("floor", None, "least memory needs a speed to reach", "give a floor in tokens per second")
    bounds = Bounds(rehearsal, base)
    every = {level: list(candidates(rehearsal, base, level, low_bits)) for level in levels(rehearsal, base)}
    total = sum(len(found) for found in every.values())
    done = 0
    result: SearchResult | None = None
    incumbent: Scored | None = None
    workload = rehearsal.workload(base)
    workers = max(1, min(4, os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        for level, found in every.items():
            race = not exhaustive and objective != "p99_step_s"
            bounded, beaten = _in_order(rehearsal, bounds, found, incumbent, pool, race=race)
            scored, pruned, abandoned, outrun = [], beaten, 0, len(found) - len(bounded) - beaten
            done += len(found) - len(bounded)
            for begin in range(0, len(bounded), 4 * workers):
                batch = []
                for bound, candidate, later in bounded[begin : begin + 4 * workers]:
                    if objective != "p99_step_s" and incumbent is not None and bound >= incumbent.total_ns:
                        pruned += 1
                    else:
                        batch.append((candidate, later))
                # A run is given up once what it has taken and the least it must still take exceed the best so far.
                limit = incumbent.total_ns if incumbent is not None and objective != "p99_step_s" else 0
                for one in pool.map(lambda one, limit=limit: _score(rehearsal, one[0], one[1], workload, limit), batch):
                    if one is None:
                        abandoned += 1
                        continue
                    scored.append(one)
                    if one.transient > level:
                        continue  # without a cache, a step's experts must fit all the same
                    if incumbent is None or _better(one, incumbent, objective):
                        incumbent = one
                done += len(bounded[begin : begin + 4 * workers])
                if progress is not None:
                    progress(done, total, f"{level} expert slots")
            if incumbent is None:
                continue
            if result is None:
                result = SearchResult(best=incumbent, front=[])
            result.num_evaluated += len(scored)
            result.num_pruned += pruned
            result.num_abandoned += abandoned
            result.num_outrun += outrun
            result.best = incumbent
            result.front.append(_front_point(rehearsal, level, incumbent, workload))
            if (
                objective == "least_memory"
                and floor_tokens_per_s is not None
                and result.front[-1].tokens_per_s >= floor_tokens_per_s
            ):
                break
    if result is None:
        raise DoesNotFit("no schedule of the search space", rehearsal.model.expert_bytes(rehearsal.expert_format(base)))
    if (
        objective == "least_memory"
        and floor_tokens_per_s is not None
        and result.front[-1].tokens_per_s < floor_tokens_per_s
    ):
        raise DoesNotFit(
            f"the best schedule reaches {result.front[-1].tokens_per_s:.3f} tokens/s of the {floor_tokens_per_s:g} asked for",
            max(0, rehearsal.ledger(base, cached_experts=rehearsal.num_experts).device_bytes - rehearsal.budget_bytes),
        )
    last = max(every)
    groupings = {c.schedule.kernel.grouping: c for c in every[last]}
    result.lower_bound_ns = bounds.space_ns(list(groupings.values()), last)
    return result


def _in_order(rehearsal: Rehearsal, bounds: Bounds, found: list[Candidate], incumbent: Scored | None, pool: ThreadPoolExecutor, *,
              race: bool) -> tuple[list[tuple[int, Candidate, Array]], int]:  # fmt: skip
    """Return ((bound, candidate, bounds from each step on) of those still in the race, the most promising first; pruned ones).

    Promise is how long the first steps take: a good candidate early makes all later ones easy to give up.
    """
    entries, pruned = [], 0
    for at, candidate in enumerate(found):
        whole, later = bounds.remaining_ns(candidate)
        if race and incumbent is not None and whole >= incumbent.total_ns:
            pruned += 1
        else:
            entries.append((at, whole, later))
    steps = rehearsal.workload(found[0].schedule).num_steps if found else 0
    for rung, (length, margin) in enumerate(RUNGS):
        if length >= steps and rung:
            break

        def time_of(entry: tuple[int, int, Array], length: int = length) -> int:
            return int(rehearsal.run(found[entry[0]].schedule, max_steps=length).step_end[-1])

        times = list(pool.map(time_of, entries))
        limit = min(times, default=0) * (1 + margin)
        ranked = sorted(
            ((time, *entry) for time, entry in zip(times, entries, strict=True) if time <= limit or not race),
            key=lambda one: one[:2],
        )
        entries = [(at, whole, later) for _, at, whole, later in ranked]
        if not race:
            break
    return [(whole, found[at], later) for at, whole, later in entries], pruned


def _score(
    rehearsal: Rehearsal, candidate: Candidate, later: Array, workload: Workload, limit_ns: int
) -> Scored | None:
    """Return the candidate's score, or None when its run was given up."""
    outcome = rehearsal.run(candidate.schedule, limit_ns=limit_ns, later_ns=later)
    if outcome.abandoned:
        return None
    steps = np.diff(np.concatenate(([0], outcome.step_end)))
    counted = steps[workload.step_phase == workload.step_phase.max()]
    return Scored(candidate=candidate, total_ns=int(outcome.step_end[-1]), p99_ns=float(np.percentile(counted, 99)),
                  transient=int(outcome.counts[PEAK_TRANSIENT]))  # fmt: skip


def _better(one: Scored, other: Scored, objective: str) -> bool:
    """Return whether `one` is strictly better; equals keep the earlier, that is the one with less memory."""
    if objective == "p99_step_s":
        return (one.p99_ns, one.total_ns) < (other.p99_ns, other.total_ns)
    return one.total_ns < other.total_ns


def _front_point(rehearsal: Rehearsal, level: int, best: Scored, workload: Workload) -> FrontPoint:
    candidate = best.candidate
    ledger = rehearsal.ledger(
        candidate.schedule, cached_experts=candidate.cached_slots, transient_experts=best.transient
    )
    return FrontPoint(
        level=level,
        device_bytes=ledger.device_bytes,
        tokens_per_s=counted_tokens(workload) * NS_PER_S / best.total_ns,
        schedule=candidate.schedule,
    )
