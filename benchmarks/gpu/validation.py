"""Stage 3: the offload executor against the simulator, over the grids in grids/gpu*.yaml, with the profile of stage 2.

    targets     the grid that the targets are for: five schedules by cache sizes, weight formats and batches, at two shapes
    cores       misses on the host's cores
    disk        a disk below the host's memory
    formats     experts in two weight formats
    guesses     guesses that are dropped again, weighed against what they cost, or learnt from earlier requests
    policies    other caches, whole layers, and everything on the device

The grids are those of `moeplan validate --grid`, written so that they are JSON as well as YAML: a GPU machine need not have a YAML
reader. No shape in them took part in the calibration. A part is what has one shape, weight format and batch. Figures are those of each
group over its parts done so far; groups are never added up. The targets' first weight format comes first, whose configurations are enough
for them, then the other groups, then the rest.
Ignored: how a configuration is run and compared (`executor.validation.validate`).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moeplan.base.errors import InputError, MoeplanError
from moeplan.calibrate.costs.load import check_profile_matches
from moeplan.executor.running.prediction import run_input
from moeplan.executor.validation.agreement import Compared, summary
from moeplan.executor.validation.error_budget import median_budget
from moeplan.executor.validation.grid import Case, Grid, grid_from_dict, trace_path
from moeplan.executor.validation.validate import validate_grid
from moeplan.specs.machines.profile import Profile
from moeplan.traces.format import load_trace
from moeplan.traces.recording import RoutingTrace

from .expected import expected_s
from .opening import open_results
from .profile import load_profile, needed
from .results import target

ROOT = Path(__file__).resolve().parents[2]
GRIDS = Path(__file__).parents[1] / "grids"
BUNDLED = ROOT / "traces" / "bundled" / "tiny-moe.safetensors"
MEDIAN_TARGET, P90_TARGET, REGRET_TARGET, TAU_TARGET, LEAST_CONFIGURATIONS = 0.03, 0.08, 0.01, 0.9, 24
_DRY = {
    "shapes": [{"name": "held out", "hidden": 256, "intermediate": 192, "vocab": 512}],
    "bits": ["16", "4"],
    "concurrency": [1],
    "steps": 6,
    "repeats": 1,
}
# A format of its own is one too many where half of the experts have another one.
_DRY_OTHERS = {"cache_experts_per_layer": [4], "bits": ["16"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Configurations whose figures belong together."""

    name: str
    grid: str
    """File in grids/."""
    cores: bool = False
    """Their profile knows the host's cores."""
    disk: bool = False
    """Their profile knows the disk."""


TARGETS = Group(name="targets", grid="gpu.yaml")
GROUPS = (
    TARGETS,
    Group(name="cores", grid="gpu_cores.yaml", cores=True),
    Group(name="disk", grid="gpu_disk.yaml", disk=True),
    Group(name="formats", grid="gpu_formats.yaml"),
    Group(name="guesses", grid="gpu_guesses.yaml"),
    Group(name="policies", grid="gpu_policies.yaml"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """One part: a grid's configurations of one shape, weight format and batch."""

    name: str
    group: Group
    grid: Grid


def run(out: Path, *, dry: bool, deadline_s: float) -> bool:
    """Validate what is not validated yet, write validation.json; return whether all of it is done with equal counts."""
    began = open_results(out, "validation", dry=dry, deadline_s=deadline_s)
    profiles = _profiles(out, began.kind, str(began.told["name"]), dry=dry)
    chosen = portions(dry=dry)
    traces = {name: load_trace(trace_path(name, BUNDLED)) for name in {one.grid.trace for one in chosen}}
    parts, expected = [], {}
    for one in chosen:
        trace, profile = traces[one.grid.trace], profiles[one.group.name]
        parts.append((one.name, partial(_validate, one, trace, profile, began.kind)))
        if one.name not in began.results.parts and isinstance(profile, Profile):
            expected[one.name] = _expected(one, trace, profile, began.kind, deadline_s)
    began.results.run(parts, expected_s=expected)
    groups = by_group(began.results.parts, [one.name for one in chosen])
    done = began.results.close(
        figures=groups[TARGETS.name]["figures"],
        groups=groups,
        targets=targets(groups[TARGETS.name]["figures"], dry=dry),
        warnings=list(began.warnings),
    )
    return done and all(one["figures"].get("counts_equal") for one in groups.values())


def portions(*, dry: bool) -> list[Portion]:
    """Return all parts in the order in which they are worth most: the targets' first weight format, the other groups, the rest."""
    first, *others = (_cut(group, read_plan(group, dry=dry)) for group in GROUPS)
    format_of = [one.grid.cases[0].schedule.experts.bits for one in first]
    enough = format_of.count(format_of[0])
    return [*first[:enough], *(one for group in others for one in group), *first[enough:]]


def read_plan(group: Group, *, dry: bool) -> Grid:
    """Return the grid of a group; for a dry run the same schedules on a tiny shape."""
    try:
        plain = json.loads((GRIDS / group.grid).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            "grid", group.grid, "not there, or not JSON", "restore it: it is JSON as well as YAML"
        ) from None
    if dry:
        plain |= _DRY if group is TARGETS else _DRY | _DRY_OTHERS
    return grid_from_dict(plain)


def by_group(parts: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return, for each group, the figures over its parts done, these parts, and those that are not done."""
    found = {}
    for group in GROUPS:
        mine = [name for name in names if name.startswith(f"{group.name}: ")]
        done = [name for name in mine if name in parts]
        found[group.name] = {
            "figures": over_all([parts[name] for name in done]),
            "parts": done,
            "pending": [name for name in mine if name not in parts],
        }
    return found


def over_all(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of a validation over the configurations of several parts; nothing without any."""
    compared = [Compared(**_rebuilt(one)) for part in parts for one in part["compared"]]
    if not compared:
        return {}
    budgets = [budget for part in parts for budget in part["budgets"]]
    return summary(compared) | {"error_budget": median_budget(budgets)}


def targets(figures: Mapping[str, Any], *, dry: bool) -> list[dict[str, Any]]:
    """Return the targets of the comparison."""
    least = figures.get("noise_floor") or 0.0
    return [
        target("configurations", LEAST_CONFIGURATIONS, figures.get("num_configurations"), at_most=False, dry=dry),
        target("median error of the step", MEDIAN_TARGET, figures.get("median_relative_error"), at_most=True, dry=dry),
        target("90th percentile of the error", P90_TARGET, figures.get("p90_relative_error"), at_most=True, dry=dry),
        target("regret", REGRET_TARGET, figures.get("regret"), at_most=True, dry=dry, noise_floor=least),
        target("Kendall's tau", TAU_TARGET, figures.get("kendall_tau"), at_most=False, dry=dry),
    ]


# --- parts --------------------------------------------------------------------------------------------------------------


def _cut(group: Group, grid: Grid) -> list[Portion]:
    """Return a grid's parts, by weight format in the grid's order, then by shape and batch."""
    found: dict[tuple[str, Any, int], list[Case]] = {}
    order = list(dict.fromkeys(case.schedule.experts.bits for case in grid.cases))
    for case in grid.cases:
        schedule = case.schedule
        found.setdefault((schedule.experts.bits, case.shape, schedule.workload.concurrency), []).append(case)
    return [
        Portion(
            name=f"{group.name}: {shape.name}, {bits} bits, batch {batch}",
            group=group,
            grid=dataclasses.replace(grid, cases=tuple(cases)),
        )
        for (bits, shape, batch), cases in sorted(found.items(), key=lambda one: order.index(one[0][0]))
    ]


def _profiles(out: Path, kind: str, name: str, *, dry: bool) -> dict[str, Profile | MoeplanError]:
    """Return the profile of each group, or what is missing for it; raises InputError where even the first one cannot be had."""
    found: dict[str, Profile | MoeplanError] = {}
    made: dict[tuple[str, ...], Profile | MoeplanError] = {}
    for group in GROUPS:
        parts = tuple(needed(dry=dry, with_cores=group.cores, with_disk=group.disk))
        if parts not in made:
            try:
                made[parts] = load_profile(out, parts)
                check_profile_matches(made[parts], kind=kind, name=name)
            except MoeplanError as error:
                if group is TARGETS:
                    raise
                made[parts] = error
        found[group.name] = made[parts]
    return found


def _expected(one: Portion, trace: RoutingTrace, profile: Profile, kind: str, deadline_s: float) -> float | None:
    if time.monotonic() > deadline_s:
        return None
    runs = [
        (run_input(case.schedule, trace, window_steps=one.grid.steps), case.shape.model(trace))
        for case in one.grid.cases
    ]
    return expected_s(runs, profile, kind, rounds=one.grid.repeats + 1, deadline_s=deadline_s)


def _validate(one: Portion, trace: RoutingTrace, profile: Profile | MoeplanError, kind: str) -> dict[str, Any]:
    if isinstance(profile, MoeplanError):
        raise profile
    found = validate_grid(one.grid, trace, profile=profile, device=kind)
    return {
        "configurations": [each.compared.to_dict() for each in found.validated],
        "compared": [dataclasses.asdict(each.compared) for each in found.validated],
        "budgets": [dict(each.budget) for each in found.validated],
        "notes": list(found.notes),
    }


def _rebuilt(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a comparison's fields as they were before JSON turned tuples into lists."""
    return {**plain, "count_differences": tuple(plain["count_differences"])}
