"""The least memory for a speed: the smallest there is, whatever memory is at hand, and another one for another speed."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeplan.base.errors import DoesNotFit
from moeplan.base.units import NS_PER_S
from moeplan.planner.offload import least_memory as module
from moeplan.planner.offload.plan import OffloadRequest, base_schedule
from moeplan.planner.offload.search import search
from moeplan.planner.offload.space import Candidate, candidates
from moeplan.sim.offload.metrics import counted_tokens
from moeplan.sim.offload.simulate import Simulation
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models.load import load_model
from moeplan.specs.schedules.offload import OffloadSchedule
from strategies import make_trace

LONG = os.environ.get("MOEPLAN_LONG") == "1"
MIB = 2**20
BASE = base_schedule(OffloadRequest(bits=("32",)), "32")
drawn = settings(max_examples=20 if LONG else 2, suppress_health_check=list(HealthCheck), derandomize=not LONG)


def simulation(seed: int, memory_bytes: int = 2000 * MIB) -> Simulation:
    rng = np.random.default_rng(seed)
    trace = make_trace(
        rng, num_layers=6, num_experts=16, top_k=2, requests=[(2, 4)], skew=float(rng.choice([0.0, 0.2]))
    )
    return Simulation(model=load_model("tiny-moe"), profile=load_hardware("t4"), trace=trace, window_steps=4,
                     memory_bytes=memory_bytes)  # fmt: skip


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "candidates", few)


def few(
    this: Simulation, base: OffloadSchedule, level: int, low_bits: str | None = None, refused: Any = None
) -> list[Candidate]:
    """Return the candidates that guess nothing: what is tested holds for any space, and these are quick."""
    return [one for one in candidates(this, base, level, low_bits, refused) if one.schedule.predictor.kind == "none"]


def least(this: Simulation, floor: float) -> Any:
    return search(this, BASE, objective="least_memory", floor_tokens_per_s=floor)


def fastest(this: Simulation, level: int) -> float:
    """Return the speed of the fastest schedule with so many slots, every one of them simulated."""
    outcomes = [this.run(one.schedule) for one in few(this, BASE, level)]
    times = [int(one.step_end[-1]) for one in outcomes if one.counts[13] <= level]
    return counted_tokens(this.workload(BASE)) * NS_PER_S / min(times)


@drawn
@given(st.integers(0, 10_000), st.integers(2, 95), st.integers(2, 95))
def test_the_answer_reaches_its_floor_and_one_slot_less_does_not(seed, one, other):
    this = simulation(seed)
    found = []
    for floor in sorted({fastest(this, level) for level in (one, other)}):
        point = least(this, floor * (1 - 1e-12)).front[-1]
        window_s = point.figures["window_s"]
        assert window_s is not None and counted_tokens(this.workload(BASE)) / window_s >= floor * (1 - 1e-9)
        assert point.level == 1 or fastest(this, point.level - 1) < floor
        assert point.level <= max(one, other) + 8  # an eighth of ninety-six experts: the first step's width
        found.append(point.device_bytes)
    assert found == sorted(found)


@drawn
@given(st.integers(0, 10_000), st.integers(2, 90))
def test_a_budget_decides_whether_it_fits_and_nothing_else(seed, level):
    this = simulation(seed)
    floor = fastest(this, level) * (1 - 1e-12)
    free = least(this, floor)
    needed = free.front[-1].device_bytes
    for budget in (needed, needed + 1, needed + 37 * MIB):
        assert least(simulation(seed, budget), floor).best == free.best
    for budget in (needed - 1, needed - 5 * MIB):
        with pytest.raises(DoesNotFit, match="tokens/s") as caught:
            least(simulation(seed, budget), floor)
        assert caught.value.missing_bytes == needed - budget


def test_a_speed_that_no_memory_reaches_is_said_to_be_out_of_reach():
    with pytest.raises(DoesNotFit, match="no amount of device memory") as caught:
        least(simulation(1), 1e9)
    assert "missing" not in str(caught.value)
