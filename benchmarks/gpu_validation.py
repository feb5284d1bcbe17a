"""Stage 3: the offload executor against the simulator, over the grid in grids/gpu.yaml, with the profile of stage 2.

The grid is that of `moeplan validate --grid`, written so that it is JSON as well as YAML: a GPU machine need not have a YAML reader.
No shape in it took part in the calibration. Each pair of shape and weight format is a part; figures are over all parts done so far.
Ignored: how a configuration is run and compared (`executor.validate`).
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

from moeplan.calibrate.device import metadata_of, open_device
from moeplan.calibrate.fitted_model import check_profile_matches
from moeplan.errors import InputError
from moeplan.executor.agreement import Compared, summary
from moeplan.executor.error_budget import median_budget
from moeplan.executor.validate import validate_grid
from moeplan.executor.validation_grid import Grid, grid_from_dict, trace_path
from moeplan.hardware import Profile
from moeplan.traces.format import load_trace
from moeplan.traces.recording import RoutingTrace

from .gpu_copies import load_profile
from .gpu_results import Part, Results, target

ROOT = Path(__file__).resolve().parents[1]
GRID = Path(__file__).parent / "grids" / "gpu.yaml"
BUNDLED = ROOT / "traces" / "bundled" / "tiny-moe.safetensors"
MEDIAN_TARGET, P90_TARGET, REGRET_TARGET, TAU_TARGET, LEAST_CONFIGURATIONS = 0.03, 0.08, 0.01, 0.9, 24
_DRY = {
    "shapes": [{"name": "held out", "hidden": 256, "intermediate": 192, "vocab": 512}],
    "bits": ["16", "4"],
    "concurrency": [1],
    "steps": 6,
    "repeats": 1,
}


def run(out: Path, *, dry: bool, deadline_s: float) -> bool:
    """Validate what is not validated yet, write validation.json; return whether all of it is done with equal counts."""
    kind = "cpu" if dry else "cuda"
    device = open_device(kind)
    try:
        told, wait = metadata_of(device), device.synchronize
    finally:
        device.close()
    profile = load_profile(out)
    check_profile_matches(profile, kind=kind, name=str(told["name"]))
    grid = read_plan(dry=dry)
    trace = load_trace(trace_path(grid.trace, BUNDLED))
    results = Results(
        out / "validation.json", stage="validation", dry=dry, device=told, deadline_s=deadline_s, alive=wait
    )
    groups: dict[str, list[Any]] = {}
    for case in grid.cases:
        groups.setdefault(f"{case.shape.name}, {case.schedule.experts.bits} bits", []).append(case)
    parts: list[Part] = [
        (name, partial(_validate, dataclasses.replace(grid, cases=tuple(cases)), trace, profile, kind))
        for name, cases in groups.items()
    ]
    results.run(parts)
    figures = over_all(results.parts)
    done = results.close(figures=figures, targets=targets(figures, dry=dry), profile=profile.name)
    return done and bool(figures.get("counts_equal"))


def read_plan(*, dry: bool) -> Grid:
    """Return the grid of the benchmark; for a dry run the same schedules on a tiny shape."""
    try:
        plain = json.loads(GRID.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            "grid", GRID.name, "not there, or not JSON", "restore it: it is JSON as well as YAML"
        ) from None
    return grid_from_dict(plain | _DRY if dry else plain)


def over_all(parts: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a validation over the configurations of all parts; nothing without any."""
    compared = [Compared(**_rebuilt(one)) for part in parts.values() for one in part["compared"]]
    if not compared:
        return {}
    budgets = [budget for part in parts.values() for budget in part["budgets"]]
    return summary(compared) | {"error_budget": median_budget(budgets)}


def targets(figures: dict[str, Any], *, dry: bool) -> list[dict[str, Any]]:
    """Return the targets of the comparison."""
    least = figures.get("noise_floor") or 0.0
    return [
        target("configurations", LEAST_CONFIGURATIONS, figures.get("num_configurations"), at_most=False, dry=dry),
        target("median error of the step", MEDIAN_TARGET, figures.get("median_relative_error"), at_most=True, dry=dry),
        target("90th percentile of the error", P90_TARGET, figures.get("p90_relative_error"), at_most=True, dry=dry),
        target("regret", REGRET_TARGET, figures.get("regret"), at_most=True, dry=dry, noise_floor=least),
        target("Kendall's tau", TAU_TARGET, figures.get("kendall_tau"), at_most=False, dry=dry),
    ]


def _validate(grid: Grid, trace: RoutingTrace, profile: Profile, kind: str) -> dict[str, Any]:
    found = validate_grid(grid, trace, profile=profile, device=kind)
    return {
        "configurations": [one.compared.to_dict() for one in found.validated],
        "compared": [dataclasses.asdict(one.compared) for one in found.validated],
        "budgets": [dict(one.budget) for one in found.validated],
        "notes": list(found.notes),
    }


def _rebuilt(plain: dict[str, Any]) -> dict[str, Any]:
    """Return a comparison's fields as they were before JSON turned tuples into lists."""
    return plain | {"count_differences": tuple(plain["count_differences"])}
