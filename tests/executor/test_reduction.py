"""A plan that exceeds the machine runs as far as it fits, says so, and is predicted as what ran."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from executor_stages import preset, small_model, small_trace
from moeplan.base.errors import DoesNotFit
from moeplan.base.units import MIB
from moeplan.devices.device import CpuDevice
from moeplan.devices.host_memory import available_host_bytes
from moeplan.executor.running.execute import execute, open_stage
from moeplan.executor.running.prediction import run_input
from moeplan.executor.validation import reduction
from moeplan.executor.validation.grid import Case, Shape
from moeplan.executor.validation.reduction import (
    Room,
    first_columns,
    first_layers,
    needs_of,
    reduced_to,
    room_of,
    scaled_model,
)
from moeplan.specs.models import ModelSpec
from moeplan.specs.models.load import list_models, load_model
from moeplan.specs.schedules.offload import OffloadSchedule

MODEL = small_model(num_layers=8, hidden=512, inter=256)
TRACE = small_trace(num_layers=8)
SLOT = 3 * 512 * 256 * 4


def case(schedule: OffloadSchedule, model: ModelSpec = MODEL) -> Case:
    shape = Shape(name=model.name, hidden=model.hidden_size, intermediate=model.expert_intermediate_size)
    return Case(name=schedule.name, shape=shape, schedule=schedule, group="32")


CASES = (case(preset("mixtral-offloading")), case(preset("on-demand")))


def room(memory: int, disk: int = 1 << 40, *, device: int | None = None) -> Room:
    return Room(
        device_bytes=memory if device is None else device, host_bytes=memory, disk_bytes=disk, shared=device is None
    )


def reduced(given: Room, cases: tuple[Case, ...] = CASES, model: ModelSpec = MODEL) -> reduction.Reduced:
    return reduced_to(given, model, TRACE, cases, window=6, dtype=torch.float32)


def needs(model: ModelSpec = MODEL, layers: int = 8, cases: tuple[Case, ...] = CASES) -> reduction.Needs:
    return needs_of(model, first_columns(TRACE, layers), cases, window=6, dtype=torch.float32)


@pytest.mark.parametrize("name", ["mixtral-offloading", "on-demand", "three-tiers", "pre-gated"])
def test_what_is_counted_beforehand_is_what_a_run_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = case(preset(name))
    counted = needs(cases=(one,))
    given = run_input(one.schedule, TRACE, window_steps=6)
    most, host = 0, 0
    empty, host_memory = CpuDevice.empty, CpuDevice.host_memory

    def noted(self: CpuDevice, *arguments: Any, **named: Any) -> torch.Tensor:
        nonlocal most
        found = empty(self, *arguments, **named)
        most = max(most, self.used_bytes)
        return found

    def noted_host(self: CpuDevice, num_bytes: int, **named: Any) -> torch.Tensor:
        nonlocal host
        host = max(host, num_bytes)
        return host_memory(self, num_bytes, **named)

    monkeypatch.setattr(CpuDevice, "empty", noted)
    monkeypatch.setattr(CpuDevice, "host_memory", noted_host)
    with open_stage(MODEL, [given.workload], distinct_experts=4) as stage:
        execute(stage, given)
    assert most <= counted.device_bytes <= most + 3 * SLOT  # two slots of a static cache, one for late guesses
    if one.schedule.copy.host_experts is None:
        assert (counted.store_bytes * counted.num_keys, counted.file_bytes) == (host, 0)
    else:
        assert (counted.host_bytes, counted.store_bytes, counted.file_bytes) == (host, 0, SLOT)


def test_what_fits_is_left_as_it_is() -> None:
    wanted = needs()
    found = reduced(room(wanted.total_bytes(64)))
    assert (found.model, found.trace, found.cases, found.places) == (MODEL, TRACE, CASES, None)
    assert found.to_dict() is None and found.notes() == ()


def test_first_experts_share_places_as_long_as_caches_do_not_hold_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduction, "_STORE_BYTES", 16 * SLOT)
    wanted = needs()
    found = reduced(room(wanted.total_bytes(64) - 1))
    assert (found.model, found.places) == (MODEL, 60)  # whole fours, so that every place has its own expert's bytes
    document = found.to_dict()
    assert document is not None and document["experts_in_memory"] == {"planned": 64, "run": 60}
    assert "nothing is extrapolated" not in " ".join(document["notes"])
    assert reduced(room(wanted.total_bytes(16))).places == 16
    fewer = reduced(room(wanted.total_bytes(16) - 1))
    assert (fewer.model.num_moe_layers, fewer.places) == (7, 16)


def test_then_layers_go_from_the_end_and_the_recording_with_them() -> None:
    for layers in (7, 4, 2):
        wanted = needs(first_layers(MODEL, layers), layers)
        found = reduced(room(wanted.total_bytes(8 * layers)))
        assert (found.model.num_moe_layers, found.model.num_layers) == (layers, layers)
        assert found.places is None
        assert found.trace.experts.shape == (TRACE.num_tokens, layers, 2)
        assert np.array_equal(found.trace.experts, TRACE.experts[:, :layers])
        assert found.trace.predicted is not None and found.trace.predicted.shape[1] == layers
        assert found.cases[0].schedule.cache.experts_per_layer == 3
        document = found.to_dict()
        assert document is not None and document.keys() == {"layers", "notes"}
        assert document["layers"] == {"planned": 8, "run": layers}
        assert f"the first {layers} of 8 MoE layers" in document["notes"][1]
        assert "nothing is extrapolated" in document["notes"][-1]


def test_then_widths_in_one_ratio_and_at_last_it_does_not_fit() -> None:
    half = scaled_model(first_layers(MODEL, 2), 1, 2)
    assert (half.hidden_size, half.expert_intermediate_size) == (256, 128)
    assert (half.attention.num_heads, half.attention.num_kv_heads, half.attention.head_dim) == (2, 1, 16)
    found = reduced(room(needs(half, 2).total_bytes(16)))
    assert (found.model.hidden_size, found.model.expert_intermediate_size) == (256, 128)
    document = found.to_dict()
    assert document is not None
    assert document["hidden_size"] == {"planned": 512, "run": 256}
    assert document["expert_intermediate_size"] == {"planned": 256, "run": 128}
    assert document["layers"] == {"planned": 8, "run": 2}
    assert found.cases[0].shape == dataclasses.replace(
        CASES[0].shape, name=found.model.name, hidden=256, intermediate=128
    )
    quarter = scaled_model(first_layers(MODEL, 2), 1, 4)
    least = needs(quarter, 2).total_bytes(16)
    assert reduced(room(least)).model.hidden_size == 128
    with pytest.raises(DoesNotFit, match="even with 2 layers of hidden size 128") as caught:
        reduced(room(least - 1))
    assert (caught.value.missing_bytes, caught.value.exit_status) == (1, 3)


def test_a_device_with_memory_of_its_own_is_filled_by_itself() -> None:
    wanted = needs()
    store = 64 * wanted.store_bytes
    assert reduced(room(store, device=wanted.device_bytes)).to_dict() is None
    for given in (room(store - 1, device=wanted.device_bytes), room(store, device=wanted.device_bytes - 1)):
        assert reduced(given).model.num_moe_layers < 8


def test_what_is_counted_over_all_layers_shrinks_with_them() -> None:
    schedules = (
        preset("mixtral-offloading", cache__experts_per_layer=None, cache__pooled_experts=20),
        preset("three-tiers", copy__host_experts=40),
    )
    cases = tuple(case(one) for one in schedules)
    wanted = needs(first_layers(MODEL, 4), 4, tuple(reduction._fewer(one, MODEL, 4, 8) for one in cases))
    found = reduced(room(wanted.total_bytes(32)), cases)
    assert found.model.num_moe_layers == 4
    assert found.cases[0].schedule.cache.pooled_experts == 10
    assert found.cases[1].schedule.copy.host_experts == 20


def test_a_small_disk_means_fewer_layers_too() -> None:
    cases = (case(preset("three-tiers", copy__host_experts=8)),)
    found = reduced(room(1 << 40, disk=40 * SLOT), cases)
    assert found.model.num_moe_layers == 5
    assert "of disk" in found.notes()[0]


@pytest.mark.parametrize("name", [name for name in list_models() if not load_model(name).cross_attention])
def test_every_model_can_be_cut_and_scaled(name: str) -> None:
    model = load_model(name)
    one = first_layers(model, 1)
    assert one.num_layers == model.moe_layers[0] + 1
    half = scaled_model(one, 1, 2)
    assert half.hidden_size % 64 == half.expert_intermediate_size % 64 == 0
    assert half.attention.num_heads % half.attention.num_kv_heads == 0
    ratio = half.expert_intermediate_size / half.hidden_size
    kept = abs(ratio / (model.expert_intermediate_size / model.hidden_size) - 1) < 0.1
    assert reduction._keeps_shape(model, (1, 2)) == kept == (name != "tiny-moe")  # 192 has no half that 64 divides
    assert not kept or 0.2 < half.expert_parameters / model.expert_parameters < 0.3


# --- how much memory there is -----------------------------------------------------------------------------------------


def system(root: Path, available_kib: int, groups: str, files: dict[str, dict[str, str]]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available_kib} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for folder, named in files.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, text in named.items():
            (root / folder / name).write_text(text)
    return root


def v2(limit: str, used: int, cached: int = 0) -> dict[str, str]:
    return {"memory.max": limit, "memory.current": str(used), "memory.stat": f"anon 1\ninactive_file {cached}\n"}


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/\n", {}, 4 * MIB),
        ("0::/a/b\n", {"sys/fs/cgroup/a": v2("3000000", 1000000, 500000), "sys/fs/cgroup/a/b": v2("max", 5)}, 2500000),
        ("0::/a/b\n", {"sys/fs/cgroup/a": v2("max", 5), "sys/fs/cgroup/a/b": v2("900", 1000)}, 0),
        ("0::/elsewhere\n", {"sys/fs/cgroup": v2("2000000", 500000)}, 1500000),
        ("0::/\n", {"sys/fs/cgroup": v2("99999999999", 5)}, 4 * MIB),
        ("4:cpu,memory:/x\n3:cpuset:/\n", {"sys/fs/cgroup/memory/x": {
            "memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "600", "memory.stat": "total_inactive_file 100\n"}}, 500),
        ("0::/\n", {"sys/fs/cgroup": {"memory.max": "12", "memory.current": "garbage"}}, 4 * MIB),
    ],
)  # fmt: skip
def test_memory_is_what_system_and_control_groups_leave(
    tmp_path: Path, groups: str, files: dict[str, dict[str, str]], left: int
) -> None:
    assert available_host_bytes(system(tmp_path, 4096, groups, files)) == left


def test_a_run_may_take_a_share_of_what_is_free_or_less() -> None:
    device = CpuDevice()
    most = room_of(device)
    assert most.shared and 0 < most.host_bytes < available_host_bytes() and most.device_bytes == most.host_bytes
    assert room_of(device, 10 * MIB).host_bytes == 10 * MIB
    assert room_of(device, 1 << 60).host_bytes == pytest.approx(most.host_bytes, rel=0.2)


@pytest.mark.parametrize("name", ["mixtral-offloading", "mixtral-offloading-code", "cpu-moe"])
def test_experts_that_share_places_run_with_the_bytes_they_would_have(name: str) -> None:
    given = run_input(preset(name), first_columns(TRACE, 3), window_steps=6)
    outputs = []
    for places in (None, 8):
        with open_stage(small_model(), [given.workload], distinct_experts=4, places=places) as stage:
            outputs.append(execute(stage, given, keep_outputs=True).outputs)
            assert stage.store("32").num_places == (places or 24)
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
