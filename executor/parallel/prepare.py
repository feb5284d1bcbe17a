"""A schedule on recorded steps made into a job for ranks, with the loads and the outcomes that are predicted for just these steps.

Modelled: where a recording is too short, each of its tokens stands for several; here so many really run, and what is predicted is
counted anew for them, so that the two are of the same tokens. Ignored: running.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...base.errors import InputError
from ...planner.parallel.evidence import REPORT, TokenEvidence, topology_of
from ...planner.parallel.search import EpSearch
from ...planner.placement.comparison import Candidate
from ...sim.parallel.program import Program
from ...sim.parallel.runnable import check_runnable
from ...sim.parallel.simulate import ParallelSimulation
from ...sim.parallel.simulators import EpOutcome
from ...sim.parallel.tables import EpTables
from ...sim.parallel.traffic import StepLoad, count_step
from ...specs.schedules.parallel import ExpertParallelSchedule
from .job import Job, Step, exchange_order


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A job and what is predicted for it, step by step."""

    job: Job
    program: Program
    loads: Sequence[StepLoad]
    tables: Sequence[EpTables]
    outcomes: Sequence[EpOutcome]
    """With timelines."""


def recorded_steps(search: EpSearch, candidate: Candidate, num_steps: int) -> list[Step]:
    """Return the first steps of the reporting part as they run; raises InputError where only counts were recorded."""
    evidence = search.evidence
    if not isinstance(evidence, TokenEvidence):
        raise InputError("--trace", "counts", "tokens without routing cannot be sent", "give a recording of tokens")
    found = []
    routed = evidence.routed(REPORT, candidate)
    for slots, step in list(zip(routed, evidence.parts[REPORT], strict=True))[:num_steps]:
        times = evidence.weight
        found.append(Step(
            slots=np.repeat(slots, times, axis=0).astype(np.int64),
            experts=np.repeat(step.experts, times, axis=0).astype(np.int64),
            source_rank=np.repeat(step.source_rank, times).astype(np.int64),
        ))  # fmt: skip
    return found


def prepare_job(
    simulation: ParallelSimulation,
    schedule: ExpertParallelSchedule,
    candidate: Candidate,
    steps: Sequence[Step],
    *,
    repeats: int = 1,
    timeout_s: float = 60.0,
    inter_bytes_per_s: float = 0.0,
) -> Prepared:
    """Return the job of a schedule on `steps`; raises InputError for schedules and steps that are only simulated."""
    check_runnable(schedule, simulation.model)
    if simulation.prefill:
        raise InputError(
            "request.prefill",
            True,
            "prompts over several ranks are simulated but not executed",
            "plan for --phase decode",
        )
    topology = topology_of(candidate.placement)
    program = simulation.program(schedule)
    loads = [count_step(step.slots, step.source_rank, topology, schedule) for step in steps]
    tables = [simulation.tables(schedule, load) for load in loads]
    outcomes = [simulation.run(schedule, load, rows=True) for load in loads]
    job = Job(
        model=simulation.model, schedule=schedule, topology=topology,
        physical_to_logical=candidate.placement.physical_to_logical.astype(np.int64), steps=tuple(steps),
        orders=[exchange_order(schedule, program, outcome) for outcome in outcomes], context_tokens=simulation.context_tokens,
        repeats=repeats, timeout_s=timeout_s, inter_bytes_per_s=inter_bytes_per_s,
    )  # fmt: skip
    return Prepared(job=job, program=program, loads=loads, tables=tables, outcomes=outcomes)
