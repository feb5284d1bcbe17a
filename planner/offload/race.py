"""A race of candidates: all run a part of the window, and those far behind the leader run no further.

Modelled: parts of so many passes that generate tokens, in the shortest one with prompts cut short (`parts`). What is compared is the
time that the search wants to be least as it would be if the rest went like the part, each kind of pass by its own share, so that a part
in which prompts weigh more or less than in the whole favours nobody; the first pass, in which most caches fill, happens once. Ignored:
that caches are colder at first; hence margins, the wider the shorter the part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from ...sim.offload.simulate import Simulation
from ...sim.offload.workload import Workload
from ...sim.policies.state import Array
from ...specs.schedules.offload import OffloadSchedule
from ..trials import BATCH, Trials
from .bounds import Bound
from .parts import part_of
from .space import Candidate

RUNGS = ((60, 3, 0.4), (400, None, 0.1), (1600, None, 0.05), (6400, None, 0.03))
"""(passes that generate tokens, passes of each prompt, how far behind the leader a candidate may lie and stay)."""
_PHASES: Mapping[str, tuple[int, ...]] = {"ttft_s": (0,), "decode_tokens_per_s": (1,)}
"""Phases, 0 prompts and 1 generated tokens, whose time is all that an objective is about; of others both."""
Entry: TypeAlias = tuple[Candidate, Bound]
Favourites: TypeAlias = dict[Any, float]
"""Nanoseconds of the shortest part, by kind of schedule."""


def race(simulation: Simulation, workload: Workload, bounded: Sequence[Entry], trials: Trials, *, objective: str, racing: bool,
         words: str, favourites: Favourites) -> Sequence[Entry]:  # fmt: skip
    """Return those of `bounded` still in the race, the most promising first: a good one early makes all later ones easy to give up.

    racing: let those that lag be out; else they are only put in order. words: says in reports of progress what is at hand. favourites:
    is given what the kinds that stay after the shortest part took in it; that is the same whatever was searched before, unlike the
    order in which candidates run.
    """
    # What is left when time is up goes by promise. Who is out does not depend on the order, but with a good one early the others are
    # stopped early.
    promises: Favourites = simulation.remembered(("promises",), dict)
    waiting = _by_promise(bounded, promises)
    for rung, (passes, prompt_passes, margin) in enumerate(RUNGS):
        steps = part_of(workload, passes, prompt_passes)
        if rung and (len(steps) >= workload.num_steps or not racing or len(waiting) < 2):
            break
        part = simulation.part(steps)
        weights = part_weights(workload, steps, phases_of(objective))

        def value(asked: tuple[int, float], part: Simulation = part, weights: Array = weights) -> float:
            return part.weighed_ns(bounded[asked[0]][0].schedule, weights, asked[1])

        values: dict[int, float] = {}
        limit = math.inf
        for batch in trials.batches(waiting, partial(bool, values)):
            # Who lags behind those that have run already is stopped on the way.
            values |= dict(zip(batch, trials.each(value, [(at, limit) for at in batch]), strict=True))
            limit = min(limit, min(values[at] for at in batch) * (1 + margin)) if racing else limit
        left = [at for at in values if values[at] <= limit]
        if not rung:
            schedules = {at: bounded[at][0].schedule for at in values}
            promises |= {_kind(one): part.estimated_ns(one, weights) for one in schedules.values()}
            favourites |= {_kind(schedules[at]): values[at] for at in left}
        trials.tally.num_raced_out += len(values) - len(left)
        trials.tell(len(waiting) - len(left), words)
        waiting = sorted(left, key=lambda at: (values[at], at))
        if trials.is_time_up():
            break
    return [bounded[at] for at in waiting]


def leader(
    simulation: Simulation,
    workload: Workload,
    bounded: Sequence[Entry],
    trials: Trials,
    *,
    objective: str,
    favourites: Favourites,
) -> Entry:
    """Return the fastest over the shortest part of those that promise most: what a run to the end should begin with."""
    passes, prompt_passes, _ = RUNGS[0]
    steps = part_of(workload, passes, prompt_passes)
    part, weights = simulation.part(steps), part_weights(workload, steps, phases_of(objective))
    tried = [bounded[at] for at in _by_promise(bounded, favourites)[:BATCH]]
    values = list(trials.each(lambda one: part.weighed_ns(one[0].schedule, weights), tried))
    return tried[values.index(min(values))]


def _by_promise(bounded: Sequence[Entry], promises: Favourites) -> list[int]:
    """Return places in `bounded`: first the kinds that did well at another amount of memory, then the least bounds."""

    def promise(at: int) -> tuple[float, int, int]:
        candidate, bound = bounded[at]
        return promises.get(_kind(candidate.schedule), math.inf), bound.whole_ns, at

    return sorted(range(len(bounded)), key=promise)


def _kind(schedule: OffloadSchedule) -> Any:
    """Return what a schedule is besides the size of its cache."""
    cache = schedule.cache
    return (schedule.predictor, schedule.kernel, schedule.copy, schedule.experts, cache.policy, cache.placement,
            cache.pooled_experts is None)  # fmt: skip


def phases_of(objective: str) -> tuple[int, ...]:
    """Return the phases, 0 prompts and 1 generated tokens, whose time an objective is about."""
    return _PHASES.get(objective, (0, 1))


def part_weights(workload: Workload, steps: Array, phases: Sequence[int]) -> Array:
    """Return [steps of the part] how often each counts, so that the part stands for the whole window; 0 for other phases.

    Prompts by their tokens, since passes of a prompt differ in length; what generates by its passes.
    """
    found = np.zeros(len(steps))
    for phase in phases:
        all_of_it = workload.step_phase == phase
        amount = np.where(all_of_it, workload.step_tokens if phase == 0 else 1, 0).astype(np.float64)
        mine = all_of_it[steps]
        once = mine & (np.arange(len(steps)) == 0)
        found[once] = 1.0
        rest, whole = mine & ~once, amount.sum() - amount[steps[once]].sum()
        if rest.any():
            found[rest] = whole / amount[steps[rest]].sum()
        elif mine.any():
            found[once] = amount.sum() / amount[steps[once]].sum()
    return found
