"""Misses that run on the host's cores: the same numbers, the same counts, beside the kernels, and no hang when one fails."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

import moeplan.executor.running.host_cores as cores
from executor_stages import expected_outputs, preset, run_input, small_model, small_trace
from moeplan.base.errors import InputError, Internal
from moeplan.executor.running.execute import execute, open_stage
from moeplan.executor.running.failures import ExecutionFailed
from moeplan.executor.running.prediction import run_input as forecast_input
from moeplan.kernels.expert_weights import ExpertWeights
from moeplan.sim.offload.run_input import RunInput
from moeplan.sim.timeline import (
    OP_CPU,
    OP_DENSE,
    OP_EXPERT,
    OP_HEAD,
    ROW_END,
    ROW_LANE,
    ROW_LAYER,
    ROW_OP,
    ROW_START,
    ROW_STEP,
)
from moeplan.specs.schedules.presets import load_preset

SCHEDULES = {
    "all on the cores": preset("cpu-moe"),
    "some layers": preset("n-cpu-moe", cache__experts_per_layer=None, cache__pooled_experts=8),
    "cheaper": preset("fiddler"),
    "balanced": preset("hybrimoe"),
    "balanced, grouped": preset("hybrimoe", kernel__grouping="grouped", workload__concurrency=3),
    "balanced, nothing kept": preset(
        "on-demand", kernel__miss="balanced", predictor__kind="synthetic", predictor__recall=0.5
    ),
    "cores and write-backs": preset("hybrimoe", copy__write_back=True, cache__experts_per_layer=1),
}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before, affinity, threads = set(threading.enumerate()), os.sched_getaffinity(0), torch.get_num_threads()
    yield
    assert set(threading.enumerate()) == before
    assert os.sched_getaffinity(0) == affinity
    assert torch.get_num_threads() == threads


def trouble_at(monkeypatch: pytest.MonkeyPatch, number: int, trouble: Callable[[], None]) -> None:
    """Have `trouble` happen in the worker at its `number`-th expert."""
    usual, done = cores.run_expert, []

    def run(x: torch.Tensor, weights: ExpertWeights, slot: int, **options: object) -> torch.Tensor:
        done.append(slot)
        if len(done) == number:
            trouble()
        return usual(x, weights, slot, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(cores, "run_expert", run)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("bits", ["32", "4"])
def test_what_the_cores_compute_is_what_the_model_computes(name: str, bits: str) -> None:
    run = run_input(SCHEDULES[name].with_options(experts__bits=bits), small_trace())
    expected = expected_outputs(small_model(), run, bits=bits)
    with open_stage(small_model(), [run.workload]) as stage:
        found = execute(stage, run, keep_outputs=True, poison=True)
    assert 0 < found.core_experts == found.counts.cpu_runs <= found.counts.misses
    for mine, right in zip(found.outputs, expected, strict=True):
        # Float32 sums against float64; packed weights are multiplied in bfloat16, a wrong expert is off by about one.
        assert float((mine - right).norm() / right.norm()) < (1e-4 if bits == "32" else 0.02)


def test_experts_with_biases_run_on_the_cores() -> None:
    model = small_model(expert_bias=True, family="gpt_oss")
    run = run_input(preset("cpu-moe"), small_trace())
    with open_stage(model, [run.workload]) as stage:
        found = execute(stage, run, keep_outputs=True)
    for mine, right in zip(found.outputs, expected_outputs(model, run), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)


def test_the_next_dense_part_waits_for_the_cores_and_kernels_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    trouble_at(monkeypatch, 7, lambda: time.sleep(0.05))
    run = run_input(SCHEDULES["balanced"], small_trace())
    with open_stage(small_model(), [run.workload]) as stage:
        expected = execute(stage, run, keep_outputs=True)
        rows = expected.timeline.rows
    slow = rows[(rows[:, ROW_OP] == OP_CPU) & (rows[:, ROW_END] - rows[:, ROW_START] > 40_000_000)]
    assert len(slow) == 1
    layer_step = rows[(rows[:, ROW_STEP] == slow[0, ROW_STEP]) & (rows[:, ROW_LAYER] == slow[0, ROW_LAYER])]
    assert (layer_step[layer_step[:, ROW_OP] == OP_EXPERT][:, ROW_START] < slow[0, ROW_END]).all()
    order = rows[np.isin(rows[:, ROW_OP], (OP_DENSE, OP_HEAD))]
    after = order[order[:, ROW_START] > slow[0, ROW_START]]
    assert after[0, ROW_START] >= slow[0, ROW_END]
    lane = rows[rows[:, ROW_LANE] == slow[0, ROW_LANE]]
    assert (lane[1:, ROW_START] >= lane[:-1, ROW_END]).all()
    assert expected.step_ns[slow[0, ROW_STEP]] > 50_000_000


@pytest.mark.parametrize("name", ["all on the cores", "balanced", "balanced, nothing kept"])
def test_a_worker_that_fails_ends_the_run_with_its_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    run = run_input(SCHEDULES[name], small_trace())
    with open_stage(small_model(), [run.workload]) as stage:
        used = stage.device.used_bytes
        trouble_at(monkeypatch, 9, fail)
        with pytest.raises(ExecutionFailed, match=r"host's cores failed.*can't allocate memory") as caught:
            execute(stage, run)
        assert "\n" not in str(caught.value)
        assert stage.device.used_bytes == used
        assert len(execute(stage, run).step_ns) == run.workload.num_steps  # the stage is still good


def test_an_interrupt_while_the_cores_compute_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

    run = run_input(SCHEDULES["all on the cores"], small_trace())
    with open_stage(small_model(), [run.workload]) as stage:
        used = stage.device.used_bytes
        trouble_at(monkeypatch, 5, interrupt)
        with pytest.raises(KeyboardInterrupt):
            execute(stage, run)
        assert stage.device.used_bytes == used
        assert len(execute(stage, run).step_ns) == run.workload.num_steps


def test_whole_layers_stay_on_the_cores() -> None:
    run = forecast_input(load_preset("n-cpu-moe=2").with_options(experts__bits="32"), small_trace())
    assert run.capacities.tolist() == [8]
    with open_stage(small_model(), [run.workload]) as stage:
        rows = execute(stage, run).timeline.rows
    assert set(rows[rows[:, ROW_OP] == OP_CPU, ROW_LAYER].tolist()) == {0, 1}
    assert set(rows[rows[:, ROW_OP] == OP_EXPERT, ROW_LAYER].tolist()) == {2}
    with pytest.raises(InputError, match="host_layers"):
        forecast_input(load_preset("n-cpu-moe=3"), small_trace())


def test_decisions_that_weigh_costs_need_them() -> None:
    run = run_input(SCHEDULES["balanced"], small_trace())
    bare = RunInput(
        schedule=run.schedule, config=run.config, workload=run.workload, capacities=run.capacities, weighed=None
    )
    with open_stage(small_model(), [run.workload]) as stage, pytest.raises(Internal, match="weighs costs"):
        execute(stage, bare)
