"""The kernel benchmark: how targets are judged, and, in long runs, a whole dry run of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmark_modules import ROOT, benchmark_module

LONG = os.environ.get("MOEPLAN_LONG", "") not in ("", "0")


@pytest.fixture(scope="module")
def benchmark():
    return benchmark_module("kernels")


def entry(name, kernel, regime, median_s, *, weights="16", rows=4096, **figures):
    found = {"name": name, "kernel": kernel, "weights": weights, "regime": regime, "median_s": median_s, "spread": 0.0}
    return {**found, "most_rows_of_an_expert": rows, **figures}


MEASURED = [
    entry("a", "grouped_down", "compute", 2.0, fraction_of_cublas=0.5),
    entry("a", "grouped_down", "compute", 1.0, fraction_of_cublas=0.9),  # found by a search: this one counts
    entry("b", "grouped_gate_up", "compute", 1.0, fraction_of_cublas=0.86),
    entry("c", "grouped_down", "memory", 1.0, rows=2, fraction_of_copy=0.79),
    entry("d", "dequant_down", "memory", 1.0, weights="4", rows=16, fraction_of_copy=0.7),
    entry("e", "dequant_down", "memory", 1.0, weights="4", rows=17, fraction_of_copy=0.1),  # too many rows to count
    entry("f", "dequant_down", "memory", 1.0, weights="3", rows=1, fraction_of_copy=0.1),  # no target for 3 bits
]


def test_a_target_is_its_worst_case_at_its_best(benchmark):
    found = benchmark.targets(MEASURED, dry=False)
    assert [(target["target"], target["got"], target["met"]) for target in found] == [
        (0.85, 0.86, True),
        (0.80, 0.79, False),
        (0.70, 0.7, True),
    ]
    assert found[0]["cases"] == {"a": 0.9, "b": 0.86}


def test_what_was_not_measured_is_neither_met_nor_missed(benchmark):
    assert [target["met"] for target in benchmark.targets(MEASURED, dry=True)] == [None, None, None]
    assert [(target["met"], target["got"]) for target in benchmark.targets([], dry=False)] == [(None, None)] * 3


def test_wrong_kernels_come_first_in_the_table(benchmark):
    checks = [{"name": "x", "passed": False, "worst_ratio": 3.0}, {"name": "y", "passed": True, "worst_ratio": 0.5}]
    parts = {"a case": {"checks": checks, "measurements": MEASURED[:1]}, "ceilings": {"copy_bytes_per_s": 1.0}}
    document = {"parts": parts, "targets": benchmark.targets(MEASURED, dry=False)}
    lines = benchmark.table(document).splitlines()
    assert lines[0] == "WRONG x: 3 × its bound"
    assert lines[1].split() == ["2000000.0", "µs", "±", "0%", "cublas", "50%", "a"]
    assert lines[3] == "MISSED: grouped GEMM against the copy bandwidth where weights bind, goal 80%, worst case 79.0%"


@pytest.mark.skipif(not LONG, reason="half a minute of interpreting; set MOEPLAN_LONG=1")
def test_a_dry_run_writes_the_whole_document(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.kernels", "--out", str(tmp_path), "--dry"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "kernels.json").read_text())
    assert document["dry"] and document["stage"] == "kernels"
    benchmark = benchmark_module("kernels")
    checks = benchmark.checks(document["parts"])
    assert len(checks) == 14 + 2 and all(check["passed"] for check in checks)
    assert len(benchmark.measurements(document["parts"])) == 14 + 6
    assert document["complete"] and document["pending"] == [] and document["failures"] == {}
    assert {target["met"] for target in document["targets"]} == {None}
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.json"]
