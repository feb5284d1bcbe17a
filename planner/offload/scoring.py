"""What a search keeps of the candidates it simulates.

Modelled: a score is a run's time and what it held; a run that beats its own bound is an error of the bound and stops
everything. Ignored: which candidates are simulated, and in what order (`search`, `least_memory`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from ...sim.offload.metrics import figures_of
from ...sim.offload.simulate import Simulation
from ...sim.offload.workload import Workload
from ...specs.schedules.offload import OffloadSchedule
from ..trials import Tally
from .bounds import Bound
from .objective import NO_LIMITS, Limits, value_of
from .space import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A candidate that was simulated."""

    candidate: Candidate
    total_ns: int
    decode_ns: int
    """Of the steps that generate tokens."""
    p99_ns: float
    transient: int
    """Most experts held at once without a cache."""
    figures: dict[str, float | None]
    """Speeds and times by name, as `sim.offload.metrics.figures_of` has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPoint:
    """The best schedule found with at most this many slots."""

    level: int
    device_bytes: int
    figures: dict[str, float | None]
    """Speeds and times by name, as `sim.offload.metrics.figures_of` has them."""
    schedule: OffloadSchedule


@dataclass(slots=True)
class SearchResult:
    """What the search over one weight format found."""

    best: Scored
    front: list[FrontPoint]
    tally: Tally = field(default_factory=Tally)
    lower_bound_ns: int = 0
    """No schedule of the space can take less for the whole window."""


def score(
    simulation: Simulation, candidate: Candidate, bound: Bound, workload: Workload, limit_ns: int = 0
) -> Scored | None:
    """Return the candidate's score, or None when its run was given up: it could not end within `limit_ns` (0: no limit).

    Scores are kept with the simulation: whatever a search wants, a run is the same. Raises Internal where the run beats what it was
    said not to be able to beat.
    """
    kept: dict[OffloadSchedule, Scored] = simulation.remembered(("scores",), dict)
    if (known := kept.get(candidate.schedule)) is not None:
        return None if limit_ns and known.total_ns > limit_ns else dataclasses.replace(known, candidate=candidate)
    outcome = simulation.run(candidate.schedule, limit_ns=limit_ns, later_ns=bound.later_ns)
    if outcome.abandoned:
        return None
    steps = np.diff(np.concatenate(([0], outcome.step_end)))
    decode_ns = int(steps[workload.step_phase == 1].sum())
    bound.check(candidate, outcome.step_end, decode_ns)
    counted = steps[workload.step_phase == workload.step_phase.max()]
    found = Scored(
        candidate=candidate, total_ns=int(outcome.step_end[-1]), decode_ns=decode_ns, p99_ns=float(np.percentile(counted, 99)),
        transient=int(outcome.counts.peak_transient), figures=figures_of(outcome.step_end, workload),
    )  # fmt: skip
    kept[candidate.schedule] = found
    return found


def is_better(one: Scored, other: Scored, objective: str, limits: Limits = NO_LIMITS) -> bool:
    """Return whether `one` is strictly better; equals keep the earlier, that is the one with less memory."""
    return merit(one, objective, limits) < merit(other, objective, limits)


def merit(one: Scored, objective: str, limits: Limits = NO_LIMITS) -> tuple[float, float, int]:
    """Return what candidates are ordered by, the least first: limits exceeded, the objective, the time of the window."""
    return limits.excess(one.figures), value_of(objective, one.figures, one.p99_ns), one.total_ns


def front_point(simulation: Simulation, level: int, best: Scored) -> FrontPoint:
    """Return what a schedule of a level needs and reaches."""
    candidate = best.candidate
    memory_breakdown = simulation.memory_breakdown(
        candidate.schedule, cached_experts=candidate.cached_slots, transient_experts=best.transient
    )
    return FrontPoint(
        level=level,
        device_bytes=memory_breakdown.device_bytes,
        figures=best.figures,
        schedule=candidate.schedule,
    )
