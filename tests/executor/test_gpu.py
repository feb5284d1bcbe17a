"""Every kind of run on a real GPU: the bytes that belong there, no hang, the simulator's counts; the same checks on the CPU.

Skipped, with the reason, where there is no CUDA device. What streams that run ahead can do wrong is tested without one too
(`test_executor_async`); this is for what only a driver shows.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator

import pytest
import torch

from executor_schedules import SCHEDULES, TWO_FORMATS
from executor_stages import run_input, small_model, small_trace
from moeplan.devices.device import cuda_is_present
from moeplan.executor.running.execute import execute, open_stage, walk_decisions
from moeplan.executor.running.execution import Execution
from moeplan.specs.schedules.offload import OffloadSchedule

HANG_S = 120.0
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not cuda_is_present(), reason="no CUDA device that torch can use")),
]
# What bfloat16 rows and the order of sums may change over three layers; a wrong or unfinished expert changes far more.
CLOSE = 0.03


@pytest.fixture(autouse=True)
def stacks_where_something_hangs() -> Iterator[None]:
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def executed(schedule: OffloadSchedule, bits: str, device: str) -> Execution:
    run = run_input(schedule.with_options(experts__bits=bits), small_trace())
    with open_stage(small_model(), [run.workload], device=device) as stage:
        found = execute(stage, run, keep_outputs=True, poison=True)
        assert stage.device.used_bytes > 0
    assert found.counts.tolist() == walk_decisions(run).counts[0].tolist()
    return found


def distance(mine: Execution, right: Execution) -> float:
    assert len(mine.outputs) == len(right.outputs) > 0
    found = 0.0
    for one, other in zip(mine.outputs, right.outputs, strict=True):
        assert bool(torch.isfinite(one).all())
        found = max(found, float((one.float() - other.float()).norm() / other.float().norm()))
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", ["16", "4"])
@pytest.mark.parametrize("name", [name for name in SCHEDULES if SCHEDULES[name].workload.concurrency == 1])
def test_whatever_moves_the_same_is_computed(name: str, bits: str, device: str) -> None:
    # Where nothing is kept and nothing guessed, nothing can be in the wrong place.
    plain = executed(SCHEDULES["on demand"], bits, device)
    assert distance(executed(SCHEDULES[name], bits, device), plain) < CLOSE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TWO_FORMATS)
def test_two_formats_run(name: str, device: str) -> None:
    found = executed(TWO_FORMATS[name], "16", device)
    assert all(bool(torch.isfinite(one).all()) for one in found.outputs)
