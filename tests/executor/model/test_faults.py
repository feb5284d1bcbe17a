"""A real model's faults: damaged checkpoints, full disks, damaged stores, Ctrl-C. One error with one line, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moeplan.api.model_folder import model_in
from moeplan.api.model_validation import validate_checkpoint
from moeplan.api.run import run
from moeplan.base.errors import DoesNotFit, InputError, MoeplanError
from moeplan.devices.stores import disk
from moeplan.executor.model import needs
from moeplan.executor.model.loading.store import CheckedFile
from moeplan.executor.model.session import Loaded, open_model, run_model
from moeplan.executor.running.failures import ExecutionFailed
from moeplan.specs.machines.load import load_machine
from moeplan.specs.models import ModelSpec
from moeplan.specs.provenance import made_of
from moeplan.specs.schedules.offload import OffloadSchedule

pytest.importorskip("transformers")
from emit_plans import offload_plan
from tiny_models import build, save

PROMPT = [list(b"def main():")]
MEMORY = OffloadSchedule(name="test").with_options(
    cache__policy="lru", cache__experts_per_layer=3, experts__bits="32", predictor__kind="next-gate", predictor__staging=2,
    kernel__grouping="per-expert",
)  # fmt: skip
DISK = MEMORY.with_options(copy__host_experts=6)
_SOON_S = 20.0


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """No thread, no open file without a name, and no file in the folder of stores outlive a fault; threads of torch stay."""
    threads, files, cores = set(threading.enumerate()), unnamed_files(), torch.get_num_threads()
    yield
    torch.set_num_threads(cores)
    for thread in set(threading.enumerate()) - threads:
        thread.join(_SOON_S)  # a pool that transformers loads with ends a little after its last task
    assert set(threading.enumerate()) == threads
    assert unnamed_files() == files
    assert not (tmp_path / "stores").exists() or not any((tmp_path / "stores").iterdir())


def unnamed_files() -> int:
    """How many files of experts this process has open."""
    found = 0
    for one in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{one}")
        except OSError:
            continue
        found += target.endswith("(deleted)") and "memfd" not in target
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several shards."""
    return save(build("mixtral"), tmp_path_factory.mktemp("mixtral"), max_shard_size="300KB")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    mine = tmp_path / "checkpoint"
    mine.mkdir()
    for path in folder.iterdir():
        (mine / path.name).write_bytes(path.read_bytes())
    return mine


@pytest.fixture
def loaded(folder: Path, tmp_path: Path) -> Iterator[Loaded]:
    (tmp_path / "stores").mkdir()
    with open_model(folder, store_folder=tmp_path / "stores") as found:
        yield found


def one_line(error: MoeplanError) -> str:
    said = str(error)
    assert said and "\n" not in said
    return said


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _cut(folder: Path) -> None:
    path = shards(folder)[-1]
    path.write_bytes(path.read_bytes()[:-100])


def _cut_in_the_header(folder: Path) -> None:
    path = shards(folder)[0]
    path.write_bytes(path.read_bytes()[:40])


def _remove(folder: Path) -> None:
    shards(folder)[1].unlink()


def _header_only(folder: Path) -> None:
    path = shards(folder)[0]
    held = path.read_bytes()
    path.write_bytes(held[: 8 + int.from_bytes(held[:8], "little")])


@pytest.mark.parametrize("damage", [_cut, _cut_in_the_header, _remove, _header_only])
def test_a_damaged_checkpoint_is_refused_before_anything_is_loaded(
    damage: Callable[[Path], None], copied: Path
) -> None:
    assert len(shards(copied)) > 2
    damage(copied)
    with pytest.raises(InputError) as error:
        open_model(copied)
    assert error.value.exit_status == 2
    one_line(error.value)


@pytest.mark.parametrize("name", ["num_experts", "hidden_size", "top_k"])
def test_a_plan_for_another_model_is_refused_before_anything_is_loaded(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeplan.executor.model import session

    spec = model_in(folder)
    other = dataclasses.replace(spec, name="other", **{name: getattr(spec, name) + 1})
    plan, prompt = tmp_path / "plan.json", tmp_path / "prompt.txt"
    prompt.write_bytes(b"It was the best of times, it was the worst of times.")
    monkeypatch.setattr(session, "assemble", None)
    asked: dict[str, Any] = {"prompts": [prompt], "max_new_tokens": 2}

    def planned_for(model: ModelSpec) -> Path:
        document = offload_plan(model, cache__policy="lru", cache__experts_per_layer=3, experts__bits="32")
        document |= made_of(model, load_machine("t4"))
        document["provenance"]["memory_bytes"] = None
        plan.write_text(json.dumps(document))
        return plan

    assert run(folder, plan=planned_for(spec), dry_run=True, **asked).memory
    planned_for(other)
    for call in (lambda: run(folder, plan=plan, **asked), lambda: validate_checkpoint(plan, folder, **asked)):
        with pytest.raises(InputError) as error:
            call()
        assert error.value.exit_status == 2
        assert "made for other" in one_line(error.value) and name in str(error.value)


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    save(AutoModelForCausalLM.from_config(config), tmp_path / "dense")
    with pytest.raises(InputError) as error:
        open_model(tmp_path / "dense")
    one_line(error.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_while_the_store_is_built(
    number: int, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = CheckedFile._write

    def full(self: Any, source: Any) -> None:
        self._file.write(source.bytes_of(0).numpy().data)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(CheckedFile, "_write", full)
    with pytest.raises(DoesNotFit) as error:
        run_model(loaded, DISK, PROMPT, max_new_tokens=2)
    assert error.value.exit_status == 3
    assert "full" in one_line(error.value)
    monkeypatch.setattr(CheckedFile, "_write", written)
    assert (
        run_model(loaded, DISK, PROMPT, max_new_tokens=2).counts.disk_reads > 0
    )  # nothing half-made stands in the way


def test_a_disk_with_too_little_room_is_refused_before_it_is_written(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fstatvfs
    monkeypatch.setattr(disk.os, "fstatvfs", lambda number: _Room(real(number)))
    with pytest.raises(DoesNotFit, match="free"):
        run_model(loaded, DISK, PROMPT, max_new_tokens=2)


class _Room:
    """A file system with a single free block."""

    f_bavail = 1

    def __init__(self, real: os.statvfs_result) -> None:
        self.f_frsize = real.f_frsize


def test_too_little_memory_is_refused_with_the_bytes_before_a_store_is_made(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "available_host_bytes", lambda: 1 << 16)
    with pytest.raises(DoesNotFit, match="bytes") as error:
        run_model(loaded, MEMORY, PROMPT, max_new_tokens=2)
    assert error.value.exit_status == 3
    assert not loaded._stores


def test_a_store_that_changed_on_disk_ends_the_run(loaded: Loaded) -> None:
    store = loaded.store("32", on_disk=True)
    assert isinstance(store, CheckedFile)
    used = loaded.device.used_bytes
    for key in range(store.num_keys):
        os.pwrite(store._file.fileno(), b"\x7f", key * store.slot_bytes + 5)
    with pytest.raises(ExecutionFailed, match="not what was written") as error:
        run_model(loaded, DISK, PROMPT, max_new_tokens=4)
    assert error.value.exit_status == 2
    one_line(error.value)
    assert loaded.device.used_bytes == used


@pytest.mark.parametrize("schedule", [MEMORY, DISK], ids=["memory", "disk"])
def test_ctrl_c_in_the_middle_leaves_a_model_that_runs_again(schedule: OffloadSchedule, loaded: Loaded) -> None:
    expected = run_model(loaded, schedule, PROMPT, max_new_tokens=4).tokens
    used = loaded.device.used_bytes

    def interrupt(_: int, __: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_model(loaded, schedule, PROMPT, max_new_tokens=4, heard=interrupt)
    assert loaded.device.used_bytes == used
    assert all(not layer.router._forward_hooks for layer in loaded.assembled.layers)
    assert run_model(loaded, schedule, PROMPT, max_new_tokens=4).tokens == expected
