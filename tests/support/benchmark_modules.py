"""The modules of `benchmarks/`, which lie beside the package and are not installed."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def benchmark_module(name: str) -> Any:
    """Return the module `benchmarks.NAME` of this checkout."""
    if "benchmarks" not in sys.modules:
        package = types.ModuleType("benchmarks")
        package.__path__ = [str(ROOT / "benchmarks")]
        sys.modules["benchmarks"] = package
    return importlib.import_module(f"benchmarks.{name}")
