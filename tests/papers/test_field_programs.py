"""Programs that reports name are read as the engine inside them, builds by their number, hosts by what was measured of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.papers.field.programs import built_in, engine_of
from moeplan.papers.field.rows import BUNDLED, Report
from moeplan.papers.field.setup import set_up
from moeplan.specs.machines.engines import engines

ROW = json.loads((BUNDLED / "reports.jsonl").read_text(encoding="utf-8").splitlines()[0])
GIGA = 1e9


def report(**changes: Any) -> Report:
    return Report(id="x", row=ROW | changes, folder=BUNDLED)


def engine(name: str | None, version: str | None = None) -> dict[str, Any]:
    return {"name": name, "version": version, "backend": "cuda"}


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("LM Studio", "llama.cpp"), ("llama-cpp-python", "llama.cpp"), ("llama.cpp (Vulkan, Lemonade)", "llama.cpp"),
        ("llamafile", "ik_llama.cpp"), ("TensorRT Edge-LLM", "tensorrt-llm"), ("mlx-lm", "mlx"), ("llama.cpproper", None), (None, None),
    ],
)  # fmt: skip
def test_a_program_is_the_engine_whose_kernels_it_runs(name: str | None, inside: str | None) -> None:
    found = engine_of(report(engine=engine(name)))
    assert found == (inside if inside is not None or name is not None else "generic")


def test_every_engine_is_itself_and_what_is_written_behind_it_does_not_count() -> None:
    for name in engines():
        assert engine_of(report(engine=engine(name.upper()))) == name
        assert engine_of(report(engine=engine(f"{name} (fork)"))) == name


@settings(max_examples=examples(60))
@given(st.integers(min_value=2750, max_value=12000), st.integers(min_value=2750, max_value=12000))
def test_later_builds_are_of_later_months(one: int, other: int) -> None:
    def month(build: int) -> str:
        found = built_in(report(date=None, engine=engine("llama.cpp", f"b{build} (abcdef0)")))
        assert found is not None
        return found

    low, high = sorted((one, other))
    assert month(low) <= month(high)
    assert month(low) == built_in(report(date=None, engine=engine("LM Studio", str(low))))


def test_a_build_is_of_its_month_where_the_report_can_be_of_it() -> None:
    def month(version: str | None, date: str | None, name: str = "llama.cpp") -> str | None:
        return built_in(report(date=date, engine=engine(name, version)))

    assert month("b6000", "2025-10-03") == "2025-07"
    for version in (
        "b6000",
        "b11999",
        None,
        "6000abc",
        "0.9.2",
        "build 12",
        "",
    ):  # too old, not yet built, no numbers of builds
        assert month(version, "2026-09-30") == "2026-09"
    assert month("6000", "2025-10", name="vllm") == "2025-10"
    assert month("2023", None) == "2023"
    assert month(None, None) is None


@settings(max_examples=examples(15))
@given(st.floats(min_value=1, max_value=400))
def test_no_engine_reads_more_of_a_host_than_was_measured(measured: float) -> None:
    host = {
        "cpu": "AMD Ryzen 9 5950X",
        "sockets": 1,
        "cores": 16,
        "memory": "DDR4-3200",
        "channels": 2,
        "memory_gib": 64,
    }
    told = set_up(report(placement={"kind": "cpu-moe"}, host=host | {"measured_bytes_per_s": measured * GIGA})).profile
    plain = set_up(report(placement={"kind": "cpu-moe"}, host=host)).profile
    assert told.host.cpu is not None and plain.host.cpu is not None
    reached = plain.host.cpu.memory_bytes_per_s.value
    assert told.host.cpu.memory_bytes_per_s.value == pytest.approx(min(measured * GIGA, reached))
