"""Where a step's time goes: it adds up to the nanosecond under every preset, and is what the step grows with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.sim.parallel.critical_path import critical_path
from moeplan.sim.parallel.program import EP_OPS, OP_REDUCE, Shape, build_program
from moeplan.sim.parallel.simulators import run_ep_compiled
from moeplan.sim.parallel.tables import EpTables
from moeplan.specs.schedules.parallel import EP_PRESETS, load_ep_preset


def drawn(name: str, seed: int, layers: int = 3, ranks: int = 3):  # type: ignore[no-untyped-def]
    program = build_program(load_ep_preset(name), Shape(num_layers=layers, has_shared=True))
    rng = np.random.default_rng(seed)
    work = rng.integers(1, 1000, (len(program.op_kind), ranks)) * 1000
    ex = rng.integers(1, 1000, (len(program.ex_kind), 2, ranks)) * 1000
    ex[program.ex_kind == OP_REDUCE, 0] = 0
    return program, EpTables(work_ns=work, op_tokens=work * 0, ex_ns=ex, ex_bytes=ex * 0, ex_tokens=ex * 0)


@pytest.mark.parametrize("name", EP_PRESETS)
@settings(max_examples=examples(5), deadline=None)
@given(seed=st.integers(0, 2**31))
def test_kinds_add_up_to_the_step(name: str, seed: int) -> None:
    program, tables = drawn(name, seed)
    outcome = run_ep_compiled(program, tables)
    found = critical_path(program, tables, outcome)
    assert sum(found.by_kind_ns.values()) == outcome.makespan_ns
    assert 0 <= found.imbalance_ns <= found.by_kind_ns["expert"]


@pytest.mark.parametrize("name", ["ep", "tbo", "eps-moe", "tensor-parallel"])
def test_a_kind_that_takes_longer_lengthens_the_step_by_its_part(name: str) -> None:
    program, tables = drawn(name, 7)
    outcome = run_ep_compiled(program, tables)
    parts = critical_path(program, tables, outcome).by_kind_ns
    for number, kind in enumerate(EP_OPS):
        # A thousandth longer: durations are whole thousands of nanoseconds.
        work = tables.work_ns + np.where((program.op_kind == number)[:, None], tables.work_ns // 1000, 0)
        ex = tables.ex_ns + np.where((program.ex_kind == number)[:, None, None], tables.ex_ns // 1000, 0)
        longer = run_ep_compiled(program, tables._replace(work_ns=work, ex_ns=ex)).makespan_ns - outcome.makespan_ns
        assert longer == pytest.approx(parts[kind] / 1000, rel=0.05, abs=1), kind


def test_without_overlap_every_part_is_on_the_path() -> None:
    program = build_program(load_ep_preset("ep"), Shape(num_layers=2, has_shared=False))
    work = np.full((len(program.op_kind), 2), 10)
    work[:, 1] = np.where(program.op_kind == EP_OPS.index("expert"), 30, 10)
    ex = np.full((len(program.ex_kind), 2, 2), 5)
    tables = EpTables(work_ns=work, op_tokens=work * 0, ex_ns=ex, ex_bytes=ex * 0, ex_tokens=ex * 0)
    found = critical_path(program, tables, run_ep_compiled(program, tables))
    took = {kind: value for kind, value in found.by_kind_ns.items() if value}
    assert took == {"dense": 20, "expert": 60, "head": 10, "dispatch": 10, "combine": 10}
    assert found.imbalance_ns == 20  # the mean rank takes 20 in each layer
