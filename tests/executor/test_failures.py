"""A run that cannot go on says so in one line, ends its threads and gives its memory back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch

from executor_stages import preset, run_input, small_model, small_trace
from moeplan.base.errors import DoesNotFit, InputError, MoeplanError
from moeplan.devices.device import Device, available_host_bytes, open_device
from moeplan.devices.stores.host import ExpertStore
from moeplan.executor.running.execute import execute, open_stage
from moeplan.executor.running.failures import ExecutionFailed
from moeplan.sim.offload.run_input import RunInput


@pytest.fixture
def run() -> RunInput:
    return run_input(preset("mixtral-offloading"), small_trace())


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    affinity, threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield
    assert set(threading.enumerate()) == before
    assert os.sched_getaffinity(0) == affinity
    assert torch.get_num_threads() == threads


class TroubledStore(ExpertStore):
    """A store in which something happens at the n-th copy."""

    def __init__(self, source: ExpertStore, number: int) -> None:
        super().__init__(source.layout, source.activation, source._slots.view(-1))
        self.left = number

    def bring(self, device: Device, target: torch.Tensor, key: int, low: int, high: int) -> None:
        self.left -= 1
        if self.left == 0:
            self.trouble()
        super().bring(device, target, key, low, high)

    def trouble(self) -> None:
        raise OSError("the link is down")


class InterruptedStore(TroubledStore):
    def trouble(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("name", ["mixtral-offloading", "on-demand", "mixtral-offloading-code", "pre-gated"])
def test_a_failed_copy_ends_the_run_with_its_reason(name: str) -> None:
    run = run_input(preset(name), small_trace())
    with open_stage(small_model(), [run.workload]) as stage:
        used = stage.device.used_bytes
        with pytest.raises((ExecutionFailed, OSError), match="the link is down") as caught:
            execute(stage, run, store=TroubledStore(stage.store("32"), 12))
        assert stage.device.used_bytes == used
        if isinstance(caught.value, MoeplanError):
            assert "\n" not in str(caught.value)
            assert caught.value.exit_status not in (0, 1, 2, 3)


def test_a_failed_write_back_ends_the_run() -> None:
    run = run_input(preset("mixtral-offloading-code", copy__overlap=True), small_trace())

    class ReadOnly(ExpertStore):
        def take_back(self, device: Device, source: torch.Tensor, key: int) -> None:
            raise OSError("read-only")

    with open_stage(small_model(), [run.workload]) as stage:
        store = stage.store("32")
        with pytest.raises(ExecutionFailed, match="read-only"):
            execute(stage, run, store=ReadOnly(store.layout, store.activation, store._slots.view(-1)))


@pytest.mark.parametrize("name", ["mixtral-offloading", "mixtral-offloading-code"])
def test_an_interrupt_while_copying_ends_the_run(name: str) -> None:
    run = run_input(preset(name), small_trace())
    with open_stage(small_model(), [run.workload]) as stage:
        with pytest.raises(KeyboardInterrupt):
            execute(stage, run, store=InterruptedStore(stage.store("32"), 9))
        again = execute(stage, run)  # the stage is still good
    assert len(again.step_ns) == run.workload.num_steps


def test_an_interrupt_between_steps_ends_the_run(run: RunInput) -> None:
    def interrupt(done: int, total: int, note: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with open_stage(small_model(), [run.workload]) as stage:
        used = stage.device.used_bytes
        with pytest.raises(KeyboardInterrupt):
            execute(stage, run, progress=interrupt)
        assert stage.device.used_bytes == used


def test_a_cache_that_exceeds_the_device_does_not_fit(run: RunInput) -> None:
    with open_stage(small_model(), [run.workload]) as probe:
        dense_bytes = probe.device.used_bytes
    slot_bytes = 3 * 64 * 64 * 4
    with open_stage(small_model(), [run.workload], memory_bytes=dense_bytes + 12 * slot_bytes) as stage:
        with pytest.raises(DoesNotFit, match="arena") as caught:  # 3 · 3 cached, 4 staged
            execute(stage, run)
        assert caught.value.missing_bytes == slot_bytes
        assert stage.device.used_bytes == dense_bytes
    with open_stage(small_model(), [run.workload], memory_bytes=dense_bytes + 13 * slot_bytes) as stage:
        execute(stage, run)


def test_a_dense_part_that_exceeds_the_device_does_not_fit(run: RunInput) -> None:
    with pytest.raises(DoesNotFit):
        open_stage(small_model(), [run.workload], memory_bytes=10_000)


def test_an_expert_store_that_exceeds_the_host_does_not_fit() -> None:
    device = open_device("cpu")
    with pytest.raises(DoesNotFit, match="host"):
        device.host_memory(2 * available_host_bytes(), pinned=True, what="the store")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_refused(run: RunInput) -> None:
    with pytest.raises(InputError, match="cuda"):
        open_stage(small_model(), [run.workload], device="cuda")


def test_an_unknown_device_is_refused(run: RunInput) -> None:
    with pytest.raises(InputError, match="device"):
        open_stage(small_model(), [run.workload], device="tpu")


def test_an_encoder_decoder_is_refused(run: RunInput) -> None:
    with pytest.raises(InputError, match="encoder"):
        open_stage(small_model(cross_attention=True, num_encoder_layers=2), [run.workload])


def test_a_format_that_kernels_do_not_run_is_refused() -> None:
    run = run_input(preset("on-demand", experts__bits="mxfp4"), small_trace())
    with open_stage(small_model(), [run.workload]) as stage, pytest.raises(InputError, match="mxfp4"):
        execute(stage, run)
