"""Whether rebalancing pays over a served period: every policy beside never, and one of three endings.

    pays                    from which step on, how much, between which ends
    does not pay            it costs, changes nothing, or stays within the doubt about the machine however long the period
    too short to tell       more windows would narrow what differs between them: how many tokens it would take

What a period saves grows with its length, and so does the doubt about the machine; what differs from window to window grows with the
square root of their number. A period t times as long tells once t * saved > sqrt(t^2 * machine^2 + t * windows^2), that is with
t = windows^2 / (saved^2 - machine^2).

Ignored: other policies than DeepSeek's EPLB from counts, which is what engines run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ....base.errors import InputError
from ....specs.schedules.parallel import ExpertParallelSchedule
from ..case import ParallelRequest, Recording
from ..difference import NOTHING, PAYS
from ..search import EpSearch, describe
from .moves import WAYS
from .policies import EVERY, MOST_MOVES, NEVER, ONCE, THEN, Period, Policy, PolicyResult
from .windows import counts_of, windows_of

_EQUAL = 1e-9
"""Two doubts that differ by less are the same: what is left is rounding."""
DOES_NOT, TOO_SHORT = "does not pay", "the recording is too short to tell"
WINDOW_STEPS = 1000
"""Steps of a window of counts: SGLang's `--eplb-rebalance-num-iterations` and vLLM's `window_size`, as they come."""
_USUAL_EVERY = (1000, 3000, 10_000)
"""Intervals that are tried: SGLang's, vLLM's (`step_interval`), and a longer one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked of a period."""

    recordings: tuple[Recording, ...] = ()
    """Served one after the other; the plan's own recording is what was counted before."""
    every_steps: int | None = None
    """Interval between rearrangements; None: those that engines come with are tried."""
    window_steps: int = WINDOW_STEPS
    """Steps of a window of counts."""
    way: str | None = None
    """How experts move; None: every way is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodStudy:
    """Policies over a period, and what to do."""

    results: tuple[PolicyResult, ...]
    """Never first."""
    num_steps: int
    num_tokens: int
    num_windows: int
    description: str
    """The schedule under which all of them are."""

    @property
    def best(self) -> PolicyResult:
        """The policy that takes least time, never left out."""
        return min(self.results[1:], key=lambda one: one.whole_s)

    @property
    def needed_tokens(self) -> int | None:
        """Tokens of a period that would tell; None where none would."""
        saved, doubt = self.best.saved, self.best.scatter_s
        rest = math.sqrt(max(0.0, saved.uncertainty_s**2 - doubt**2))
        if saved.saved_s <= rest * (1 + _EQUAL):
            return None
        times = doubt**2 / (saved.saved_s**2 - rest**2)
        return math.ceil(max(times, 1.0 if self.num_windows > 1 else 2.0) * self.num_tokens)

    @property
    def ending(self) -> str:
        """pays, does not pay, or too short to tell."""
        found = self.best.saved.verdict
        if found == PAYS and self.num_windows > 1:
            return PAYS
        if found != NOTHING and self.needed_tokens is not None:
            return TOO_SHORT
        return DOES_NOT

    @property
    def words(self) -> str:
        """The ending, for people."""
        best, saved = self.best, self.best.saved
        share, wide = saved.saved_s / saved.of_s, saved.uncertainty_s / saved.of_s
        gain = f"{share:+.1%} of the period's time saved ({share - wide:+.1%} to {share + wide:+.1%})"
        if self.ending == PAYS:
            since = "from the first step" if not best.pays_from_step else f"from step {best.pays_from_step:,}"
            return f"rebalancing pays {since}: {best.policy.words}: {gain}"
        if self.ending == TOO_SHORT:
            return (
                f"the recording is too short to tell: {best.policy.words}: {gain}; about {self.needed_tokens:,} tokens in "
                f"{'several' if self.num_windows > 1 else 'two or more'} windows would tell, {self.num_tokens:,} were served"
            )
        return f"rebalancing does not pay: {best.policy.words}: {gain}"

    def to_dict(self) -> dict[str, Any]:
        """Return the study as plain values."""
        return {
            "num_steps": self.num_steps, "num_tokens": self.num_tokens, "num_windows": self.num_windows, "schedule": self.description,
            "verdict": self.ending, "words": self.words, "needed_tokens": self.needed_tokens if self.ending == TOO_SHORT else None,
            "policies": [
                {
                    "policy": one.policy.kind, "words": one.policy.words, "every_steps": one.policy.every_steps or None,
                    "moves": one.policy.way or None, "whole_s": one.whole_s, "steps_s": one.steps_s, "counting_s": one.counting_s,
                    "stalled_s": one.stalled_s, "num_rearrangements": one.num_moves, "longest_pause_s": one.longest_pause_s,
                    "pays_from_step": one.pays_from_step, "max_over_mean_load": one.max_over_mean_load, "scatter_s": one.scatter_s,
                } | one.saved.to_dict()
                for one in self.results
            ],
        }  # fmt: skip


def period_study(
    search: EpSearch,
    schedule: ExpertParallelSchedule,
    recording: Recording,
    request: ParallelRequest,
    asked: Asked,
    copies: int,
) -> PeriodStudy:
    """Return the policies over a period under a schedule whose balanced placements have `copies` copies.

    recording: what was counted before the period. Raises InputError where a period is shorter than a window, of another model, or where
    the schedule places no experts.
    """
    if schedule.parallel.experts in ("tensor", "node"):
        raise InputError(
            "--period", describe(schedule), "its experts are not placed on ranks one by one", "leave it out"
        )
    simulation = search.simulation
    windows = windows_of(simulation.model, asked.recordings, request, asked.window_steps)
    period = Period(
        simulation=simulation, schedule=schedule, windows=windows, step_tokens=request.step_tokens, stored=counts_of(recording),
        num_redundant_slots=search.placements.num_slots(copies), window_steps=asked.window_steps, seed=request.seed,
        num_groups=search.placements.expert_groups() if schedule.placement.policy == "eplb-hierarchical" else 1,
        progress=lambda words: search.trials.tell(0, words),
    )  # fmt: skip
    results = period.run(_policies(asked, period.num_steps))
    return PeriodStudy(
        results=tuple(results), num_steps=period.num_steps, num_tokens=sum(window.num_tokens for window in windows),
        num_windows=len(windows), description=describe(schedule),
    )  # fmt: skip


def _policies(asked: Asked, num_steps: int) -> list[Policy]:
    """Return the policies to run: an interval that was asked for, else engines' own that fit, else halves and quarters of the period."""
    if asked.every_steps is not None:
        intervals = [asked.every_steps]
    else:
        intervals = [each for each in _USUAL_EVERY if num_steps / MOST_MOVES < each < num_steps]
        intervals = intervals or sorted({each for each in (num_steps // 4, num_steps // 2) if each > 0})
    ways = WAYS if asked.way is None else (asked.way,)
    every = [
        Policy(kind=kind, every_steps=each, way=way) for kind in (EVERY, THEN) for each in intervals for way in ways
    ]
    return [Policy(kind=NEVER), Policy(kind=ONCE), *every]
