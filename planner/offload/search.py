"""The search: every candidate bounded, most of them simulated by the compiled simulator, the answer checked by the SimPy model.

Modelled: levels of memory are searched upwards; a candidate is pruned when its lower bound on time is no better than what the same
or less memory already reached, so pruning never loses the best. What is left races (`race`): after 60, 400, 1,600 and 6,400 passes
that generate tokens, candidates that lag behind the leader by more than a margin are out. That may lose a schedule that starts
badly and ends well, so margins are wide, the plan says how many were eliminated by racing, and `exhaustive` runs every one of them
on. Runs are made in batches of a fixed size, each over all cores: nothing that is found depends on how many there are. Ignored:
randomness; the search is the same every time, unless it is given so many seconds and no more: each level of memory then gets its
share of what is left.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial

from ...base.errors import DoesNotFit, InputError
from ...sim.offload.simulate import Simulation
from ...sim.offload.workload import Workload
from ...specs.schedules.offload import OffloadSchedule
from ..trials import BATCH, Progress, Trials, deadline
from .bounds import Bound, Bounds
from .least_memory import least_memory
from .objective import NO_LIMITS, Limits, check_objective, decided_by_window
from .race import Entry, Favourites, leader, race
from .scoring import Scored, SearchResult, front_point, is_better, score
from .space import candidates, levels


def search(simulation: Simulation, base: OffloadSchedule, *, objective: str = "tokens_per_s", floor_tokens_per_s: float | None = None,
           low_bits: str | None = None, exhaustive: bool = False, limits: Limits = NO_LIMITS, seconds: float | None = None,
           progress: Progress | None = None, workers: int | None = None) -> SearchResult:  # fmt: skip
    """Return the best schedule on the simulation's window that keeps the bits and batching of `base`.

    low_bits: a second weight format that experts may have. exhaustive: let no candidate be eliminated by racing.
    objective: one of `OBJECTIVES`; least_memory is the least device memory that reaches `floor_tokens_per_s`. limits: where nothing
    keeps them, the best is what comes nearest. seconds: after so long no further candidates are begun, once there is an answer.
    workers: threads that simulate; None: one a core, four at most.

    Raises DoesNotFit when no schedule fits the budget, InputError for an unknown objective or a missing floor.
    """
    workload = simulation.workload(base)
    check_objective(objective, limits, workload)
    if objective == "least_memory" and floor_tokens_per_s is None:
        raise InputError("floor", None, "least memory needs a speed to reach", "give a floor in tokens per second")
    if objective == "least_memory" and floor_tokens_per_s is not None:
        return least_memory(simulation, base, floor_tokens_per_s, low_bits=low_bits, seconds=seconds, progress=progress)
    until = deadline(seconds)
    every, refused = simulation.remembered(
        ("candidates", base, low_bits, exhaustive),
        lambda: _bounded(simulation, base, low_bits, exhaustive=exhaustive),
    )
    # Runs may be given up as soon as they take too long where the time of the window is what decides.
    whole = decided_by_window(objective, workload)
    with Trials(total=sum(map(len, every.values())), workers=workers, progress=progress) as trials:
        going = _Going(
            simulation=simulation, workload=workload, objective=objective, limits=limits, trials=trials, whole=whole,
            racing=not exhaustive and not limits and (whole or objective in ("ttft_s", "decode_tokens_per_s")),
        )  # fmt: skip
        for number, (level, entries) in enumerate(every.items()):
            now = time.monotonic()
            trials.until = now + (until - now) / (len(every) - number)
            going.search_level(level, entries)
    result = going.result
    if result is None and refused:
        raise min(refused, key=lambda reason: reason.missing_bytes)
    if result is None:
        raise DoesNotFit(
            "no schedule of the search space", simulation.model.expert_bytes(simulation.expert_format(base))
        )
    result.lower_bound_ns = min(going.lowest)
    return result


def _bounded(
    simulation: Simulation, base: OffloadSchedule, low_bits: str | None, *, exhaustive: bool
) -> tuple[dict[int, list[Entry]], list[DoesNotFit]]:
    """Return each level's candidates with their bounds, and why the host cannot hold what others must keep there."""
    bounds = simulation.remembered(("bounds", base.workload, base.cache.reset), lambda: Bounds(simulation, base))
    refused: list[DoesNotFit] = []
    every = {}
    for level in levels(simulation, base):
        found = candidates(simulation, base, level, low_bits, refused, exhaustive=exhaustive)
        every[level] = [(candidate, bounds.of(candidate)) for candidate in found]
    return every, refused


@dataclass(slots=True, kw_only=True)
class _Going:
    """A search as it goes from level to level."""

    simulation: Simulation
    workload: Workload
    objective: str
    limits: Limits
    trials: Trials
    whole: bool
    """The time of the window decides."""
    racing: bool
    lowest: list[int] = field(default_factory=list)
    """What each candidate cannot take less than."""
    favourites: Favourites = field(default_factory=dict)
    best: Scored | None = None
    result: SearchResult | None = None

    def search_level(self, level: int, found: list[Entry]) -> None:
        """Look at the candidates of one amount of memory, given with their bounds."""
        self.lowest += [bound.whole_ns for _, bound in found]
        trials, words = self.trials, f"{level} expert slots"
        bounded = [one for one in found if not self.is_beaten(one[1])]
        # Bounds prune by the best so far: one good run at this amount of memory spares many others their race.
        prunes = (self.whole or self.objective == "decode_tokens_per_s") and not self.limits
        if prunes and len(bounded) > BATCH and not (self.best is not None and trials.is_time_up()):
            first = leader(
                self.simulation, self.workload, bounded, trials, objective=self.objective, favourites=self.favourites
            )
            self.see(self.scored(first, self.best_ns), level)
            bounded = [one for one in bounded if one is first or not self.is_beaten(one[1])]
        trials.tally.num_pruned += len(found) - len(bounded)
        trials.tell(len(found) - len(bounded), words)
        left = race(
            self.simulation, self.workload, bounded, trials, objective=self.objective, racing=self.racing, words=words,
            favourites=self.favourites,
        )  # fmt: skip
        for batch in trials.batches(left, lambda: self.best is not None):
            # A run is given up once what it has taken and the least it must still take exceed the best so far.
            limit = self.best_ns
            hopeful = [one for one in batch if not self.is_beaten(one[1])]
            trials.tally.num_pruned += len(batch) - len(hopeful)
            for one in trials.each(partial(self.scored, limit_ns=limit), hopeful):
                trials.tally.num_abandoned += one is None
                trials.tally.num_evaluated += one is not None
                self.see(one, level)
            trials.tell(len(batch), words)
        if self.best is None:
            return
        if self.result is None:
            self.result = SearchResult(best=self.best, front=[], tally=trials.tally)
        self.result.best = self.best
        self.result.front.append(front_point(self.simulation, level, self.best))

    @property
    def best_ns(self) -> int:
        """What a run may take at most where it is to be the best; 0 where its time alone does not decide."""
        if not self.whole or self.best is None or self.limits.excess(self.best.figures):
            return 0
        return self.best.total_ns

    def see(self, one: Scored | None, level: int) -> None:
        """Let a scored candidate be the best so far where it is; without a cache, a step's experts must fit in `level` all the same."""
        if one is not None and one.transient <= level:
            if self.best is None or is_better(one, self.best, self.objective, self.limits):
                self.best = one

    def is_beaten(self, bound: Bound) -> bool:
        """Return whether a candidate of this bound cannot be better than the best so far."""
        best = self.best
        if best is None or self.limits.excess(best.figures):
            return False
        if self.objective == "decode_tokens_per_s":  # equal speeds are settled by the time of the window
            return bound.decode_ns > best.decode_ns
        return self.whole and bound.whole_ns >= best.total_ns

    def scored(self, entry: Entry, limit_ns: int) -> Scored | None:
        """Return the score of a candidate, None where it was given up."""
        candidate, bound = entry
        return score(self.simulation, candidate, bound, self.workload, limit_ns)
