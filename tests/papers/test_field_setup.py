"""What reports state is read as it is meant: builds, backends, threads, disks, caches, prompts that are not stated."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moeplan.papers.field.machine import NotExpressible
from moeplan.papers.field.rows import BUNDLED, Report
from moeplan.papers.field.setup import CACHE_STEPS, DECODE_STEPS, set_up

ROW = json.loads((BUNDLED / "reports.jsonl").read_text(encoding="utf-8").splitlines()[0])
HOST = {"cpu": "AMD Ryzen 9 5950X", "sockets": 1, "cores": 16, "memory": "DDR4-3200", "channels": 2, "memory_gib": 64}


def report(**changes: Any) -> Report:
    return Report(id="x", row=ROW | changes, folder=BUNDLED)


def test_the_month_of_a_build_counts_as_date_or_version() -> None:
    def layer(**changes: Any) -> float:
        engine = set_up(report(**changes)).profile.engine
        assert engine is not None
        return engine.layer_s.value

    old = {"name": "llama.cpp", "version": "2023", "backend": "cuda"}
    assert layer(engine=old) == layer(date="2024-01") > layer(date="2025-01") > layer() > layer(date="2025-11")
    assert layer(engine=old | {"version": "b6918"}) == layer(date="2025-11")


def test_a_backend_that_no_card_of_its_maker_runs_is_the_cards_own() -> None:
    card = [{"name": "AMD Radeon RX 7900 XT", "memory_gib": 20, "count": 1, "pcie": None}]
    found = set_up(report(gpus=card))
    assert found.profile.engine is not None and found.profile.engine.backend == "rocm"
    assert any("engine.backend" in line for line in found.assumed)
    vulkan = set_up(report(gpus=card, engine={"name": "llama.cpp", "version": None, "backend": "vulkan"}))
    assert vulkan.profile.engine is not None and vulkan.profile.engine.backend == "vulkan"


def test_threads_are_read_where_they_are_stated() -> None:
    def flops(note: str) -> float:
        found = set_up(report(placement={"kind": "cpu-moe"}, host=HOST, note=note)).profile
        assert found.host.cpu is not None
        return found.host.cpu.flops_per_s.value

    assert flops("8 threads") == pytest.approx(flops("all of them") / 2)


def test_caches_run_until_their_hits_settle() -> None:
    cache = {"kind": "expert-cache", "cache_fraction": 0.25}
    assert set_up(report(placement=cache)).trace.num_tokens == CACHE_STEPS > DECODE_STEPS
    assert set_up(report(placement=cache, workload=ROW["workload"] | {"generated_tokens": 40})).trace.num_tokens == 40
    assert set_up(report()).trace.num_tokens == DECODE_STEPS


def test_a_disk_below_cores_is_read_from() -> None:
    cores = {"gpus": [], "host": HOST, "engine": {"name": "colibri", "version": None, "backend": "cpu"}}
    disk = {"kind": "expert-cache", "tier": "disk", "cold": "read from disk, computed on the cores"}
    away = set_up(report(placement=disk, disk={"read_bytes_per_s": 2.5e9}, **cores))
    assert away.schedule.copy.host_experts is not None and away.schedule.kernel.miss == "fetch"
    assert set_up(report(placement={"kind": "cpu"}, **cores)).schedule.name == "resident"


def test_whole_layers_move_with_what_surrounds_experts_and_only_experts_that_are_called() -> None:
    fetch = {"kind": "fetch", "whole_layers": True}
    deepspeed = {"name": "deepspeed", "version": None, "backend": "cuda"}
    qwen, mixtral = (
        set_up(report(placement=fetch, engine=deepspeed, model=name)) for name in ("qwen3-30b-a3b", "mixtral-8x7b")
    )
    assert (
        qwen.schedule.predictor.kind != mixtral.schedule.predictor.kind or qwen.schedule.name != mixtral.schedule.name
    )
    still = set_up(report(placement={"kind": "fetch"}, engine=deepspeed))
    assert qwen.profile.engine is not None and still.profile.engine is not None
    assert qwen.profile.engine.layer_s.value > 1.5 * still.profile.engine.layer_s.value


def test_an_unstated_prompt_fills_the_passes_that_are_asked_for() -> None:
    found = set_up(
        report(metric="prefill_tokens_per_s", workload=ROW["workload"] | {"prompt_tokens": None, "ubatch": 2048})
    )
    assert found.trace.num_tokens == 2048


def test_layers_on_the_cores_are_counted_from_either_side() -> None:
    def name(**placement: Any) -> str:
        return set_up(report(placement=placement, host=HOST)).schedule.name

    assert name(kind="layers", gpu_layers=40) == name(kind="n-cpu-moe", cpu_layers=8)
    assert name(kind="layers", gpu_layers=99) == name(kind="n-cpu-moe", cpu_layers=0) == name(kind="gpu") == "resident"
    assert name(kind="layers", gpu_layers=0) == name(kind="cpu-moe")
    small = [{"name": "NVIDIA GeForce RTX 3060", "memory_gib": 12, "count": 1, "pcie": None}]
    found = set_up(report(placement={"kind": "n-cpu-moe"}, host=HOST, gpus=small))
    assert found.schedule.name.startswith("n-cpu-moe") and any("cpu_layers" in line for line in found.assumed)


def test_a_format_of_no_known_name_counts_by_its_stated_size() -> None:
    odd = {"experts": "EXL9-fancy", "dense": None, "bits_per_weight": 4.0, "file_bytes": None}
    found = set_up(report(quant=odd))
    assert (found.model.native_bits, found.dense_format.name) == ("4bpw", "4bpw")
    assert any("by its stated size" in line for line in found.assumed)
    with pytest.raises(NotExpressible, match="EXL9-fancy"):
        set_up(report(quant=odd | {"bits_per_weight": None}))


def test_a_configuration_that_is_not_beside_the_reports_may_be_a_bundled_one() -> None:
    assert set_up(report(model="configs/qwen3-30b-a3b.json")).model.name == "qwen3-30b-a3b"
    assert set_up(report(model="configs/deepseek-r1.json")).model.num_experts == 256
    with pytest.raises(NotExpressible, match="not beside the reports"):
        set_up(report(model="configs/no-such.json"))
