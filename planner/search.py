"""The search: every candidate bounded, most of them simulated by the twin, the answer checked by the SimPy model.

Modelled: levels of memory are searched upwards; a candidate is pruned when its lower bound on time is no better than what
the same or less memory already reached, so pruning never loses the best. The winner and every baseline are then run by
both engines on the same window and must agree. Ignored: randomness; the search is exhaustive over `space` and the same
every time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..errors import DoesNotFit, InputError
from ..schedule import PRESETS, OffloadSchedule, load_preset
from ..sim.policies.state import PEAK_TRANSIENT
from ..sim.simulate import STREAM_SLOTS, Prediction, Rehearsal
from ..sim.workload import Workload
from ..units import NS_PER_S
from .bounds import ComputeFloor, compute_floor, fewest_loads, time_floor_ns
from .space import ASSUMED_RECALL, Candidate, candidates, levels

OBJECTIVES = ("tokens_per_s", "p99_step_s", "least_memory")
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
    num_pruned: int = 0
    lower_bound_ns: int = 0
    """No schedule of the space can take less for the whole window."""


class Bounds:
    """Lower bounds of candidates on one window, keeping what it has computed."""

    def __init__(self, rehearsal: Rehearsal, base: OffloadSchedule) -> None:
        self._rehearsal = rehearsal
        self._workload: Workload = rehearsal.workload(base, with_next_use=True)
        self._floors: dict[tuple[str, int | None], ComputeFloor] = {}
        self._loads: dict[tuple[int, bool], int] = {}

    def loads(self, slots: int, *, pooled: bool) -> int:
        """Return the fewest loads with `slots` places per layer or in one pool."""
        most = self._rehearsal.num_experts if pooled else self._rehearsal.trace.num_experts
        key = (min(slots, most), pooled)
        if key not in self._loads:
            self._loads[key] = fewest_loads(self._workload, key[0], pooled=pooled)
        return self._loads[key]

    def candidate_ns(self, candidate: Candidate) -> int:
        """Return a time no run of this candidate can go below."""
        schedule = candidate.schedule
        tables, _ = self._rehearsal.tables(schedule)
        key = (schedule.kernel.grouping, schedule.copy.chunk_bytes)
        if key not in self._floors:
            self._floors[key] = compute_floor(self._workload, tables, grouped=schedule.kernel.grouping == "grouped")
        cache = schedule.cache
        if cache.policy == "none":
            loads = self._workload.num_expert_visits
        else:
            spare = schedule.predictor.staging + (STREAM_SLOTS if cache.policy == "static" else 0)
            if cache.pooled_experts is not None:
                loads = self.loads(cache.pooled_experts + spare, pooled=True)
            else:
                loads = self.loads((cache.experts_per_layer or 0) + spare, pooled=False)
            if cache.policy == "static":  # its cache starts full, at no cost in time
                loads = max(0, loads - candidate.cached_slots)
        return time_floor_ns(self._floors[key], tables, loads, serial=not schedule.copy.overlap)

    def space_ns(self, sample: list[Candidate], most_slots: int) -> int:
        """Return a time that no schedule with `most_slots` expert slots can go below, whatever it does.

        All slots may serve one pool; a cache may start full, so that many loads are forgiven.
        """
        loads = max(0, self.loads(most_slots, pooled=True) - most_slots)
        best = None
        for candidate in sample:
            tables, _ = self._rehearsal.tables(candidate.schedule)
            floor = compute_floor(self._workload, tables, grouped=candidate.schedule.kernel.grouping == "grouped")
            bound = time_floor_ns(floor, tables, loads, serial=False)
            best = bound if best is None else min(best, bound)
        return best or 0


def search(rehearsal: Rehearsal, base: OffloadSchedule, *, objective: str = "tokens_per_s", floor_tokens_per_s: float | None = None,
           progress: Progress | None = None) -> SearchResult:  # fmt: skip
    """Return the best schedule on the rehearsal's window that keeps the bits and batching of `base`.

    objective: tokens_per_s, p99_step_s, or least_memory (the least device memory that reaches `floor_tokens_per_s`).
    Raises DoesNotFit when no schedule fits the budget, InputError for an unknown objective or a missing floor.
    """
    if objective not in OBJECTIVES:
        raise InputError("objective", objective, f"not one of {', '.join(OBJECTIVES)}", "choose one")
    if objective == "least_memory" and floor_tokens_per_s is None:
        raise InputError("floor", None, "least memory needs a speed to reach", "give a floor in tokens per second")
    bounds = Bounds(rehearsal, base)
    every = {level: list(candidates(rehearsal, base, level)) for level in levels(rehearsal, base)}
    total = sum(len(found) for found in every.values())
    done = 0
    result: SearchResult | None = None
    incumbent: Scored | None = None
    workload = rehearsal.workload(base)
    workers = max(1, min(4, os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        for level, found in every.items():
            bounded = sorted(((bounds.candidate_ns(c), at) for at, c in enumerate(found)))
            scored, pruned = [], 0
            for begin in range(0, len(bounded), 4 * workers):
                batch = []
                for bound, at in bounded[begin : begin + 4 * workers]:
                    if objective != "p99_step_s" and incumbent is not None and bound >= incumbent.total_ns:
                        pruned += 1
                    else:
                        batch.append(found[at])
                # A run is given up once it has taken longer than the best so far: it can only end later still.
                limit = incumbent.total_ns if incumbent is not None and objective != "p99_step_s" else 0
                for one in pool.map(lambda c, limit=limit: _score(rehearsal, c, workload, limit), batch):
                    if one is None:
                        pruned += 1
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
            result.best = incumbent
            result.front.append(_front_point(rehearsal, level, incumbent, workload))
            if objective == "least_memory" and floor_tokens_per_s is not None and result.front[-1].tokens_per_s >= floor_tokens_per_s:
                break
    if result is None:
        raise DoesNotFit("no schedule of the search space", rehearsal.model.expert_bytes(rehearsal.expert_format(base)))
    if objective == "least_memory" and floor_tokens_per_s is not None and result.front[-1].tokens_per_s < floor_tokens_per_s:
        raise DoesNotFit(
            f"the best schedule reaches {result.front[-1].tokens_per_s:.3f} tokens/s of the {floor_tokens_per_s:g} asked for",
            max(0, rehearsal.ledger(base, cached_experts=rehearsal.num_experts).device_bytes - rehearsal.budget_bytes),
        )
    last = max(every)
    groupings = {c.schedule.kernel.grouping: c for c in every[last]}
    result.lower_bound_ns = bounds.space_ns(list(groupings.values()), last)
    return result


def _score(rehearsal: Rehearsal, candidate: Candidate, workload: Workload, limit_ns: int) -> Scored | None:
    """Return the candidate's score, or None when its run was given up."""
    outcome = rehearsal.run(candidate.schedule, limit_ns=limit_ns)
    if outcome.abandoned:
        return None
    steps = np.diff(np.concatenate(([0], outcome.step_end)))
    counted = steps[workload.steps.step_phase == workload.steps.step_phase.max()]
    return Scored(candidate=candidate, total_ns=int(outcome.step_end[-1]), p99_ns=float(np.percentile(counted, 99)),
                  transient=int(outcome.counts[PEAK_TRANSIENT]))  # fmt: skip


def _better(one: Scored, other: Scored, objective: str) -> bool:
    """Return whether `one` is strictly better; equals keep the earlier, that is the one with less memory."""
    if objective == "p99_step_s":
        return (one.p99_ns, one.total_ns) < (other.p99_ns, other.total_ns)
    return one.total_ns < other.total_ns


def _front_point(rehearsal: Rehearsal, level: int, best: Scored, workload: Workload) -> FrontPoint:
    candidate = best.candidate
    ledger = rehearsal.ledger(candidate.schedule, cached_experts=candidate.cached_slots, transient_experts=best.transient)
    return FrontPoint(
        level=level,
        device_bytes=ledger.device_bytes,
        tokens_per_s=workload.num_tokens * NS_PER_S / best.total_ns,
        schedule=candidate.schedule,
    )


def baselines(rehearsal: Rehearsal, base: OffloadSchedule, *, engine: str = "both", progress: Progress | None = None,
              ) -> tuple[list[Prediction], dict[str, str]]:  # fmt: skip
    """Return every preset's prediction at the same memory, bits and batching, and why others could not run.

    Each preset gets its own best capacity: for recency caches more is never worse, so that is the most that fits.
    """
    found, left_out = [], {}
    for at, name in enumerate(PRESETS):
        preset = load_preset(name)
        schedule = preset.with_options(name=name, experts__bits=base.experts.bits, workload__concurrency=base.workload.concurrency,
                                       workload__prefill_chunk_tokens=base.workload.prefill_chunk_tokens)  # fmt: skip
        if schedule.predictor.kind == "next-gate" and rehearsal.trace.predicted is None:
            schedule = schedule.with_options(predictor__kind="dial", predictor__recall=ASSUMED_RECALL)
        if progress is not None:
            progress(at, len(PRESETS), f"baseline {name}")
        try:
            found.append(rehearsal.predict(schedule, engine=engine))
        except DoesNotFit as reason:
            left_out[name] = str(reason)
    return found, left_out
