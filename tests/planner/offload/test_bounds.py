"""A bound is a bound: no simulated schedule beats it, from its first step or from any later one."""

from __future__ import annotations

import os
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeplan.base.errors import Internal
from moeplan.planner.offload.bounds import Bound, Bounds, fewest_loads
from moeplan.planner.offload.plan import OffloadRequest, base_schedule
from moeplan.planner.offload.search import search
from moeplan.planner.offload.space import Candidate, candidates
from moeplan.sim.offload.run_input import RunInput
from moeplan.sim.offload.simulate import Simulation
from moeplan.sim.offload.simulators import run_compiled
from moeplan.sim.offload.workload import build_workload
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.offload import OffloadSchedule, WorkloadOptions
from strategies import make_costs, make_trace, runs

LONG = os.environ.get("MOEPLAN_LONG") == "1"
GIB = 2**30


def bounded(examples: int) -> Any:
    return settings(
        max_examples=examples * (20 if LONG else 1), suppress_health_check=list(HealthCheck), derandomize=not LONG
    )


class Drawn(Simulation):
    """A simulation whose costs are drawn, so that any resource may be the cheap one."""

    seed: int = 0

    def usual_tables(self, schedule: OffloadSchedule) -> Any:
        key = (schedule.experts, schedule.kernel, schedule.copy.chunk_bytes)
        if key not in self._tables:
            # What does not depend on the options is drawn alike for all of them.
            rng = np.random.default_rng(zlib.crc32(repr((self.seed, schedule.experts.low_bits)).encode()))
            self._tables[key] = make_costs(rng, self.workload(schedule), schedule, coupled=self.seed % 2 == 0), None
        return self._tables[key]


def drawn(seed: int, *, memory_bytes: int = 2 * GIB) -> Drawn:
    rng = np.random.default_rng(seed)
    requests = [(int(rng.integers(0, 6)), int(rng.integers(1, 6))) for _ in range(int(rng.integers(1, 4)))]
    trace = make_trace(rng, num_layers=6, num_experts=16, top_k=2, requests=requests, skew=float(rng.choice([0.0, 0.2])),
                       guesses=int(rng.choice([0, 2])))  # fmt: skip
    found = Drawn(model=load_model("tiny-moe"), profile=load_hardware("rtx-4090"), trace=trace, window_steps=10,
                  memory_bytes=memory_bytes)  # fmt: skip
    found.seed = seed
    return found


@bounded(6)
@given(st.integers(0, 10_000), st.integers(1, 96), st.sampled_from([None, "4"]), st.sampled_from([1, 2]),
       st.sampled_from([None, 2]))  # fmt: skip
def test_no_candidate_of_a_drawn_space_beats_its_bound(seed, level, low_bits, concurrency, chunk):
    this = drawn(seed)
    base = base_schedule(OffloadRequest(bits=("32",), concurrency=concurrency, prefill_chunk_tokens=chunk), "32")
    bounds = Bounds(this, base)
    for candidate in candidates(this, base, level, low_bits):
        ends = this.run(candidate.schedule).step_end
        generating = int(np.diff(ends, prepend=0)[this.workload(base).step_phase == 1].sum())
        bounds.of(candidate).check(candidate, ends, generating)


@bounded(60)
@given(runs())
def test_no_schedule_of_any_kind_beats_its_bound(case):
    """Options that the search leaves out too: write-backs, whole layers, a pre-gate, an oracle, cancelled guesses."""
    config, workload, costs, capacities, schedule, trace = case
    known = build_workload(trace, schedule.workload, with_next_use=True)
    given = RunInput(schedule=schedule, config=config, workload=workload, capacities=capacities, weighed=costs)
    this: Any = SimpleNamespace(
        workload=lambda *_, **__: known, least_tables=lambda _: costs, given=lambda _: given,
        num_experts=config.num_layers * config.num_experts, trace=trace,
    )  # fmt: skip
    candidate = Candidate(schedule=schedule, level=0, cached_slots=0)
    outcome = run_compiled(config, workload, costs, capacities, serial=not schedule.copy.overlap)
    Bounds(this, schedule).of(candidate).check(candidate, outcome.step_end)


@bounded(2)
@given(st.integers(0, 10_000))
def test_no_schedule_of_the_space_beats_the_bound_of_a_plan(seed):
    this = drawn(seed, memory_bytes=570 * 2**20)
    base = base_schedule(OffloadRequest(bits=("32",)), "32")
    found = search(this, base, low_bits="4", exhaustive=True)
    levels = sorted({point.level for point in found.front})
    times = [
        int(this.run(one.schedule).step_end[-1])
        for level in levels
        for one in candidates(this, base, level, "4")
        if one.schedule.cache.policy != "none"
    ]
    assert found.lower_bound_ns <= found.best.total_ns <= min(times)


def test_a_known_pipe_is_bounded_exactly():
    """A layer's misses on one link: dense part, routing, copies one after the other; only the last kernel lies behind them."""
    this = drawn(1)
    base = base_schedule(OffloadRequest(bits=("32",)), "32")
    schedule = base.with_options(cache__policy="none", kernel__grouping="per-expert")
    tables, _ = this.tables(schedule)
    dense, host = tables.dense_ns.sum(1)[tables.step_class] + tables.head_ns[tables.step_class], tables.host_ns[0]
    steps = this.workload(schedule).steps
    uses = len(steps.layer_step_expert)
    copy = int(tables.chunk_ns[0, 0] * (tables.num_chunks[0] - 1) + tables.chunk_ns[0, 1])
    link = int(dense.sum()) + len(dense) * int(6 * host.layer + host.step + host.kernel) + uses * copy
    stream = link - uses * copy + len(dense) * 6 * int(host.kernel) + uses * int(host.transfer)
    stream += int(tables.kernel_ns[0][steps.layer_step_tokens].sum())
    found = Bounds(this, base).of(Candidate(schedule=schedule, level=96, cached_slots=0)).whole_ns
    assert found == pytest.approx(max(link, stream), abs=1 + 1e-8 * link)


def test_cores_that_cost_nothing_leave_nothing_to_the_link():
    this = drawn(2)
    base = base_schedule(OffloadRequest(bits=("32",)), "32")
    fetched = base.with_options(cache__policy="static", cache__pooled_experts=4)
    shared = fetched.with_options(kernel__miss="cheaper")
    tables, sources = this.tables(shared)
    key = (shared.experts, shared.kernel, shared.copy.chunk_bytes)
    this._tables[key] = tables._replace(cpu_ns=np.ones_like(tables.cpu_ns)), sources
    bounds = Bounds(this, base)
    least = [bounds.of(Candidate(schedule=one, level=6, cached_slots=4)).whole_ns for one in (fetched, shared)]
    assert least[1] <= int(this.run(shared).step_end[-1]) < least[0]


def test_a_run_that_beats_its_bound_is_an_error_that_names_the_schedule():
    schedule = OffloadSchedule().with_options(cache__policy="static", cache__pooled_experts=7, kernel__miss="cpu")
    candidate = Candidate(schedule=schedule, level=9, cached_slots=7)
    ends = np.array([10, 25, 30])
    Bound(whole_ns=30, later_ns=np.array([30, 20, 5, 0])).check(candidate, ends)
    with pytest.raises(Internal, match=r"30 ns.*31 ns.*cache.policy=static cache.pooled_experts=7 kernel.miss=cpu"):
        Bound(whole_ns=31, later_ns=np.array([30, 20, 5, 0])).check(candidate, ends)
    with pytest.raises(Internal):
        Bound(whole_ns=30, later_ns=np.array([30, 21, 5, 0])).check(candidate, ends)
    Bound(whole_ns=30, later_ns=np.array([30, 20, 5, 0]), decode_ns=20).check(candidate, ends, 20)
    with pytest.raises(Internal, match=r"generated in 20 ns.*21 ns.*cache.policy=static"):
        Bound(whole_ns=30, later_ns=np.array([30, 20, 5, 0]), decode_ns=21).check(candidate, ends, 20)


def test_fewest_loads_of_a_known_sequence():
    trace = make_trace(np.random.default_rng(0), num_layers=1, num_experts=4, top_k=1, requests=[(0, 8)])
    trace.experts[:, 0, 0] = [0, 1, 2, 0, 1, 3, 0, 1]
    workload = build_workload(trace, WorkloadOptions(), with_next_use=True)
    # Two places: 0, 1 and 2 are loaded; the two of them needed soonest stay (0, 1); 3 passes through.
    assert fewest_loads(workload, 2, pooled=False).tolist() == [1, 1, 1, 0, 0, 1, 0, 0]
    assert fewest_loads(workload, 4, pooled=False).sum() == 4
