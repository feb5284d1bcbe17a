"""The schedules beside their predictions, and what each ingredient gains.

Modelled: all schedules run in turns in one start of the ranks; a step's time is the median over runs, from when the last rank began it;
a gain is the ratio of two schedules' means over the same steps, with what two halves of the runs make of it. Ignored: why a prediction
is off (`validate` has the error budget).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moeplan.base.units import MS_PER_S, NS_PER_S
from moeplan.executor.parallel.launch import RankRun, run_jobs
from moeplan.executor.parallel.network import Nodes
from moeplan.executor.parallel.prepare import Prepared, prepare_job, recorded_steps
from moeplan.executor.parallel.reference import reference_states
from moeplan.executor.running.execute import Progress, silent
from moeplan.executor.validation.rank_results import Contender, RanksValidated, step_times
from moeplan.executor.validation.ranks import compare_runs
from moeplan.planner.parallel.search import EpSearch
from moeplan.sim.parallel.program import INTER
from moeplan.sim.parallel.simulate import ParallelSimulation

from .schedules import CHOSEN, GAINS, contenders

_HALF = 0.5


def run(
    search: EpSearch,
    simulation: ParallelSimulation,
    nodes: Nodes | None,
    limit: float,
    copies: int,
    steps: int,
    repeats: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Return every schedule with its prediction and measurements, and the gains."""
    asked = contenders(search, simulation.model, copies)
    made = [
        prepare_job(simulation, one.schedule, one.candidate, recorded_steps(search, one.candidate, steps), repeats=repeats,
                    inter_bytes_per_s=limit)
        for one in asked
    ]  # fmt: skip
    found = run_jobs([one.job for one in made], nodes, progress=progress)
    return compared(asked, made, found, simulation)


def compared(
    asked: Sequence[Contender],
    made: Sequence[Prepared],
    found: Sequence[Sequence[RankRun]],
    simulation: ParallelSimulation,
) -> dict[str, Any]:
    """Return runs beside their predictions, as plain values."""
    references: dict[tuple[object, ...], Any] = {}
    rows = []
    for one, prepared, runs in zip(asked, made, found, strict=True):
        pipeline = prepared.job.schedule.pipeline
        key = (pipeline.shortcut, pipeline.micro_batches)
        if key not in references:
            references[key] = reference_states(prepared.job)
        rows.append(_row(compare_runs(one, prepared, runs, references[key], simulation)))
    by_name = {row["name"]: row for row in rows}
    exact = [row for row in rows if row["name"] != "shortcut"]  # a model of its own: no rival of the others
    chosen, best = min(exact, key=lambda row: row["predicted_s"]), min(exact, key=lambda row: row["measured_s"])
    gains = {
        what: _gain(by_name[with_it], by_name[without])
        for what, (with_it, without) in GAINS.items()
        if with_it in by_name and without in by_name
    }
    errors = {bound: [abs(row["error"]) for row in rows if row["bound_by_link"] is bound] for bound in (True, False)}
    return {
        "rows": rows,
        "median_error": {
            "link at least half": _median(errors[True]), "link less": _median(errors[False]), "all": _median(errors[True] + errors[False]),
        },
        "noise": _median([row["noise"] for row in rows]),
        CHOSEN: chosen["name"],
        "fastest": best["name"],
        "regret": chosen["measured_s"] / best["measured_s"] - 1,
        "bytes_equal": all(row["bytes_equal"] for row in rows),
        "states_equal": all(row["states_equal"] for row in rows),
        "gains": gains,
    }  # fmt: skip


def _row(one: RanksValidated) -> dict[str, Any]:
    compared, prepared = one.compared, one.prepared
    link = np.mean([_link_ns(tables.ex_ns) for tables in prepared.tables]) / NS_PER_S
    return {
        "name": one.contender.name,
        "predicted_s": compared.predicted_s,
        "measured_s": compared.measured_s,
        "error": compared.relative_error,
        "noise": compared.noise,
        "halves_s": [compared.measured_half_s, compared.measured_again_s],
        "covered": compared.covered,
        "bytes_equal": one.byte_difference is None,
        "states_equal": one.error <= one.bound,
        "link_share": link / compared.measured_s,
        "bound_by_link": bool(link >= _HALF * compared.measured_s),
        "budget": dict(one.budget),
        "step_s": (step_times(one.runs)[1:] / NS_PER_S).tolist(),
    }


def _link_ns(ex_ns: Any) -> float:
    """Return how long exchanges that use the limited link last, by their prediction."""
    return float(ex_ns[:, INTER].max(axis=1).sum())


def _gain(with_it: Mapping[str, Any], without: Mapping[str, Any]) -> dict[str, Any]:
    halves = [mine / theirs for theirs, mine in zip(with_it["halves_s"], without["halves_s"], strict=True)]
    measured, predicted = without["measured_s"] / with_it["measured_s"], without["predicted_s"] / with_it["predicted_s"]
    noise = max(with_it["noise"] or 0.0, without["noise"] or 0.0)
    return {
        "measured": measured,
        "predicted": predicted,
        "halves": halves,
        "measurable": min(halves) > 1 and measured - 1 > noise,
    }


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def print_schedules(found: Mapping[str, Any]) -> None:
    """Print the table of schedules and the gains."""
    print(f"{'schedule':36} predicted  measured    error   noise  link  bytes")
    for row in found["rows"]:
        print(f"{row['name']:36} {row['predicted_s'] * MS_PER_S:9.2f} {row['measured_s'] * MS_PER_S:9.2f} {row['error']:+8.1%} "
              f"{row['noise']:7.1%} {row['link_share']:5.0%}  {'equal' if row['bytes_equal'] else 'DIFFER'}")  # fmt: skip
    said = {name: "-" if value is None else f"{value:.1%}" for name, value in found["median_error"].items()}
    print(f"error, median: {said['link at least half']} where the link is at least half of a step, {said['link less']} elsewhere; "
          f"noise {found['noise']:.1%}")  # fmt: skip
    print(f"chosen: {found[CHOSEN]}; fastest: {found['fastest']}; lost by the choice: {found['regret']:.1%}")
    for what, gain in found["gains"].items():
        print(f"  {what:28} {gain['measured']:.3f}x measured ({min(gain['halves']):.3f} to {max(gain['halves']):.3f}), "
              f"{gain['predicted']:.3f}x predicted{'' if gain['measurable'] else ', not beyond noise'}")  # fmt: skip
