"""SimPy model and compiled simulator of expert parallelism agree to the nanosecond, row by row."""

from __future__ import annotations

import os

import numpy as np
from hypothesis import HealthCheck, given, settings

from ep_strategies import ep_runs
from long_runs import examples
from moeplan.sim.parallel.simulators import first_ep_difference, run_ep_compiled, run_ep_simpy

LONG = os.environ.get("MOEPLAN_LONG") == "1"
CASES = 5000 if LONG else 300


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=not LONG)
@given(ep_runs())
def test_simpy_and_compiled_agree_row_by_row(case):
    _, program, tables = case
    slow, fast = run_ep_simpy(program, tables), run_ep_compiled(program, tables, rows=True)
    assert first_ep_difference(slow, fast) is None
    slow.timeline.check()


@settings(max_examples=examples(100), deadline=None, derandomize=not LONG)
@given(ep_runs())
def test_every_activity_runs_once_and_lanes_are_busy_or_idle(case):
    _, program, tables = case
    run = run_ep_compiled(program, tables, rows=True)
    rows = run.timeline.rows
    assert len(rows) == np.count_nonzero(tables.work_ns) + np.count_nonzero(tables.ex_ns)
    assert (run.busy_ns <= run.makespan_ns).all()
    assert rows[:, 8].sum() == tables.ex_bytes[tables.ex_ns > 0].sum()
    assert run.makespan_ns >= tables.work_ns.sum(0).max()
    assert run.makespan_ns >= max(tables.ex_ns[:, 0].max(1).sum(), tables.ex_ns[:, 1].max(1).sum())
