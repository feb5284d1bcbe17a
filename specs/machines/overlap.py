"""What serving on many devices does that no single kernel shows: constants fitted to published clusters.

Modelled: the speed that kernels and exchanges leave each other where both run on all multiprocessors, and how far steps of
real clusters lie from their predictions. Ignored: how the constants came about (`python -m benchmarks.fits.parallel`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from ..catalog import ENGINES_FOLDER

PARALLEL_FILE = ENGINES_FOLDER / "parallel.json"


@cache
def parallel_constants() -> Mapping[str, Any]:
    """Return `shared_speed`, `served_error`, what they were fitted on, and errors of sources that were left out."""
    found: dict[str, Any] = json.loads(PARALLEL_FILE.read_text(encoding="utf-8"))
    return found


def shared_speed() -> float:
    """Return the speed of a kernel beside an exchange, and of an exchange beside kernels, relative to running alone."""
    return float(parallel_constants()["shared_speed"])


def served_error() -> float:
    """Return what nine in ten figures of clusters that no fit had seen were off by: the least width of a step's interval."""
    return float(parallel_constants()["served_error"])
