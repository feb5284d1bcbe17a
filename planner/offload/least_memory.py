"""The least device memory with which some schedule reaches a speed.

Modelled: numbers of expert slots are tried upwards in steps, from one slot to all experts, and the first step that reaches the
speed is divided into smaller steps until one slot is left of it. A candidate is dropped as soon as its bound, or its run, is too
slow, so a level that falls short costs little. The answer does not depend on what memory there is: that only decides whether it
fits, so a larger budget cannot give a larger answer, and the bytes that a smaller one lacks are exactly those to the answer.
Ignored: a number of slots between two steps that reaches the speed where the next step does not (more memory is hardly ever
slower).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ...base.errors import DoesNotFit
from ...base.units import NS_PER_S, format_bytes
from ...sim.offload.metrics import counted_tokens
from ...sim.offload.simulate import Simulation
from ...specs.schedules.offload import OffloadSchedule
from ..trials import Progress, Trials, deadline
from .bounds import Bounds
from .scoring import Scored, SearchResult, front_point, score
from .space import candidates

# A step is divided into so many smaller ones.
_STEPS = 12


def least_memory(simulation: Simulation, base: OffloadSchedule, floor_tokens_per_s: float, *, low_bits: str | None = None,
                 seconds: float | None = None, progress: Progress | None = None) -> SearchResult:  # fmt: skip
    """Return the schedule that reaches `floor_tokens_per_s` with the least device memory.

    seconds: after so long the least found so far is the answer; how many amounts of memory below it were not tried is then counted.
    Raises DoesNotFit where that is more than the simulation's budget, or where no memory is enough.
    """
    workload = simulation.workload(base)
    # A run that takes longer than this is too slow.
    limit_ns = int(counted_tokens(workload) * NS_PER_S / floor_tokens_per_s)
    low, top, found = 0, simulation.num_experts, None
    trials = Trials(total=top, until=deadline(seconds), progress=progress)
    levels = _Levels(simulation=simulation, base=base, bounds=Bounds(simulation, base), low_bits=low_bits, limit_ns=limit_ns,
                     trials=trials)  # fmt: skip
    while found is None or (top - low > 1 and not trials.is_time_up()):
        step = -(-(top - low) // _STEPS)
        for level in (*range(low + step, top, step), *([top] if found is None else [])):
            reached = levels.fewest_bytes(level)
            if reached is not None:
                top, found = level, reached
                break
            low = level
        if found is None and top not in levels.lowest:
            raise min(levels.refused, key=lambda reason: reason.missing_bytes)
        if found is None:
            most = counted_tokens(workload) * NS_PER_S / levels.lowest[top]
            raise DoesNotFit(
                f"no amount of device memory reaches {floor_tokens_per_s:g} tokens/s: no schedule can exceed {most:.4g}, and the "
                "fastest does not reach it", 0,
            )  # fmt: skip
    point = front_point(simulation, top, found)
    if point.device_bytes > simulation.budget_bytes:
        needed, have = format_bytes(point.device_bytes), format_bytes(simulation.budget_bytes)
        what = f"{floor_tokens_per_s:g} tokens/s need {needed} of device memory, of {have}"
        raise DoesNotFit(what, point.device_bytes - simulation.budget_bytes)
    trials.tally.num_skipped += top - low - 1
    return SearchResult(best=found, front=[point], tally=trials.tally, lower_bound_ns=levels.lowest[top])


@dataclass(slots=True)
class _Levels:
    """Levels of memory as they are tried."""

    simulation: Simulation
    base: OffloadSchedule
    bounds: Bounds
    low_bits: str | None
    limit_ns: int
    trials: Trials
    lowest: dict[int, int] = field(default_factory=dict)
    """By level that has schedules, a time that none of them can go below."""
    refused: list[DoesNotFit] = field(default_factory=list)
    """Why the host cannot hold what other schedules must keep there."""

    def fewest_bytes(self, level: int) -> Scored | None:
        """Return the schedule of `level` slots that is fast enough with the fewest bytes, then the fastest; None without any."""
        every = candidates(self.simulation, self.base, level, self.low_bits, self.refused)
        bounded = [(one, self.bounds.of(one)) for one in every]
        if bounded:
            self.lowest[level] = min(bound.whole_ns for _, bound in bounded)
        hopeful = [one for one in bounded if one[1].whole_ns <= self.limit_ns]
        workload, trials = self.simulation.workload(self.base), self.trials
        with trials:
            scored = list(
                trials.each(lambda one: score(self.simulation, one[0], one[1], workload, self.limit_ns), hopeful)
            )
        reached = [one for one in scored if one is not None and one.total_ns <= self.limit_ns]
        trials.tally.num_pruned += len(bounded) - len(hopeful)
        trials.tally.num_evaluated += len(reached)
        trials.tally.num_abandoned += len(scored) - len(reached)
        trials.done = level
        trials.tell(0, f"{level} expert slots")
        # Without a cache, a step's experts must fit all the same.
        fitting = [one for one in reached if one.transient <= level]
        return min(fitting, key=lambda one: (self._bytes(one, level), one.total_ns), default=None)

    def _bytes(self, one: Scored, level: int) -> int:
        return front_point(self.simulation, level, one).device_bytes
