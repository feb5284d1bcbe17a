"""The harness takes turns, keeps every repetition, and says what makes numbers doubtful."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moeplan.base.errors import DoesNotFit
from moeplan.base.units import MIB
from moeplan.calibrate.microbenchmarks import harness
from moeplan.calibrate.microbenchmarks.copies import CopyPool, companion, copy_benches, copying, piece_benches
from moeplan.calibrate.microbenchmarks.harness import Bench, Harness, instabilities
from moeplan.calibrate.samples import Sample
from moeplan.devices.device import (
    COMPUTE,
    STREAMS,
    TO_DEVICE,
    CpuDevice,
    InstantMark,
    available_host_bytes,
    metadata_of,
)


class ClockedDevice(CpuDevice):
    """A device whose marks read a clock that only the benchmarks advance."""

    def __init__(self) -> None:
        super().__init__(2**20)
        self.now_ns = 0

    def mark(self) -> Any:
        mark = InstantMark()
        mark._at_ns = self.now_ns
        return mark


def bench(device: ClockedDevice, name: str, ns: int, log: list[str], **more: Any) -> Bench:
    def run(number: int) -> None:
        log.append(name)
        device.now_ns += ns

    return Bench(kind="host", labels={"what": name}, arguments={}, run=run, **more)


def test_benchmarks_take_turns_and_every_repetition_is_kept() -> None:
    device, log = ClockedDevice(), []
    found = Harness(device).measure([bench(device, "a", 10, log), bench(device, "b", 30, log)], rounds=3, repetitions=2)
    assert log == ["a"] * 2 + ["b"] * 2 + ["a", "a", "b", "b"] * 3  # two warm-ups each come first
    assert [sample.seconds for sample in found] == [(10e-9,) * 6, (30e-9,) * 6]


def test_time_is_up_after_a_whole_round() -> None:
    device, log = ClockedDevice(), []
    found = Harness(device).measure(
        [bench(device, "a", 10, log), bench(device, "b", 10, log)], rounds=9, repetitions=1, seconds=0.0
    )
    assert [len(sample.seconds) for sample in found] == [1, 1]


def test_preparation_and_companions_stay_outside_the_time() -> None:
    device, log = ClockedDevice(), []

    def prepare(number: int) -> None:
        log.append("prepare")
        device.now_ns += 1000

    @contextlib.contextmanager
    def during() -> Iterator[None]:
        log.append("enter")
        device.now_ns += 5000
        yield
        log.append("leave")

    found = Harness(device).measure(
        [bench(device, "a", 10, log, prepare=prepare, during=during)], rounds=1, repetitions=2
    )
    assert found[0].seconds == (10e-9, 10e-9)
    assert log[-6:] == ["enter", "prepare", "a", "prepare", "a", "leave"]


def test_a_pause_outlasts_launching_and_times_have_a_fresh_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that runs behind the host's back, what is measured is neither the host nor a clock that has run for minutes."""
    device, log, pauses, epochs = ClockedDevice(), [], [], []
    device.asynchronous = True
    monkeypatch.setattr(device, "new_epoch", lambda: epochs.append(len(pauses)))
    monkeypatch.setattr(torch.cuda, "_sleep", pauses.append)
    monkeypatch.setattr(harness.time, "perf_counter_ns", lambda: device.now_ns)
    quick, slow = bench(device, "quick", 10_000, log), bench(device, "slow", 150_000, log)
    Harness(device).measure([quick, slow], rounds=2, repetitions=1)
    # A window of 200 µs holds 20 of one and 2 of the other; launching took 10 and 150 µs each, of which the first is 80,000 cycles' worth.
    assert pauses[-4:] == [80_000 * 21, 80_000 + 3 * 150_000 * 2] * 2
    assert log == ["quick"] * 6 + ["slow"] * 6 + (["quick"] * 20 + ["slow"] * 2) * 2
    assert epochs == [6, 7, 8, 9]  # one before each turn, after six warm-ups


def test_what_times_itself_is_believed() -> None:
    bench = Bench(kind="host", labels={"what": "x"}, arguments={}, run=lambda _: None, timed=lambda number: 7.0)
    assert Harness(ClockedDevice()).measure([bench], rounds=1, repetitions=3)[0].seconds == (7.0, 7.0, 7.0)


def test_everything_measured_is_in_the_set_with_its_conditions() -> None:
    device, log = ClockedDevice(), []
    harness = Harness(device)
    harness.measure([bench(device, "a", 10, log)], rounds=1, repetitions=1)
    harness.keep(lambda: [Sample(kind="host", labels={"what": "kept"}, arguments={}, seconds=(1.0,))], "kept")
    found = harness.finish(model="m", quick=True)
    assert [sample.labels["what"] for sample in found] == ["a", "kept"]
    assert found.quick and found.model == "m"
    assert {"load_average", "unix_time_s"} <= set(found.conditions["began"])
    assert found.device == metadata_of(device)


def conditions(load: float = 0.1, steal: int = 0, **ended: Any) -> dict[str, Any]:
    began = {"load_average": [0.1, 0.1, 0.1], "cpu_jiffies": {"total": 0, "steal": 0}}
    return {
        "began": began,
        "ended": {"load_average": [load] * 3, "cpu_jiffies": {"total": 1000, "steal": steal}} | ended,
    }


def test_a_quiet_machine_gives_no_warnings() -> None:
    steady = Sample(kind="host", labels={"what": "x"}, arguments={}, seconds=(1.0, 1.01, 0.99))
    assert instabilities([steady], conditions()) == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (conditions(load=1000.0), "stop other programs"),
        (conditions(steal=100), "hypervisor took 10%"),
        (conditions(governor="powersave"), "set it to performance"),
        (conditions(throttle_reasons="0x0000000000000004"), "held back"),
    ],
)
def test_disturbances_are_said_with_what_to_do(given: dict[str, Any], says: str) -> None:
    assert len(found := instabilities([], given)) == 1 and says in found[0]


def test_measurements_that_vary_are_named_and_the_rest_counted() -> None:
    shaky = [
        Sample(
            kind="copy",
            labels={"direction": "h2d", "memory": "pinned"},
            arguments={"bytes": n},
            seconds=(1.0, 2.0, 3.0),
        )
        for n in range(5)
    ]
    found = instabilities(shaky, conditions())
    assert len(found) == 4 and "copy (h2d, pinned, bytes 0) varies by 50%" in found[0] and found[3].startswith("2 more")


# --- the device -------------------------------------------------------------------------------------------------------


def test_device_memory_is_counted_and_limited() -> None:
    device = CpuDevice(1000)
    first = device.empty((100,), torch.float32, "a thing")
    mark = device.mark_memory()
    device.empty((500,), torch.uint8, "another")
    with pytest.raises(DoesNotFit, match="a third") as caught:
        device.empty((101,), torch.uint8, "a third")
    assert caught.value.missing_bytes == 1
    device.release_since(mark)
    assert device.used_bytes == 400
    device.release(first)
    device.release(first)
    assert device.used_bytes == 0


def test_random_tensors_repeat_for_a_seed() -> None:
    device = CpuDevice(10**6)
    one, two, other = (device.normal((64, 8), torch.float32, "w", scale=0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert 0.4 < float(one.std()) < 0.6


def test_streams_are_threads_on_cores_and_leave_no_trace() -> None:
    device = CpuDevice()
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    for stream in STREAMS:
        with device.enter(stream):
            inside = os.sched_getaffinity(0)
            assert inside == ({device.core_of[stream]} if len(before) > 1 else before)
            assert torch.get_num_threads() == 1
        if stream == COMPUTE:
            assert torch.get_num_threads() == threads
    assert os.sched_getaffinity(0) == before
    torch.set_num_threads(threads)


def test_one_core_is_shared_by_all_streams() -> None:
    assert set(CpuDevice(cores=[3]).core_of.values()) == {3}
    assert CpuDevice(cores=[0, 1]).core_of == {"compute": 0, "h2d": 1, "d2h": 1, "cpu": 1}
    assert CpuDevice(cores=[4, 5, 6]).core_of == {"compute": 4, "h2d": 5, "d2h": 6, "cpu": 6}
    assert CpuDevice(cores=[0, 1, 2, 3, 4]).core_of == {"compute": 0, "h2d": 1, "d2h": 2, "cpu": 3}


def test_host_memory_is_aligned_and_known() -> None:
    assert CpuDevice().host_memory(1000, pinned=True, what="x").data_ptr() % 256 == 0
    assert available_host_bytes() > 2**20


# --- copies and companions ----------------------------------------------------------------------------------------------


def test_copies_of_every_size_move_bytes_in_turn() -> None:
    device = CpuDevice()
    pool = CopyPool(device, pinned=True, pool_bytes=MIB)
    pool.host.copy_(torch.arange(MIB).remainder(251).to(torch.uint8))
    benches = copy_benches(pool, TO_DEVICE, (4096, 2 * MIB)) + piece_benches(pool, TO_DEVICE, 65536, (1, 4))
    assert [bench.arguments for bench in benches] == [
        {"bytes": 4096},
        {"bytes": 65536, "pieces": 1},
        {"bytes": 65536, "pieces": 4},
    ]
    for number in range(MIB // 4096):
        benches[0].run(number)
    assert torch.equal(pool.there.roll(MIB // 2), pool.host)


def test_a_companion_runs_while_its_context_is_open_and_its_failure_is_raised() -> None:
    device = CpuDevice()
    count = [0]

    def work(number: int) -> None:
        count[0] = number

    with companion(device, TO_DEVICE, work)():
        seen = count[0]
    after = count[0]
    assert after >= seen > 0

    def fail(number: int) -> None:
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"), companion(device, TO_DEVICE, fail)():
        pass
    pool = CopyPool(device, pinned=True, pool_bytes=MIB)
    with copying(pool, TO_DEVICE, 4096)():
        pass
    assert torch.equal(pool.there[:4096], pool.host[MIB // 2 : MIB // 2 + 4096])
