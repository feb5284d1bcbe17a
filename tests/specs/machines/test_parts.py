"""Machines made of parts: the words people use, what goes together, and the profile that comes out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError, UnknownName
from moeplan.base.units import GIB, GIGA
from moeplan.calibrate.costs.engine_costs import EngineCosts
from moeplan.calibrate.costs.gpu.costs import KernelCosts
from moeplan.calibrate.costs.load import load_costs
from moeplan.specs.catalog import PARTS_FOLDER
from moeplan.specs.machines.catalogue import architectures, cpu_parts, gpu_parts
from moeplan.specs.machines.compose import compose, compose_text
from moeplan.specs.machines.detect import detect
from moeplan.specs.machines.engines import BACKENDS, engines, load_engine, parameter_names, rates
from moeplan.specs.machines.load import load_machine
from moeplan.specs.machines.notation import describe_parts, link_of, parse_parts
from moeplan.specs.machines.parts import VECTOR_UNITS, pcie_bytes_per_s
from moeplan.specs.machines.profile import profile_to_json
from moeplan.specs.machines.profile_file import profile_from_json
from moeplan.specs.models import weight_format
from moeplan.specs.models.load import load_model


def _table(file: str) -> dict[str, Any]:
    rows: dict[str, Any] = json.loads((PARTS_FOLDER / f"{file}.json").read_text(encoding="utf-8"))
    return rows


DESKTOP = "rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB"


def test_a_desktop_is_its_parts_figures() -> None:
    profile = compose_text(DESKTOP)
    assert profile.name == DESKTOP
    assert profile.device.memory_bytes_per_s.value == 1008e9
    assert profile.memory_bytes == 24 * GIB
    assert profile.host.memory_bytes.value == 64 * GIB
    share = rates("llama.cpp", "cuda")["desktop_memory_share"].value
    assert profile.host.cpu is not None
    assert profile.host.cpu.memory_bytes_per_s.value == pytest.approx(6000e6 * 8 * 2 * share)
    assert profile.host_to_device.pinned_bytes_per_s.value < pcie_bytes_per_s("4.0x16") == pytest.approx(31.504e9)
    assert profile.engine is not None and (profile.engine.name, profile.engine.backend) == ("llama.cpp", "cuda")
    assert "assumed" not in profile.description


def test_what_is_not_stated_is_said() -> None:
    assert "assumed because not stated: a ryzen-7-7700x, ddr5-5600x2" in compose_text("rtx-3060").description
    assert "ddr4-3200x8, host memory of 64 GiB" in compose_text("rtx-3090 + epyc-7302").description


def test_a_profile_of_parts_is_written_and_read_alike() -> None:
    profile = compose_text("2 x epyc-9355 + ddr5-6400x24:768GiB + disk:7GB/s", "ik_llama.cpp")
    assert profile_from_json(profile_to_json(profile)) == profile
    assert profile.device.kind == "cpu" and profile.disk is not None


def test_unified_memory_is_one_pool() -> None:
    profile = compose_text("apple-m4-max")
    assert profile.device.unified_memory
    assert profile.memory_bytes < profile.host.memory_bytes.value == 128 * GIB
    assert profile.engine is not None and profile.engine.backend == "metal"


@given(st.sampled_from(sorted(gpu_parts())), st.sampled_from(sorted(cpu_parts())), st.sampled_from(sorted(engines())))
def test_every_combination_is_a_machine_or_one_line(gpu: str, cpu: str, engine: str) -> None:
    try:
        profile = compose_text(f"{gpu} + {cpu}", engine)
    except InputError as error:
        assert "backend" in str(error) or ("of its own" in str(error) and gpu_parts()[gpu].host not in (None, cpu))
        return
    costs = load_costs(profile, load_model("tiny-moe"))
    assert isinstance(
        costs, EngineCosts | KernelCosts
    )  # the latter where the kernels of a datacentre card are measured
    assert 0 < costs.dense_layer(0, 1, 16).seconds < 1
    assert all(constant.citation for _, constant in profile.constants())


def test_parts_are_plausible() -> None:
    for name, part in gpu_parts().items():
        assert 1 <= part.memory_bytes / GIB <= 1024 and 50e9 < part.bandwidth_bytes_per_s < 1e13, name
        assert 1.5e12 < part.float16_flops_per_s < 1e16 and part.source and part.backend in BACKENDS, name
        assert part.unified_memory == (part.pcie is None), name
    for name, cpu in cpu_parts().items():
        assert 4 <= cpu.cores <= 256 and 1.5 < cpu.all_core_ghz < 6 and cpu.vector in VECTOR_UNITS and cpu.source, name
    assert len({part.name for part in gpu_parts().values()}) >= 40 and len(cpu_parts()) >= 25


def test_bandwidth_and_peak_of_every_card_follow_from_its_bus_units_and_clock() -> None:
    unpublished = {
        "a10g",
        "h20",
        "h20-141gb",
        "b100-sxm",
        "snapdragon-x-elite",
    }  # rates cut or sums only: no clock to derive from
    used = set()
    for name, part in gpu_parts().items():
        assert part.memory_bus_bits is not None and part.memory_gbit_per_s is not None, name
        wires = part.memory_bus_bits * part.memory_gbit_per_s * GIGA / 8
        assert wires == pytest.approx(part.bandwidth_bytes_per_s, rel=0.01), name
        if part.name in unpublished:
            assert part.architecture is None or part.units is None
            continue
        assert part.architecture is not None and part.units is not None and part.boost_ghz is not None, name
        used.add(part.architecture)
        unit = architectures()[part.architecture]
        peak = part.units * part.boost_ghz * GIGA * unit["float16_per_unit_cycle"]
        assert peak == pytest.approx(part.float16_flops_per_s, rel=0.015), name
        if part.float8_flops_per_s is not None:
            assert part.float8_flops_per_s == pytest.approx(2 * part.float16_flops_per_s, rel=0.015), name
        if part.pcie is not None:
            older = {"radeon-vii": "3.0", "arc-b570": "4.0", "arc-b580": "4.0"} | dict.fromkeys(
                ("radeon-pro-w6800x", "radeon-pro-w6800x-duo", "radeon-pro-w6900x"), "3.0"
            )
            assert part.pcie.split("x")[0] == older.get(part.name, unit["pcie"]), name
    assert used == set(architectures())


def test_sums_of_32_bits_are_at_half_rate_on_geforce_and_nowhere_else() -> None:
    for name, row in _table("gpus").items():
        if "architecture" not in row or architectures()[row["architecture"]]["float16_per_unit_cycle"] not in (
            512,
            1024,
        ):
            continue
        if row["backend"] != "cuda" or row["architecture"] == "volta":
            continue
        consumer = re.fullmatch(r"rtx-[2-5]0[5-9]0.*", name) is not None
        assert (architectures()[row["architecture"]]["float16_per_unit_cycle"] == 512) == (
            consumer or name in {"l20", "l40"}
        ), name


def test_memory_of_every_card_is_a_whole_number_of_chips() -> None:
    for name, row in _table("gpus").items():
        if row["pcie"] is not None and row["memory_bus_bits"] <= 512:  # GDDR: a chip every 32 bits, or two
            assert row["memory_gib"] / (row["memory_bus_bits"] / 32) in {0.5, 1, 1.5, 2, 3, 4, 6}, name
        assert 0.9 < row.get("usable_gib", row["memory_gib"]) / row["memory_gib"] <= 1, name


def test_no_two_parts_share_a_name() -> None:
    for table in ("gpus", "cpus"):
        rows = _table(table)
        names = [name for name, row in rows.items() for name in (name, *row.get("aliases", ()))]
        assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rtx-4091", "rtx-4090"), ("rtx-4090 + ryzen-9-7950z", "ryzen-9-7950x"), ("rtx-4090 + i9-13900k + i9-12900k", "named twice"),
        ("rtx-4090 + ryzen-9-7950x + ddr4-3200x2:64GiB", "takes ddr5"), ("rtx-4090 + ryzen-9-7950x + ddr5-6000x4:64GiB", "2 channels"),
        ("rtx-2080 + pcie-5.0x16", "PCIe 3"), ("gb10 + pcie-4.0x16", "shares"), ("rtx-4090 + ", "empty"), ("17 x rtx-3090", "1 to 16"),
        ("2 x rtx-3090 + rx-7900-xtx", "two makers"),
        ("2 x gb10", "only card"), ("rtx-3090 + nvlink:56GB/s", "joins several"), ("pcie-3.0x4 + rtx-3090 + rtx-3060", "behind its card"),
        ("rtx-3090 + pcie-4.0x8 + pcie-4.0x4 + rtx-3060", "named twice"), ("rtx-3060 + rtx-3090 + pcie-5.0x16", "PCIe 4.0"),
        ("rtx-4090 + ddr4-9000x2", "1600 to 5400"), ("3 x epyc-9654", "at most 2"), ("rtx-4060 + pcie-4.0x16", "8 lanes"),
        ("RTX 4090 32GB", "not sold with 32 GB"),
        ("rtx-5090 + epyc-7302 + pcie-5.0x16", "PCIe 4.0"), ("ddr5-6000x2:64GiB", "neither"),
        ("card:memory=24GiB,bandwidth=936GB/s", "fp16"), ("card:memory=24GiB,speed=3", "speed"),
        ("card:memory=24GiB,bandwidth=0GB/s,fp16=71TFLOPS", "above zero"), ("rtx-4090 + pcie-9x16", "generation"),
    ],
)  # fmt: skip
def test_impossible_machines_are_one_line(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        parse_parts(text)
    assert "\n" not in str(error.value)


@given(st.sampled_from(sorted(cpu_parts())), st.sampled_from(["ddr3-1866", "ddr4-3200", "ddr5-4800", "lpddr5x-8533"]), st.integers(1, 32),
       st.integers(1, 9))  # fmt: skip
def test_memory_that_a_processor_does_not_take_is_refused(name: str, memory: str, channels: int, sockets: int) -> None:
    cpu = cpu_parts()[name]
    fits = (
        memory.split("-")[0] in (cpu.memory, cpu.also) and channels <= cpu.channels * sockets and sockets <= cpu.sockets
    )
    try:
        parse_parts(f"{sockets} x {name} + {memory}x{channels}:64GiB")
    except InputError as error:
        assert not fits and "\n" not in str(error)
    else:
        assert fits


@given(
    st.sampled_from(sorted(gpu_parts())),
    st.sampled_from(sorted(cpu_parts())),
    st.integers(3, 6),
    st.sampled_from([1, 2, 4, 8, 16]),
)
def test_a_slot_is_never_faster_than_card_or_processor(name: str, processor: str, generation: int, lanes: int) -> None:
    gpu, cpu = gpu_parts()[name], cpu_parts()[processor]
    if gpu.unified_memory:
        return
    assert gpu.pcie is not None and cpu.pcie is not None
    fits = generation <= int(gpu.pcie[0]) and generation <= int(cpu.pcie[0]) and lanes <= int(gpu.pcie.split("x")[1])
    try:
        parts = parse_parts(f"{name} + {processor} + pcie-{generation}.0x{lanes}")
    except InputError as error:
        assert not fits and "pcie" in str(error)
    else:
        assert fits and link_of(parts) == f"{generation}.0x{lanes}"
    slower = min(int(gpu.pcie[0]), int(cpu.pcie[0]))
    assert link_of(parse_parts(f"{name} + {processor}")) == f"{slower}.0x{gpu.pcie.split('x')[1]}"


def test_figures_of_processors_agree() -> None:
    most = {"ddr3": 1866, "ddr4": 3200, "lpddr4": 3200, "ddr5": 6400, "lpddr5": 6400, "lpddr5x": 9600, "lpddr4x": 4267}
    for name, cpu in cpu_parts().items():
        assert cpu.base_ghz is not None and cpu.boost_ghz is not None and cpu.pcie is not None, name
        # Skylake's and Cascade Lake's 512-bit units pull the clock below the base.
        lowest = 0.9 * cpu.base_ghz if cpu.vector.startswith("avx512") and cpu.memory == "ddr4" else cpu.base_ghz
        assert lowest <= cpu.all_core_ghz <= cpu.boost_ghz, name
        assert 0 <= cpu.efficient_cores < cpu.cores and 0 < cpu.efficient_share <= 1, name
        assert cpu.large_cores(cpu.cores) <= cpu.cores and cpu.large_cores(1) == 1, name
        assert cpu.max_mt_per_s <= most[cpu.memory] and (cpu.also is None) == (cpu.also_mt_per_s is None), name
        assert cpu.channels in (1, 2, 3, 4, 6, 8, 12, 16) and cpu.sockets in (1, 2, 4, 8), name
        if cpu.vector == "amx":
            assert cpu.memory == "ddr5" and cpu.pcie == "5.0", name
        if (
            re.fullmatch(r"ryzen-[579]-[789][0-9]{3}(x|f|g|x3d)?|threadripper-.*|epyc-.*", name)
            and cpu.memory == "ddr5"
        ):
            assert cpu.vector.startswith("avx512-vnni"), name


def test_small_cores_and_limits_count() -> None:
    def cores_rate(text: str) -> float:
        cpu = compose_text(text).host.cpu
        assert cpu is not None
        return cpu.flops_per_s.value

    large, small = cpu_parts()["core-i9-13900k"], cpu_parts()["core-i9-12900k"]
    ratio = (
        (8 + 16 * large.efficient_share) * large.all_core_ghz / ((8 + 8 * small.efficient_share) * small.all_core_ghz)
    )
    assert cores_rate("4090 + i9-13900k") / cores_rate("4090 + i9-12900k") == pytest.approx(ratio)

    def host_rate(text: str) -> float:
        cpu = compose_text(text).host.cpu
        assert cpu is not None
        return cpu.memory_bytes_per_s.value

    share = rates("llama.cpp", "cuda")["chiplet_share"].value
    capped, whole = (host_rate(f"4090 + {cpu} + ddr4-3200x8:256GiB") for cpu in ("epyc-7282", "epyc-7302"))
    assert capped == pytest.approx(85.3e9 * share) and capped < whole


def test_a_part_of_ones_own() -> None:
    parts = parse_parts("mine:memory=24GiB,bandwidth=936GB/s,fp16=71TFLOPS,pcie=3.0x8 + ryzen-5-5600x")
    assert parts.gpu is not None and parts.gpu.float16_flops_per_s == 71e12
    assert compose(parts, load_engine("llama.cpp")).host_to_device.pinned_bytes_per_s.value < pcie_bytes_per_s("3.0x8")


def test_parts_are_described_as_they_are_written() -> None:
    text = "rtx-3090 + 2 x epyc-9135 + ddr5-6400x24:768GiB + pcie-3.0x8 + disk:7GB/s"
    assert describe_parts(parse_parts(text)) == text
    assert parse_parts(describe_parts(parse_parts(text))) == parse_parts(text)


def test_whole_machines_keep_their_own_software() -> None:
    assert load_machine("rtx-4090").engine is None  # a bundled machine of that name
    assert load_machine("rtx-4090", "llama.cpp").engine is not None  # the card, made of parts
    assert load_machine("rtx-4070").engine is not None
    with pytest.raises(UnknownName, match="rtx-5090"):
        load_machine("rtx-5091")


def test_engines_have_every_constant_on_every_backend() -> None:
    for engine in engines().values():
        assert engine.source and engine.backends
        for backend in engine.backends:
            found = rates(engine.name, backend)
            assert all(found[name].value > 0 and found[name].relative_uncertainty >= 0 for name in parameter_names())


def test_uploads_start_where_engines_start_them() -> None:
    assert load_engine("llama.cpp").upload_from(128, 8) == 32
    assert load_engine("ik_llama.cpp").upload_from(128, 8) == 512
    assert load_engine("vllm").upload_from(128, 8) is None


def test_detection_reads_what_linux_says(tmp_path: Path) -> None:
    cores = "\n".join(
        f"processor\t: {n}\nmodel name\t: AMD Ryzen 9 7950X 16-Core Processor\nphysical id\t: 0\ncore id\t: {n}\n"
        for n in range(16)
    )
    (tmp_path / "cpuinfo").write_text(cores, encoding="utf-8")
    (tmp_path / "meminfo").write_text("MemTotal:       65536000 kB\n", encoding="utf-8")
    seen = detect(tmp_path)
    assert seen.parts.cpu is not None and seen.parts.cpu.name == "ryzen-9-7950x"
    assert seen.parts.memory is not None and seen.parts.memory.capacity_bytes == 65536000 * 1024
    assert any("disk" in line for line in seen.unseen)


def test_costs_move_with_what_they_are_made_of() -> None:
    model, fmt = load_model("qwen3-30b-a3b"), weight_format("Q4_K_M")
    fast, slow = (load_costs(compose_text(text), model) for text in ("rtx-5090", "rtx-3060"))
    assert fast.grouped_item(1, fmt).seconds < fast.grouped_item(512, fmt).seconds < slow.grouped_item(512, fmt).seconds
    few, many = (load_costs(compose_text(f"rtx-4090 + epyc-9355 + ddr5-6400x{n}:384GiB"), model) for n in (6, 12))
    assert few.cpu_expert(1, fmt).seconds > many.cpu_expert(1, fmt).seconds
    assert fast.dense_layer(0, 1, 32_768).seconds > fast.dense_layer(0, 1, 16).seconds


def test_the_bundled_tables_are_plain_json() -> None:
    for file in ("gpus", "cpus", "architectures"):
        text = (PARTS_FOLDER / f"{file}.json").read_text(encoding="utf-8")
        assert len(json.loads(text)) == text.count("\n") - 2  # one line a part, none twice
