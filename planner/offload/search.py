"""The search: every candidate bounded, most of them simulated by the compiled simulator, the answer checked by the SimPy model.

Modelled: levels of memory are searched upwards; a candidate is pruned when its lower bound on time is no better than what
the same or less memory already reached, so pruning never loses the best. What is left races: after 60 and after 400 forward
passes, candidates that lag behind the leader by more than a margin are out. Where prompts come first and all answers after them, the
passes are counted from the end of the prompts, and what is compared is the window's time if answers go on as they began. That may
lose a schedule that starts badly and ends well, so margins are wide, the plan says how many were eliminated by racing, and
`exhaustive` runs every one of them on. Ignored: randomness; the search is the same every time.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ...base.errors import DoesNotFit, InputError
from ...sim.offload.simulate import Simulation
from ...specs.schedules.offload import OffloadSchedule
from .bounds import Bound, Bounds
from .least_memory import least_memory
from .objective import NO_LIMITS, Limits, check_objective, is_of_one_request
from .scoring import Progress, Scored, SearchResult, front_point, is_better, score
from .space import Candidate, candidates, levels

# (forward passes, how far behind the leader a candidate may lie and stay): the first sees mostly cold caches, hence its width.
RUNGS = ((60, 0.4), (400, 0.1))


def search(simulation: Simulation, base: OffloadSchedule, *, objective: str = "tokens_per_s", floor_tokens_per_s: float | None = None,
           low_bits: str | None = None, exhaustive: bool = False, limits: Limits = NO_LIMITS, progress: Progress | None = None,
           ) -> SearchResult:  # fmt: skip
    """Return the best schedule on the simulation's window that keeps the bits and batching of `base`.

    low_bits: a second weight format that experts may have. exhaustive: let no candidate be eliminated by racing.
    objective: one of `OBJECTIVES`; least_memory is the least device memory that reaches `floor_tokens_per_s`. limits: where nothing
    keeps them, the best is what comes nearest. Raises DoesNotFit when no schedule fits the budget, InputError for an unknown objective
    or a missing floor.
    """
    workload = simulation.workload(base)
    check_objective(objective, limits, workload)
    if objective == "least_memory" and floor_tokens_per_s is None:
        raise InputError("floor", None, "least memory needs a speed to reach", "give a floor in tokens per second")
    if objective == "least_memory" and floor_tokens_per_s is not None:
        return least_memory(simulation, base, floor_tokens_per_s, low_bits=low_bits, progress=progress)
    bounds = Bounds(simulation, base)
    refused: list[DoesNotFit] = []
    every = {
        level: list(candidates(simulation, base, level, low_bits, refused, exhaustive=exhaustive))
        for level in levels(simulation, base)
    }
    total = sum(len(found) for found in every.values())
    done = 0
    lowest: list[int] = []
    result: SearchResult | None = None
    incumbent: Scored | None = None
    # Runs may be given up as soon as they take too long where the time of the window is what decides.
    whole = objective in ("tokens_per_s", "requests_per_s") or (
        objective == "request_s" and is_of_one_request(workload)
    )
    workers = max(1, min(4, os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        for level, found in every.items():
            race = not exhaustive and whole and not limits
            bounded = [(candidate, bounds.of(candidate)) for candidate in found]
            lowest += [bound.whole_ns for _, bound in bounded]
            if race and incumbent is not None:
                bounded = [one for one in bounded if one[1].whole_ns < incumbent.total_ns]
            scored, pruned, abandoned = [], len(found) - len(bounded), 0
            entries = _in_order(simulation, bounded, pool, race=race)
            raced_out = len(bounded) - len(entries)
            done += len(found) - len(entries)
            for begin in range(0, len(entries), 4 * workers):
                batch = entries[begin : begin + 4 * workers]
                done += len(batch)
                # A run is given up once what it has taken and the least it must still take exceed the best so far.
                beaten = whole and incumbent is not None and not limits.excess(incumbent.figures)
                limit = incumbent.total_ns if beaten and incumbent is not None else 0
                hopeful = [one for one in batch if not limit or one[1].whole_ns < limit]
                pruned += len(batch) - len(hopeful)
                for one in pool.map(
                    lambda one, limit=limit: score(simulation, one[0], one[1], workload, limit), hopeful
                ):
                    if one is None:
                        abandoned += 1
                        continue
                    scored.append(one)
                    if one.transient > level:
                        continue  # without a cache, a step's experts must fit all the same
                    if incumbent is None or is_better(one, incumbent, objective, limits):
                        incumbent = one
                if progress is not None:
                    progress(done, total, f"{level} expert slots")
            if incumbent is None:
                continue
            if result is None:
                result = SearchResult(best=incumbent, front=[])
            result.num_evaluated += len(scored)
            result.num_pruned += pruned
            result.num_abandoned += abandoned
            result.num_raced_out += raced_out
            result.best = incumbent
            result.front.append(front_point(simulation, level, incumbent))
    if result is None and refused:
        raise min(refused, key=lambda reason: reason.missing_bytes)
    if result is None:
        raise DoesNotFit(
            "no schedule of the search space", simulation.model.expert_bytes(simulation.expert_format(base))
        )
    result.lower_bound_ns = min(lowest)
    return result


def _in_order(simulation: Simulation, bounded: list[tuple[Candidate, Bound]], pool: ThreadPoolExecutor, *,
              race: bool) -> list[tuple[Candidate, Bound]]:  # fmt: skip
    """Return those still in the race, the most promising first.

    Promise is how long the first steps take: a good candidate early makes all later ones easy to give up.
    """
    entries = list(enumerate(bounded))
    if not bounded:
        return []
    workload = simulation.workload(bounded[0][0].schedule)
    prompts = int(np.count_nonzero(workload.step_phase == 0))
    first = prompts if np.all(workload.step_phase[:prompts] == 0) and prompts < workload.num_steps else 0
    for rung, (length, margin) in enumerate(RUNGS):
        if first + length >= workload.num_steps and rung:
            break

        def time_of(entry: tuple[int, tuple[Candidate, Bound]], length: int = first + length) -> float:
            ends = simulation.run(entry[1][0].schedule, max_steps=length).step_end
            if not first or length >= workload.num_steps:
                return float(ends[-1])
            answering = float(ends[-1] - ends[first - 1]) / (len(ends) - first)
            return float(ends[first - 1]) + answering * (workload.num_steps - first)

        times = list(pool.map(time_of, entries))
        limit = min(times, default=0) * (1 + margin)
        ranked = sorted(
            ((time, *entry) for time, entry in zip(times, entries, strict=True) if time <= limit or not race),
            key=lambda one: one[:2],
        )
        entries = [(at, entry) for _, at, entry in ranked]
        if not race:
            break
    return [entry for _, entry in entries]
