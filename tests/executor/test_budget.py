"""The error budget: a run that took what was predicted shows no error in any class, one that did not shows it in the right one."""

from __future__ import annotations

import numpy as np
import pytest

from executor_stages import formats_of, preset, run_input, small_trace, tables_of
from moeplan.executor.running.decided import decided_work, launch_of_rows
from moeplan.executor.running.execution import Execution
from moeplan.executor.running.prediction import predicted_step_s
from moeplan.executor.validation.error_budget import error_budget, expected_ns, measured_tables, median_budget
from moeplan.sim.offload.costs import CostTables
from moeplan.sim.offload.forecast import simulate
from moeplan.sim.offload.run_input import RunInput
from moeplan.sim.timeline import OP_CPU, OP_DENSE, OP_EXPERT, OP_HEAD, RATE_ONE, ROW_END, ROW_OP, ROW_START

SCHEDULES = {
    "one at a time": preset("mixtral-offloading"),
    "grouped": preset("mixtral-offloading", kernel__grouping="grouped"),
    "two formats": preset("mixtral-offloading", experts__low_bits="4", experts__low_rank=1),
    "two formats, grouped": preset("edge-moe", experts__low_bits="4", kernel__grouping="grouped"),
    "two formats, some on the cores": preset("hybrimoe", experts__low_bits="4", experts__low_rank=1),
    "on one stream": preset("mixtral-offloading-code"),
}


def steady(given: RunInput) -> CostTables:
    """Return made-up costs, other ones in each format, of lanes that do not slow each other down."""
    sizes = (1000,) if given.schedule.experts.low_bits is None else (1000, 300)
    tables = tables_of(given, *sizes)
    kernels, cores = tables.kernel_ns.copy(), tables.cpu_ns.copy()
    kernels[1:] *= 3  # formats whose costs differ a lot, so that mistaking one for the other shows
    cores[1:] *= 2
    return tables._replace(rate=np.full_like(tables.rate, RATE_ONE), kernel_ns=kernels, cpu_ns=cores)


def run_of(given: RunInput, tables: CostTables) -> Execution:
    """Return a run that took exactly what `tables` say."""
    outcome = simulate(given, tables, rows=True)
    assert outcome.timeline is not None
    empty = np.zeros((0, 0), np.int64)
    return Execution(
        counts=outcome.counts, timeline=outcome.timeline, step_ns=outcome.step_end, part_ns=empty, disturbed=empty.astype(bool),
        makespan_ns=outcome.makespan_ns, ready_hits=0, late_hits=0, slot_bytes=1000, outputs=(), notes=(),
    )  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_as_predicted_has_no_error_in_any_class(name: str) -> None:
    given = run_input(SCHEDULES[name], small_trace())
    tables = steady(given)
    measured_s = predicted_step_s(simulate(given, tables), given.workload)
    measured = measured_tables(given, tables, [run_of(given, tables)])
    for field in ("dense_ns", "head_ns", "kernel_ns", "grouped_ns"):
        assert np.array_equal(measured["compute"][field], getattr(tables, field)), field
    assert np.array_equal(measured["cores"]["cpu_ns"], tables.cpu_ns)
    budget = error_budget(given, tables, [run_of(given, tables)], measured_s)
    assert budget["none"] == budget["compute"] == budget["cores"] == 0.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_kernels_that_took_longer_are_found_in_their_class(name: str) -> None:
    given = run_input(SCHEDULES[name], small_trace())
    tables = steady(given)
    slow = {field: 4 * getattr(tables, field) for field in ("dense_ns", "head_ns", "kernel_ns", "grouped_ns")}
    truth = tables._replace(**slow)
    measured_s = predicted_step_s(simulate(given, truth), given.workload)
    budget = error_budget(given, tables, [run_of(given, truth)], measured_s)
    assert budget["none"] < -0.1
    assert budget["compute"] == pytest.approx(0.0, abs=1e-3)
    assert budget["cores"] == pytest.approx(budget["none"])


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_row_takes_what_was_expected_of_it(name: str) -> None:
    given = run_input(SCHEDULES[name], small_trace())
    tables, work = steady(given), decided_work(given)
    rows = run_of(given, tables).timeline.rows
    ops = (OP_EXPERT, OP_DENSE, OP_HEAD, *([OP_CPU] if "cores" in name else []))
    for op in ops:
        mine = rows[rows[:, ROW_OP] == op]
        assert len(mine) > 4
        assert (mine[:, ROW_END] - mine[:, ROW_START]).tolist() == expected_ns(work, tables, mine, op).tolist()
    # Rows come in the order in which they ended, or in any other one.
    kernels = rows[rows[:, ROW_OP] == OP_EXPERT]
    mixed = np.random.default_rng(0).permutation(len(kernels))
    assert launch_of_rows(kernels[mixed]).tolist() == launch_of_rows(kernels)[mixed].tolist()


@pytest.mark.parametrize("name", SCHEDULES)
def test_launches_are_those_that_were_decided(name: str) -> None:
    given = run_input(SCHEDULES[name], small_trace())
    work = decided_work(given)
    launches, cores = work.launches, work.core_formats
    steps, formats = given.workload.steps, formats_of(given)
    for number, (layer_step, mine) in enumerate(sorted(launches.items())):
        low, high = steps.layer_step_start[number], steps.layer_step_start[number + 1]
        used = dict(
            zip(steps.layer_step_expert[low:high].tolist(), steps.layer_step_tokens[low:high].tolist(), strict=True)
        )
        items = [item for launch in mine for item in launch]
        assert all(used[expert] == tokens for expert, _, tokens in items)
        elsewhere = {expert: fmt for (*where, expert), fmt in cores.items() if tuple(where) == layer_step}
        assert sorted([expert for expert, _, _ in items] + list(elsewhere)) == sorted(used)
        for expert, fmt in [(expert, fmt) for expert, fmt, _ in items] + list(elsewhere.items()):
            assert fmt == int(formats[number][expert])
        assert all(len(launch) == 1 for launch in mine) or given.config.grouped
    assert bool(cores) == ("cores" in name)
    assert any(
        len(mine) > 1 for mine in launches.values()
    )  # hits and misses of a layer step are launched apart, if grouped


def test_medians_are_of_what_is_off_in_either_direction() -> None:
    assert median_budget([{"none": -0.3, "copy": 0.1}, {"none": 0.1, "copy": 0.0}, {"none": 0.2, "copy": -0.2}]) == {
        "none": 0.2,
        "copy": 0.1,
    }
    assert median_budget([]) == {}
