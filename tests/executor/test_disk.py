"""A disk below the host: what is read, when copies may start, how much memory it takes, and how it fails."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from executor_stages import expert_tokens, preset, run_input, small_model, small_trace, tables_of
from moeplan.base.errors import DoesNotFit, InputError
from moeplan.devices.device import CpuDevice, Device
from moeplan.devices.stores import disk as disk_store
from moeplan.devices.stores.disk import DiskStore
from moeplan.devices.stores.host import make_store
from moeplan.executor.running import host_tier
from moeplan.executor.running.execute import execute, open_stage
from moeplan.executor.running.execution import Execution, count_differences
from moeplan.executor.running.failures import ExecutionFailed
from moeplan.executor.running.host_tier import most_reads
from moeplan.sim.offload.run_input import RunInput
from moeplan.sim.offload.simulators import fresh_state, run_compiled
from moeplan.sim.timeline import DISK, H2D, ROW_BYTES, ROW_END, ROW_EXPERT, ROW_LANE, ROW_LAYER, ROW_START, ROW_STEP
from moeplan.specs.schedules.offload import OffloadSchedule

SLOT_BYTES = 3 * 64 * 64 * 4
NUM_EXPERTS = 3 * 8

SCHEDULES: dict[str, dict[str, Any]] = {
    "LRU": {"cache__policy": "lru", "cache__experts_per_layer": 2, "predictor__kind": "none", "predictor__staging": 0},
    "staged guesses": {"cache__policy": "lru", "cache__experts_per_layer": 2, "predictor__kind": "next-gate", "predictor__staging": 4},
    "every expert guessed": {"cache__policy": "lru", "cache__experts_per_layer": 1, "predictor__kind": "all", "predictor__staging": 0},
    "guesses in pieces": {"cache__policy": "lru", "cache__experts_per_layer": 2, "predictor__kind": "synthetic", "predictor__staging": 0,
                          "copy__chunk_bytes": 8192, "workload__concurrency": 2},
    "nothing is kept": {"cache__policy": "none", "cache__experts_per_layer": None, "predictor__kind": "next-gate",
                        "predictor__staging": 0, "predictor__depth": 2},
    "guesses that pay": {"cache__policy": "lru", "cache__experts_per_layer": 2, "predictor__kind": "synthetic", "predictor__staging": 4,
                         "predictor__benefit": True},
    "static": {"cache__policy": "static", "cache__experts_per_layer": 3, "predictor__kind": "none", "predictor__staging": 0,
               "kernel__grouping": "grouped"},
}  # fmt: skip


def schedule(name: str, host_experts: int | None) -> OffloadSchedule:
    return preset("mixtral-offloading", predictor__staging=0).with_options(
        **SCHEDULES[name], copy__host_experts=host_experts
    )


def run_of(name: str, host_experts: int | None) -> RunInput:
    return run_input(schedule(name, host_experts), small_trace())


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before, files = set(threading.enumerate()), open_files()
    yield
    assert set(threading.enumerate()) == before
    assert open_files() == files


def open_files() -> int:
    """Return how many files of experts this process has open; they have no names."""
    found = [
        os.readlink(f"/proc/self/fd/{one}")
        for one in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{one}")
    ]
    return sum(one.endswith("(deleted)") and "memfd" not in one for one in found)


def executed(run: RunInput, device: Device | None = None) -> Execution:
    with open_stage(small_model(), [run.workload]) as stage:
        used = stage.device.used_bytes
        found = execute(stage, run, poison=True, keep_outputs=True)
        assert stage.device.used_bytes == used
    return found


@pytest.mark.parametrize("host_experts", [1, 5, 14, NUM_EXPERTS])
@pytest.mark.parametrize("name", SCHEDULES)
def test_reads_and_bytes_are_those_of_the_simulator_and_results_those_of_memory(name: str, host_experts: int) -> None:
    run = run_of(name, host_experts)
    found = executed(run)
    expected = run_compiled(
        run.config, run.workload, tables_of(run, found.slot_bytes), run.capacities, serial=False, rows=True
    )
    assert count_differences(found, expected, expert_tokens(run.workload)) == []
    assert expected.timeline is not None
    columns = [ROW_STEP, ROW_LAYER, ROW_EXPERT, ROW_BYTES]
    mine, theirs = (
        rows[rows[:, ROW_LANE] == DISK][:, columns] for rows in (found.timeline.rows, expected.timeline.rows)
    )
    assert mine.tolist() == theirs.tolist()  # in this very order
    assert found.bytes_read == found.counts.disk_reads * SLOT_BYTES
    # What a fixed cache holds is not asked for again, and takes no place in the host's memory.
    away = NUM_EXPERTS - (int(run.capacities.sum()) if run.schedule.cache.policy == "static" else 0)
    assert found.bytes_read == 0 or host_experts < away
    assert found.bytes_read > 0 or host_experts >= away - 1  # the one expert too many may be one that nobody uses
    memory = executed(run_of(name, None))
    assert all(torch.equal(one, other) for one, other in zip(found.outputs, memory.outputs, strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_copy_begins_when_its_expert_has_been_read_and_reads_follow_each_other(name: str) -> None:
    rows = executed(run_of(name, 3)).timeline.rows
    reads = rows[rows[:, ROW_LANE] == DISK]
    assert len(reads) > 10
    assert (reads[1:, ROW_START] >= reads[:-1, ROW_END]).all()
    copies = rows[rows[:, ROW_LANE] == H2D]
    for read in reads.tolist():
        expert = (copies[:, ROW_LAYER] == read[ROW_LAYER]) & (copies[:, ROW_EXPERT] == read[ROW_EXPERT])
        assert (copies[expert, ROW_START] >= read[ROW_END]).any()
    first = rows[:, ROW_START].min()
    for copy in copies.tolist():  # whoever the host did not hold at first was read before it was copied
        same = (reads[:, ROW_LAYER] == copy[ROW_LAYER]) & (reads[:, ROW_EXPERT] == copy[ROW_EXPERT])
        held = reads[same & (reads[:, ROW_END] <= copy[ROW_START])]
        assert len(held) or (copy[ROW_LAYER], copy[ROW_EXPERT]) in held_at_first(name), (copy, first)


def held_at_first(name: str) -> set[tuple[int, int]]:
    run = run_of(name, 3)
    keys = np.flatnonzero(fresh_state(run.config, run.workload, run.capacities).experts["in_host"]).tolist()
    assert len(keys) == 3
    return {divmod(key, 8) for key in keys}


@pytest.mark.parametrize("host_experts", [1, 4])
@pytest.mark.parametrize("name", ["every expert guessed", "guesses in pieces", "nothing is kept", "staged guesses"])
def test_with_hardly_any_buffer_to_spare_nobody_waits_for_ever(
    name: str, host_experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A demand that waits for a read, which waits for a buffer, which a guess behind the demand still needs."""
    monkeypatch.setattr(host_tier, "LEAST_SPARE", 1)
    monkeypatch.setattr("moeplan.executor.running.execute.most_reads", lambda *_: 0)
    run = run_of(name, host_experts)
    found = executed(run)
    expected = run_compiled(
        run.config, run.workload, tables_of(run, found.slot_bytes), run.capacities, serial=False, weighed=run.weighed
    )
    assert count_differences(found, expected, expert_tokens(run.workload)) == []
    memory = executed(run_of(name, None))
    assert all(torch.equal(one, other) for one, other in zip(found.outputs, memory.outputs, strict=True))


@pytest.mark.parametrize("host_experts", [1, 4])
@pytest.mark.parametrize("name", ["every expert guessed", "guesses in pieces", "nothing is kept"])
def test_the_read_of_a_guess_that_was_dropped_is_done_all_the_same(name: str, host_experts: int) -> None:
    run = run_input(schedule(name, host_experts).with_options(copy__cancel=True), small_trace())
    found = executed(run)
    assert found.bytes_read == found.counts.disk_reads * SLOT_BYTES > 0
    memory = executed(run_of(name, None))
    assert all(torch.equal(one, other) for one, other in zip(found.outputs, memory.outputs, strict=True))


def test_memory_is_what_the_schedule_names_and_one_layer_steps_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("staged guesses", 5)
    reads = most_reads(run.config, run.workload, fresh_state(run.config, run.workload, run.capacities))
    assert 2 < reads <= 8 + 2
    taken: dict[str, int] = {}
    real = CpuDevice.host_memory

    def host_memory(self: CpuDevice, num_bytes: int, *, pinned: bool, what: str) -> torch.Tensor:
        taken[what] = num_bytes
        return real(self, num_bytes, pinned=pinned, what=what)

    monkeypatch.setattr(CpuDevice, "host_memory", host_memory)
    with open_stage(small_model(), [run.workload], distinct_experts=2) as stage:
        execute(stage, run)
    assert taken == {"the store of 2 experts": 2 * SLOT_BYTES, "a host cache of 5 experts": (5 + reads) * SLOT_BYTES}


def test_a_file_without_a_name_goes_with_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_store.tempfile, "tempdir", str(tmp_path))
    run = run_of("LRU", 3)
    before = open_files()
    with open_stage(small_model(), [run.workload]) as stage:
        execute(stage, run)
        assert (list(tmp_path.iterdir()), open_files()) == ([], before + 1)
        first = stage.file("32")
        assert stage.file("32") is first and first.num_bytes == NUM_EXPERTS * SLOT_BYTES
        stage.forget("32")
        assert open_files() == before
        assert stage.file("32") is not first


def test_experts_that_share_places_have_each_others_bytes() -> None:
    device = CpuDevice()
    memory = make_store(small_model(), "32", device, num_keys=NUM_EXPERTS, distinct=2, places=6)
    assert (memory.num_keys, memory.num_places) == (NUM_EXPERTS, 6)
    file = DiskStore(make_store(small_model(), "32", device, num_keys=2), num_keys=NUM_EXPERTS, places=6)
    assert (file.num_keys, file.num_bytes) == (NUM_EXPERTS, 6 * SLOT_BYTES)
    for key in (0, 1, 7, 22, 23):
        assert torch.equal(memory.bytes_of(key), memory.bytes_of(key % 2))
        assert torch.equal(file.bytes_of(key), memory.bytes_of(key))
    assert not torch.equal(memory.bytes_of(0), memory.bytes_of(1))
    file.close()


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_disk_without_room_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    run, real = run_of("LRU", 3), os.fstatvfs

    class Full:
        f_frsize = 4096

        def __init__(self, blocks: int) -> None:
            self.f_bavail = blocks

    monkeypatch.setattr(os, "fstatvfs", lambda number: (real(number), Full(10))[1])
    with (
        open_stage(small_model(), [run.workload]) as stage,
        pytest.raises(DoesNotFit, match="has 40960 free") as caught,
    ):
        execute(stage, run)
    assert caught.value.missing_bytes == NUM_EXPERTS * SLOT_BYTES - 40960


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, DoesNotFit), (errno.EIO, InputError)])
def test_a_disk_that_fails_while_the_file_is_written(
    number: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("LRU", 3)

    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with open_stage(small_model(), [run.workload]) as stage:
        used = stage.device.used_bytes
        with pytest.raises(kind, match="disk"):
            execute(stage, run)
        assert stage.device.used_bytes == used


def test_an_absent_folder_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_store.tempfile, "tempdir", str(tmp_path / "gone"))
    run = run_of("LRU", 3)
    with open_stage(small_model(), [run.workload]) as stage, pytest.raises(InputError, match=r"gone.*set TMPDIR"):
        execute(stage, run)


@pytest.mark.parametrize("left", [0, 11])
def test_a_file_that_was_cut_short_ends_the_run(left: int) -> None:
    run = run_of("staged guesses", 3)
    with open_stage(small_model(), [run.workload]) as stage:
        used = stage.device.used_bytes
        file = stage.file("32")
        os.ftruncate(file._file.fileno(), left * SLOT_BYTES)
        with pytest.raises(
            ExecutionFailed, match=r"could not be read from disk \(the file of experts ends at byte"
        ) as caught:
            execute(stage, run)
        assert "\n" not in str(caught.value) and stage.device.used_bytes == used


def test_a_read_that_fails_in_the_middle_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run, real, done = run_of("staged guesses", 3), os.preadv, []

    def preadv(*arguments: Any) -> int:
        done.append(1)
        if len(done) > 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    with open_stage(small_model(), [run.workload]) as stage:
        used = stage.device.used_bytes
        with pytest.raises(ExecutionFailed, match=r"\(input/output error\)"):
            execute(stage, run)
        assert stage.device.used_bytes == used
        monkeypatch.setattr(os, "preadv", real)
        assert len(execute(stage, run).step_ns) == run.workload.num_steps  # the stage is still good


def test_short_reads_are_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    run, real = run_of("LRU", 3), os.preadv

    def preadv(number: int, buffers: list[memoryview], begin: int) -> int:
        return real(number, [buffers[0][:5000]], begin)

    expected = executed(run)
    monkeypatch.setattr(os, "preadv", preadv)
    found = executed(run)
    assert all(torch.equal(one, other) for one, other in zip(found.outputs, expected.outputs, strict=True))


def test_an_interrupt_ends_the_run() -> None:
    run = run_of("staged guesses", 3)

    def interrupt(done: int, total: int, note: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with open_stage(small_model(), [run.workload]) as stage, pytest.raises(KeyboardInterrupt):
        execute(stage, run, progress=interrupt)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"copy__host_experts": 0}, r"copy\.host_experts"),
        ({"copy__host_experts": 4, "kernel__miss": "cheaper"}, r"kernel\.miss"),
        ({"copy__host_experts": 4, "experts__low_bits": "4", "experts__low_rank": 1}, r"experts\.low_bits"),
    ],
)
def test_what_does_not_run_above_a_disk_is_refused(changes: dict[str, Any], field: str) -> None:
    run = run_of("LRU", 3)
    with open_stage(small_model(), [run.workload]) as stage, pytest.raises(InputError, match=field):
        execute(stage, RunInput(schedule=run.schedule.with_options(**changes), config=run.config, workload=run.workload,
                                capacities=run.capacities))  # fmt: skip
