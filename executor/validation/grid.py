"""The configurations of a validation, read from a file: which shapes, schedules, cache sizes, formats and batches.

    shapes: [{name: held out, hidden: 768, intermediate: 1024}]
    schedules: [{preset: on-demand}, {preset: mixtral-offloading, set: {copy.chunk_bytes: 1048576}}]
    cache_experts_per_layer: [4, 8]      # only where a schedule caches
    bits: ["16", "4"]
    concurrency: [1, 4]
    trace: bundled                       # or a recording's path
    steps: 24
    repeats: 5
    calibrate: {shapes: [...], bits: [...]}   # measured in the same run when no profile is given

Modelled: the cross product, without repetitions; shapes take layers, experts and choices from the recording. The
calibration part and the validated part are kept apart: a shape may not stand in both. Ignored: running them
(`validate`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.errors import InputError, UnknownName
from ...base.text_files import read_text
from ...calibrate.microbenchmarks.standard_shapes import made_up_model
from ...sim.offload.drafting.draft import Drafting
from ...specs.models import ModelSpec, weight_format
from ...specs.schedules.offload import OffloadSchedule, setting_keys
from ...specs.schedules.presets import load_preset
from ...traces.recording import RoutingTrace

MAX_FILE_BYTES = 2**20
_KEYS = (
    "shapes",
    "schedules",
    "cache_experts_per_layer",
    "bits",
    "concurrency",
    "trace",
    "steps",
    "repeats",
    "calibrate",
)
_SHAPE_KEYS = ("name", "hidden", "intermediate", "vocab")
_SCHEDULE_KEYS = ("preset", "set", "name")
_CALIBRATE_KEYS = ("shapes", "bits")
_MAX_STEPS, _MAX_REPEATS = 100_000, 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a made-up model; layers, experts and choices come from a recording."""

    name: str
    hidden: int
    intermediate: int
    vocab: int = 2048

    def model(self, trace: RoutingTrace) -> ModelSpec:
        """Return the model with as many layers, experts and choices as the recording."""
        return made_up_model(
            self.name,
            hidden=self.hidden,
            intermediate=self.intermediate,
            vocab=self.vocab,
            num_layers=trace.num_layers,
            num_experts=trace.num_experts,
            top_k=trace.top_k,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One configuration."""

    name: str
    shape: Shape
    schedule: OffloadSchedule
    group: str
    """Configurations of one group solve the same problem; the fastest of them is what a planner would choose."""
    drafting: Drafting | None = None
    """Guesses that decode steps verify; None: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Everything a validation is told."""

    cases: tuple[Case, ...]
    trace: str
    steps: int
    repeats: int
    calibrate_shapes: tuple[Shape, ...]
    calibrate_bits: tuple[str, ...]


def read_grid(path: str | os.PathLike[str]) -> Grid:
    """Return the grid in a YAML file; raises InputError for one that is absent, not YAML, or has unknown keys or wrong values."""
    from ...base import plain_yaml  # a machine that only measures may lack the library

    text = read_text(path, "grid", MAX_FILE_BYTES)
    try:
        data = plain_yaml.parse(text)
    except ValueError as error:
        raise InputError("grid", os.fspath(path), str(error), "correct the file") from None
    return grid_from_dict(data)


def grid_from_dict(data: Any) -> Grid:
    """Return the grid of plain values; raises InputError or UnknownName for the first that is wrong."""
    if not isinstance(data, Mapping):
        raise InputError("grid", data, "not a table of keys", f"give {', '.join(_KEYS)}")
    _known("grid", data, _KEYS)
    shapes = [_shape(one) for one in _listed(data, "shapes")]
    given = data.get("calibrate", {})
    if not isinstance(given, Mapping):
        raise InputError("grid: calibrate", given, "not a table", f"give {', '.join(_CALIBRATE_KEYS)}")
    _known("grid: calibrate", given, _CALIBRATE_KEYS)
    calibrated = [_shape(one) for one in _maybe_listed(given, "shapes", "calibrate.shapes", [])]
    for shape in shapes:
        for other in calibrated:
            if (shape.hidden, shape.intermediate) == (other.hidden, other.intermediate):
                raise InputError(
                    "grid: shapes",
                    shape.name,
                    f"{shape.hidden}x{shape.intermediate} takes part in the calibration too",
                    "validate other shapes than those that are calibrated",
                )
    bits = [weight_format(str(one)).name for one in _listed(data, "bits")]
    sizes = [
        _whole("cache_experts_per_layer", one)
        for one in _maybe_listed(data, "cache_experts_per_layer", "cache_experts_per_layer", [])
    ]
    batches = [_whole("concurrency", one) for one in _maybe_listed(data, "concurrency", "concurrency", [1])]
    cases = _cases(shapes, [_schedule(one) for one in _listed(data, "schedules")], sizes, bits, batches)
    return Grid(
        cases=tuple(cases),
        trace=str(data.get("trace", "bundled")),
        steps=_whole("steps", data.get("steps", 24), _MAX_STEPS),
        repeats=_whole("repeats", data.get("repeats", 5), _MAX_REPEATS),
        calibrate_shapes=tuple(calibrated),
        calibrate_bits=tuple(
            weight_format(str(one)).name for one in _maybe_listed(given, "bits", "calibrate.bits", bits)
        ),
    )


def _cases(
    shapes: Sequence[Shape],
    schedules: Sequence[OffloadSchedule],
    sizes: Sequence[int],
    bits: Sequence[str],
    batches: Sequence[int],
) -> list[Case]:
    """Return the cross product; a schedule that caches nothing has no sizes, one with a size of its own keeps it."""
    found: dict[str, Case] = {}
    for shape in shapes:
        for schedule in schedules:
            cache = schedule.cache
            sizes_of_its_own = (cache.experts_per_layer, cache.pooled_experts, cache.host_layers)
            sized = cache.policy == "none" or any(size is not None for size in sizes_of_its_own)
            if not sized and not sizes:
                raise InputError(
                    "grid: cache_experts_per_layer", "(absent)", f"{schedule.name} caches experts", "give cache sizes"
                )
            for size in [None] if sized else sizes:
                for kind in bits:
                    for batch in batches:
                        changes: dict[str, Any] = {"experts__bits": kind, "workload__concurrency": batch}
                        if size is not None:
                            changes["cache__experts_per_layer"] = size
                        made = schedule.with_options(**changes)
                        parts = [
                            schedule.name,
                            *([f"{size} cached"] if size is not None else []),
                            f"{kind} bits",
                            f"batch {batch}",
                        ]
                        name = ", ".join([*parts, *([shape.name] if len(shapes) > 1 else [])])
                        found[name] = Case(
                            name=name, shape=shape, schedule=made, group=f"{shape.name}, {kind} bits, batch {batch}"
                        )
    return list(found.values())


def _schedule(one: Any) -> OffloadSchedule:
    if isinstance(one, str):
        one = {"preset": one}
    if not isinstance(one, Mapping) or "preset" not in one:
        raise InputError("grid: schedules", one, "not a preset's name or a table with one", "write {preset: on-demand}")
    _known("grid: schedules", one, _SCHEDULE_KEYS)
    settings = one.get("set", {})
    if not isinstance(settings, Mapping):
        raise InputError(
            "grid: schedules.set", settings, "not a table of key: value", "write for instance {predictor.depth: 2}"
        )
    _known("grid: schedules.set", settings, tuple(setting_keys()))
    made = load_preset(str(one["preset"])).with_options(
        **{key.replace(".", "__"): value for key, value in settings.items()}
    )
    return made.with_options(name=str(one.get("name", made.name)))


def _shape(one: Any) -> Shape:
    if not isinstance(one, Mapping):
        raise InputError("grid: shapes", one, "not a table", "write {name: held out, hidden: 768, intermediate: 1024}")
    _known("grid: shapes", one, _SHAPE_KEYS)
    sizes = {
        key: _whole(key, one.get(key, 2048 if key == "vocab" else None)) for key in ("hidden", "intermediate", "vocab")
    }
    if sizes["hidden"] % 256:
        raise InputError(
            "grid: hidden", sizes["hidden"], "not a multiple of 256", "heads have 64 dimensions, four to a group"
        )
    return Shape(name=str(one.get("name", f"{sizes['hidden']}x{sizes['intermediate']}")), **sizes)


def _listed(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    if not isinstance(value, list) or not value:
        raise InputError(f"grid: {key}", value, "not a list of at least one", "name what is to be validated")
    return value


def _maybe_listed(data: Mapping[str, Any], key: str, name: str, default: list[Any]) -> list[Any]:
    value = data.get(key, default)
    if not isinstance(value, list):
        raise InputError(
            f"grid: {name}", value, "not a list", f"write [{value}]" if isinstance(value, int) else "write a list"
        )
    return value


def _known(what: str, data: Mapping[Any, Any], keys: Sequence[str]) -> None:
    for key in data:
        if key not in keys:
            raise UnknownName(what, key, keys)


def _whole(key: str, value: Any, most: int = 2**31) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InputError(f"grid: {key}", value, f"not a whole number from 1 to {most}", "correct the grid")
    return value


def trace_path(name: str, bundled: Path) -> Path:
    """Return the recording that a grid names."""
    return bundled if name == "bundled" else Path(name)
