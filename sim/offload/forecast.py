"""What a run is predicted to take: the one way from a schedule, a recording and a machine to cost tables and figures.

Planning, simulating, reporting and validating all call it, so that what is ranked, shown and tested is one prediction. A
measured machine's costs are those of operations inside a run like this one: how many experts are fetched, guessed or there
follows from the run's own decisions, which depend on no time. Decisions that weigh costs weigh those of a usual run, since their own
are not known before them. Sizes are those of the slots that really move.

Modelled: tables and outcome of one run, and the same run with everything as slow and as fast as its costs may be. Ignored: SimPy;
the compiled simulator is equal to it to the nanosecond.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ...calibrate.costs.cost_model import CostModel
from ...calibrate.costs.fitted.model import FittedCostModel
from ...calibrate.costs.run_kind import RunKind, usual_run
from ...specs.models import ModelSpec, WeightFormat, weight_format
from ...specs.schedules.offload import OffloadSchedule
from ..policies.state import needs_prices
from .costs import CostTables
from .metrics import Metrics, summarise
from .run_facts import RunFacts, run_facts
from .run_input import RunInput
from .simulators import Outcome, run_compiled
from .tabulate import FAST, SLOW, CostSources, tabulate, typical_tokens
from .workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A prediction with the tables it was made from."""

    tables: CostTables
    sources: CostSources
    outcome: Outcome
    metrics: Metrics


def stored_format(schedule: OffloadSchedule, model: ModelSpec) -> WeightFormat:
    """Return how a schedule stores the experts of a model."""
    return weight_format(model.native_bits if schedule.experts.bits == "native" else schedule.experts.bits)


def second_format(schedule: OffloadSchedule) -> WeightFormat | None:
    """Return the smaller format that some experts of a schedule use, None without one."""
    return None if schedule.experts.low_bits is None else weight_format(schedule.experts.low_bits)


def with_costs(given: RunInput, model: ModelSpec, costs: CostModel) -> RunInput:
    """Return `given` with the predicted costs that its decisions weigh and the formats of its experts; `given` itself without any.

    Raises MissingCalibration where the profile does not reach.
    """
    if not needs_prices(given.config) and given.schedule.experts.low_bits is None and len(costs.each_card) == 1:
        return given
    tables, _ = usual_tables(given.schedule, given.workload, model, costs)
    return dataclasses.replace(given, weighed=tables)


def usual_tables(
    schedule: OffloadSchedule, workload: Workload, model: ModelSpec, costs: CostModel
) -> tuple[CostTables, CostSources]:
    """Return the tables of a run of which no decision is known yet: what decisions that weigh costs go by."""
    fmt = stored_format(schedule, model)
    if isinstance(costs, FittedCostModel):
        tokens = typical_tokens(workload)
        together = workload.top_k * workload.num_tokens / (tokens * workload.num_steps)
        costs = costs.for_run(usual_run(fmt.name, together, tokens))
    return tabulate(costs, model, schedule, workload, fmt, second_format(schedule))


def least_tables(
    schedule: OffloadSchedule, workload: Workload, model: ModelSpec, costs: FittedCostModel
) -> tuple[CostTables, CostSources]:
    """Return tables of which no duration exceeds that of a run of `schedule`, whatever it decides.

    Experts are all fresh, all guessed or all resident, whichever is quickest; transfers share every wait, CPU tasks too; where experts
    may run on the cores, how many a layer step uses on the device is not known, and the factors are the least that were measured.
    """
    fmt, tokens = stored_format(schedule, model), typical_tokens(workload)
    counts = np.diff(workload.steps.layer_step_start)
    decode = np.repeat(workload.step_phase == 1, workload.num_layers)
    together = float(counts[decode].mean() if decode.any() else counts.mean())
    kinds = [
        RunKind(
            bits=fmt.name, cached=schedule.cache.policy != "none", overlapped=schedule.copy.overlap, fresh_fraction=fresh,
            ahead_fraction=ahead, fetches_per_transfer=0.0, cpu_tasks_per_core_expert=0.0, typical_tokens=tokens,
            experts_per_layer_step=together if schedule.kernel.miss == "fetch" else None,
        )
        for fresh, ahead in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0))
    ]  # fmt: skip
    found = [tabulate(costs.for_run(kind), model, schedule, workload, fmt, second_format(schedule)) for kind in kinds]
    least = found[0][0]
    for tables, _ in found[1:]:
        least = least._replace(
            **{name: np.minimum(getattr(least, name), getattr(tables, name)) for name in ("kernel_ns", "cpu_ns")}
        )
    return least, found[0][1]


def kind_of(given: RunInput, facts: RunFacts, model: ModelSpec) -> RunKind:
    """Return what a run is like for the costs of its operations."""
    return RunKind(
        bits=stored_format(given.schedule, model).name,
        cached=given.schedule.cache.policy != "none",
        overlapped=given.schedule.copy.overlap,
        fresh_fraction=facts.fresh_fraction,
        ahead_fraction=facts.ahead_fraction,
        cpu_tasks_per_core_expert=facts.cpu_tasks_per_core_expert,
        fetches_per_transfer=facts.fetches_per_transfer,
        experts_per_layer_step=facts.experts_per_layer_step,
        typical_tokens=facts.typical_tokens,
    )


def run_tables(
    given: RunInput, model: ModelSpec, costs: CostModel, *, facts: RunFacts | None = None, shift: int = 0
) -> tuple[CostTables, CostSources]:
    """Return the tables of a run and where they come from; raises MissingCalibration where the profile does not reach.

    given: with the costs that its decisions weigh. facts: the run's own, where they are known already. shift: FAST or SLOW for
    durations at the ends of their uncertainty.
    """
    if isinstance(costs, FittedCostModel):
        costs = costs.for_run(kind_of(given, run_facts(given) if facts is None else facts, model))
    fmt, low = stored_format(given.schedule, model), second_format(given.schedule)
    return tabulate(costs, model, given.schedule, given.workload, fmt, low, shift=shift)


def forecast(given: RunInput, model: ModelSpec, costs: CostModel, *, rows: bool = False) -> Forecast:
    """Return the prediction of a run; raises MissingCalibration where the profile does not reach."""
    given = given if given.weighed is not None else with_costs(given, model, costs)
    facts = run_facts(given)
    tables, sources = run_tables(given, model, costs, facts=facts)
    outcome = simulate(given, tables, rows=rows)
    return Forecast(
        tables=tables, sources=sources, outcome=outcome,
        metrics=figures(given, model, costs, facts, outcome, tables, sources),
    )  # fmt: skip


def figures(given: RunInput, model: ModelSpec, costs: CostModel, facts: RunFacts, outcome: Outcome, tables: CostTables,
            sources: CostSources) -> Metrics:  # fmt: skip
    """Return the figures of a run with their intervals: the same decisions, everything as slow or fast as it may be."""
    weighed = dataclasses.replace(given, weighed=tables if given.weighed is None else given.weighed)
    slow, fast = (
        simulate(weighed, run_tables(given, model, costs, facts=facts, shift=shift)[0]) for shift in (SLOW, FAST)
    )
    return summarise(outcome, given.workload, tables, sources, facts, slow=slow, fast=fast)


def simulate(given: RunInput, tables: CostTables, *, rows: bool = False) -> Outcome:
    """Return the outcome of a run under given tables."""
    serial = not given.schedule.copy.overlap
    return run_compiled(
        given.config, given.workload, tables, given.capacities, serial=serial, rows=rows, weighed=given.weighed
    )
