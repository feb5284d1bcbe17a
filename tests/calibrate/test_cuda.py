"""The CUDA device with the few calls it makes of torch.cuda replaced: what it locks, what it unlocks, how it reads clocks."""

from __future__ import annotations

import contextlib
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeplan.base.errors import DoesNotFit, InputError
from moeplan.calibrate.microbenchmarks.standard_shapes import made_up_model
from moeplan.devices import cuda as cuda_device
from moeplan.devices.cuda import CudaDevice
from moeplan.devices.device import COMPUTE, CORES, TO_DEVICE, host_threads, open_device
from moeplan.devices.stores.host import make_store

GPU_MS = 1e-6
OUT_OF_MEMORY = 2


class Driver:
    """What the fake driver was told."""

    def __init__(self) -> None:
        self.now_ns = 5_000_000_000
        self.locked: dict[int, int] = {}
        self.refuse_above = sys.maxsize
        self.current = threading.local()
        self.waits: list[tuple[Any, Any]] = []
        self.threads = [3]
        self.synchronized = 0
        self.last_error_cleared = 0

    def register(self, address: int, num_bytes: int, flags: int) -> int:
        assert flags == 0 and address % 4096 == 0, "memory in pages of its own"
        for other, size in self.locked.items():
            assert address + num_bytes <= other or other + size <= address, "locked twice"
        if num_bytes > self.refuse_above:
            return OUT_OF_MEMORY
        self.locked[address] = num_bytes
        return 0

    def unregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    told = Driver()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at_ns: int | None = None

        def record(self) -> None:
            told.now_ns += 1000
            self.at_ns = told.now_ns

        def query(self) -> bool:
            return self.at_ns is not None

        def synchronize(self) -> None:
            told.now_ns += 2000

        def elapsed_time(self, other: Event) -> float:
            return (other.at_ns - self.at_ns) * GPU_MS

    class Stream:
        def __init__(self, place: torch.device | None = None, priority: int = 0) -> None:
            self.priority = priority

        def wait_event(self, event: Event) -> None:
            told.waits.append((self, event))

        def synchronize(self) -> None:
            told.synchronized += 1

    @contextlib.contextmanager
    def stream(chosen: Stream):
        before = current()
        told.current.stream = chosen
        yield
        told.current.stream = before

    usual = Stream()

    def current() -> Stream:
        return getattr(told.current, "stream", usual)

    cuda = SimpleNamespace(
        is_available=lambda: True,
        current_device=lambda: 0,
        set_device=lambda place: None,
        mem_get_info=lambda place: (1 << 30, 1 << 31),
        synchronize=lambda place: None,
        empty_cache=lambda: None,
        current_stream=current,
        stream=stream,
        Event=Event,
        Stream=Stream,
        cudart=lambda: SimpleNamespace(cudaHostRegister=told.register, cudaHostUnregister=told.unregister),
    )
    fake = SimpleNamespace(
        cuda=cuda, device=lambda *_: torch.device("cpu"), empty=torch.empty, uint8=torch.uint8, frombuffer=torch.frombuffer,
        Tensor=torch.Tensor, get_num_threads=lambda: told.threads[-1], set_num_threads=told.threads.append,
    )  # fmt: skip
    monkeypatch.setattr(cuda_device, "torch", fake)
    monkeypatch.setattr(cuda_device.time, "perf_counter_ns", lambda: told.now_ns)
    return told


def test_memory_is_locked_in_pages_of_its_own_and_unlocked_once(driver: Driver) -> None:
    device = CudaDevice()
    first, second = (device.host_memory(num_bytes, pinned=True, what="a test") for num_bytes in (100, 9000))
    plain = device.host_memory(100, pinned=False, what="a test")
    assert sorted(driver.locked.values()) == [100, 9000]
    assert [memory.numel() for memory in (first, second, plain)] == [100, 9000, 100]
    device.release_host(first)
    device.release_host(first)
    device.release_host(plain)
    assert list(driver.locked.values()) == [9000]
    device.close()
    assert driver.locked == {}


def test_memory_that_the_driver_does_not_lock_is_refused_in_one_line(driver: Driver) -> None:
    driver.refuse_above = 8192
    device = CudaDevice()
    with pytest.raises(
        DoesNotFit, match=r"did not lock 8193 bytes of host memory for a store \(CUDA error 2\)"
    ) as caught:
        device.host_memory(8193, pinned=True, what="a store")
    assert caught.value.missing_bytes == 8193
    assert driver.locked == {}


def test_a_store_gives_its_locked_memory_back(driver: Driver) -> None:
    device = CudaDevice()
    model = made_up_model("small", hidden=256, intermediate=64, num_layers=1)
    stores = [make_store(model, bits, device, num_keys=2, distinct=1) for bits in ("16", "4")]
    assert sorted(driver.locked.values()) == sorted(2 * store.slot_bytes for store in stores)
    assert stores[0].bytes_of(0).any()
    source = torch.zeros(stores[0].slot_bytes, dtype=torch.uint8)
    stores[0].take_back(device, source, 0)
    assert len(driver.locked) == 2
    for store in stores:
        store.close()
    assert driver.locked == {}


def test_marks_tell_the_host_clock(driver: Driver) -> None:
    device = CudaDevice()
    with device.enter(COMPUTE):
        driver.now_ns += 7_000_000
        mark = device.mark()
        # The origin is placed in the middle between two readings: here 500 ns after its event.
        assert abs(mark.at_ns() - driver.now_ns) <= 1000
        device.new_epoch()  # too early for another one
        assert device._epoch is mark._epoch
        driver.now_ns += 600_000_000
        device.new_epoch()
        later = device.mark()
    assert later._epoch is not mark._epoch
    assert later.at_ns() - mark.at_ns() == pytest.approx(600_000_000, abs=20_000)


def test_a_thread_follows_on_its_own_stream(driver: Driver) -> None:
    device = CudaDevice()
    with device.enter(COMPUTE):
        mark = device.mark()
    with device.enter(TO_DEVICE):
        device.follow(mark)
    assert driver.waits == [(device._streams[TO_DEVICE], mark.event)]
    assert device._streams[COMPUTE].priority > device._streams[TO_DEVICE].priority


def test_experts_on_the_host_may_use_all_cores_but_two(driver: Driver) -> None:
    device = CudaDevice()
    with contextlib.suppress(ZeroDivisionError), device.enter(CORES):
        assert driver.threads == [3, host_threads()]
        raise ZeroDivisionError
    with device.enter(TO_DEVICE):
        pass
    assert driver.threads == [3, host_threads(), 3]


def test_threads_take_turns_often_while_a_program_runs(driver: Driver) -> None:
    device, usual = CudaDevice(), sys.getswitchinterval()
    with contextlib.suppress(ZeroDivisionError), device.enter(COMPUTE):
        assert sys.getswitchinterval() < usual
        raise ZeroDivisionError
    assert sys.getswitchinterval() == usual


def test_a_smaller_budget_is_kept(driver: Driver) -> None:
    assert CudaDevice(1000).limit_bytes == 1000
    assert CudaDevice(1 << 40).limit_bytes == 1 << 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="torch sees no CUDA device; use --device cpu") as caught:
        open_device("cuda")
    assert caught.value.exit_status == 2 and "\n" not in str(caught.value)
