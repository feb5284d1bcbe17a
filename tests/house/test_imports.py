"""Who imports what: torch stays in its rooms, numba in `jit`, and the measuring half needs neither pydantic nor SimPy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from house import imported, modules

HEAVY = {"torch", "triton", "transformers"}
# Rooms and leaf modules that may import them. That planning and simulating reach none of these modules, not even through
# the light half of `calibrate`, is checked by import-linter and below.
MAY_BE_HEAVY = (
    "executor/*/*.py",
    "executor/*/*/*.py",
    "kernels/*.py",
    "calibrate/*/*.py",
    "calibrate/*.py",
    "devices/*.py",
    "devices/*/*.py",
    "traces/record*.py",
    "traces/readers/files/torch_file.py",
)
ROOMS = (
    "api",
    "base",
    "devices",
    "sim",
    "planner",
    "specs",
    "traces",
    "calibrate",
    "kernels",
    "executor",
    "reports",
    "cli",
    "catalog",
    "commands",
    "papers",
    "studies",
)
# What a GPU machine without a network may lack while it measures and executes.
ABSENT = ("numba", "plotly", "pyarrow", "pydantic", "rich", "safetensors", "simpy", "typer", "yaml")
MEASURING = (
    "specs.models",
    "specs.schedules.offload",
    "specs.schedules.presets",
    "specs.machines.profile",
    "base.errors",
    "base.units",
    "base.jit",
    "calibrate.costs.cost_model",
    "sim.policies.offload",
)


def test_torch_is_imported_only_where_it_may() -> None:
    found = [
        f"{path}:{line} imports {name}"
        for path, tree in modules().items()
        if not any(path.match(pattern) for pattern in MAY_BE_HEAVY)
        for line, name in imported(tree)
        if name in HEAVY
    ]
    assert found == []


def test_numba_is_imported_only_by_jit_its_cache_and_calls() -> None:
    assert {path for path, tree in modules().items() if "numba" in {name for _, name in imported(tree)}} == {
        Path("base/calls.py"),
        Path("base/code_cache.py"),
        Path("base/jit.py"),
    }


def test_rooms_are_imported_relatively() -> None:
    names = {*ROOMS, "moeplan"}
    found = [f"{path}:{line}" for path, tree in modules().items() for line, name in imported(tree) if name in names]
    assert found == []


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_planning_and_simulating_load_no_torch() -> None:
    rooms = [
        ".".join(("moeplan", *path.with_suffix("").parts))
        for path in modules()
        if path.parts[0] in ("sim", "planner") and path.name != "__init__.py"
    ]
    load = f"import sys, importlib\nfor name in {rooms!r}: importlib.import_module(name)\n"
    loaded = run_python(load + f"print(sorted({HEAVY!r} & set(sys.modules)))")
    assert loaded == "[]"


@pytest.mark.parametrize("module", MEASURING)
def test_measuring_needs_only_numpy(module: str) -> None:
    block = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); import moeplan.{module}; print('imported')"
    assert run_python(block) == "imported"
