"""The executor on a device whose streams run behind the host's back gives what it gives on the CPU, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

import moeplan.executor.running.execute as executing
from async_device import AsyncDevice, QueuedDense, QueuedExperts
from executor_schedules import SCHEDULES
from executor_stages import preset, run_input, small_model, small_trace
from moeplan.devices.dense_part import DensePart
from moeplan.devices.stores.disk import DiskStore
from moeplan.executor.running.execute import Stage, execute, largest_pass, open_stage
from moeplan.executor.running.execution import Execution
from moeplan.executor.running.failures import ExecutionFailed
from moeplan.sim.offload.run_input import RunInput
from moeplan.sim.timeline import ROW_END, ROW_LANE, ROW_START
from moeplan.specs.schedules.offload import OffloadSchedule


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


@pytest.fixture(autouse=True)
def queued_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = executing.open_runner

    def opened(weights, device):
        return QueuedExperts(weights, device) if isinstance(device, AsyncDevice) else usual(weights, device)

    monkeypatch.setattr(executing, "open_runner", opened)


def async_stage(run: RunInput, device: AsyncDevice) -> Stage:
    dense = DensePart(small_model(), device, dtype=torch.float32, largest=largest_pass([run.workload]), seed=0)
    return Stage(model=small_model(), device=device, dense=QueuedDense(dense, device), seed=0, distinct_experts=None)


def executed(schedule: OffloadSchedule, device: AsyncDevice | None) -> Execution:
    run = run_input(schedule, small_trace())
    opened = open_stage(small_model(), [run.workload]) if device is None else async_stage(run, device)
    with opened as stage:
        return execute(stage, run, keep_outputs=True)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SCHEDULES)
def test_streams_that_run_ahead_and_behind_change_nothing(name: str, seed: int) -> None:
    expected = executed(SCHEDULES[name], None)
    found = executed(SCHEDULES[name], AsyncDevice(seed))
    assert [int(count) for count in found.counts] == [int(count) for count in expected.counts]
    assert len(found.outputs) == len(expected.outputs) > 0
    for step, (mine, theirs) in enumerate(zip(found.outputs, expected.outputs, strict=True)):
        assert torch.equal(mine, theirs), f"step {step}"
    assert found.bytes_copied == expected.bytes_copied
    assert found.bytes_written_back == expected.bytes_written_back
    for lane in set(found.timeline.rows[:, ROW_LANE].tolist()):
        rows = found.timeline.rows[found.timeline.rows[:, ROW_LANE] == lane]
        assert (rows[1:, ROW_START] >= rows[:-1, ROW_END]).all()


def test_experts_from_disk_arrive_whole() -> None:
    run = run_input(preset("mixtral-offloading", copy__chunk_bytes=4096), small_trace())
    expected = executed(run.schedule, None)
    device = AsyncDevice(3)
    with async_stage(run, device) as stage:
        store = DiskStore(stage.store("32"))
        locked = len(device.locked)
        found = execute(stage, run, store=store, keep_outputs=True)
        assert len(device.locked) == locked + 2  # two buffers between file and device
        store.close()
        assert len(device.locked) == locked
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found.outputs, expected.outputs, strict=True))


def test_a_written_back_expert_is_still_the_same() -> None:
    """Guesses are evicted before they come; what is written back then must not replace the original."""
    run = run_input(SCHEDULES["guesses and write-backs"], small_trace())
    with async_stage(run, AsyncDevice(4, longest_s=2e-3)) as stage:
        store = stage.store("32")
        before = torch.stack([store.bytes_of(key).clone() for key in range(store.num_keys)])
        assert execute(stage, run).bytes_written_back > 0
        assert torch.equal(before, torch.stack([store.bytes_of(key) for key in range(store.num_keys)]))


@pytest.mark.parametrize("name", ["on demand", "staged guesses", "public code", "guesses and write-backs"])
@pytest.mark.parametrize("fails_at", [1, 40])
def test_a_device_that_fails_ends_the_run_in_one_line(name: str, fails_at: int) -> None:
    run = run_input(SCHEDULES[name], small_trace())
    device = AsyncDevice(5, fails_at=fails_at)
    with async_stage(run, device) as stage:
        used = device.used_bytes
        with pytest.raises(ExecutionFailed, match="an illegal memory access") as caught:
            execute(stage, run)
        assert "\n" not in str(caught.value)
        assert device.used_bytes == used


def test_locked_memory_goes_back_with_its_store() -> None:
    run = run_input(preset("on-demand"), small_trace())
    device = AsyncDevice(6)
    with async_stage(run, device) as stage:
        stage.store("32")
        stage.store("4")
        assert len(device.locked) == 2
        stage.forget("32")
        assert len(device.locked) == 1
    assert device.locked == []


def test_a_device_that_failed_gets_the_buffers_of_a_file_back() -> None:
    run = run_input(preset("on-demand"), small_trace())
    device = AsyncDevice(7, fails_at=3)
    with async_stage(run, device) as stage:
        store = DiskStore(stage.store("32"))
        locked = len(device.locked)
        with pytest.raises(ExecutionFailed, match="an illegal memory access"):
            execute(stage, run, store=store)
        assert len(device.locked) > locked
        store.close()
        assert len(device.locked) == locked
