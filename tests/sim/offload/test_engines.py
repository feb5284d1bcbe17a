"""SimPy model and compiled simulator agree to the nanosecond, row by row, on whatever hypothesis makes up."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, given, settings

from moeplan.sim.offload.simulators import first_difference, run_compiled, run_simpy
from strategies import runs

LONG = os.environ.get("MOEPLAN_LONG") == "1"
CASES = 5000 if LONG else 300


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=not LONG)
@given(runs())
def test_simpy_and_compiled_agree_row_by_row(case):
    config, workload, costs, capacities, schedule, _ = case
    serial = not schedule.copy.overlap
    slow = run_simpy(config, workload, costs, capacities, serial=serial)
    fast = run_compiled(config, workload, costs, capacities, serial=serial, rows=True)
    assert first_difference(slow, fast) is None
    slow.timeline.check()
