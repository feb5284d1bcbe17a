"""Samples from inside runs into factors: how much longer, or shorter, an operation takes there than measured alone.

    run.expert.STATE.MODE.BITS      one expert's kernel, nothing beside it
    run.grouped.MODE.BITS           one launch of several experts, over what its experts' own factors make of it
    run.dense.MODE, run.head.MODE   the dense part and the output matrix
    run.copy.DIRECTION.MODE         one copy
    run.slowdown.LANE.MODE.BITS     the same with a companion on the other lane, over without

Modelled: factors against the fitted surface at the sample's own sizes; what they are worth at other shapes is found by leaving
shapes out. Ignored: operations that were seen only a few times.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from ...specs.machines.profile import Curve
from ..costs.forms import expert_weight_bytes
from ..costs.run_kind import AHEAD, BESIDE_COPIES, DISK_LINK, FRESH, NOTHING, RESIDENT, factor, left_out_error, mode_of
from ..costs.surface import Surface
from ..samples import Sample, SampleSet

_LEAST_TIMES = 3
_SIZE_AXES = {"expert": ("tokens", "weight_bytes", "experts"), "dense": ("tokens", "weight_bytes"), "head": ("tokens", "weight_bytes"),
              "copy": ("bytes", "experts")}  # fmt: skip
_SHAPE_AXIS = {
    "expert": "weight_bytes",
    "grouped": "weight_bytes",
    "dense": "weight_bytes",
    "head": "weight_bytes",
    "copy": "bytes",
}

Row = tuple[dict[str, float], float, int]
"""Sizes, factor, repetitions."""


def expert_row(sample: Sample, units: float) -> dict[str, float]:
    """Return the arguments of a sample of one expert, with what the form needs besides; units: of the device, that work in parallel."""
    arguments = {axis: sample.arguments[axis] for axis in ("tokens", "hidden", "intermediate", "gated")}
    hidden, inner = int(arguments["hidden"]), int(arguments["intermediate"])
    weight_bytes = expert_weight_bytes(hidden, inner, bool(arguments["gated"]), sample.labels["bits"])
    return arguments | {"units": units, "weight_bytes": float(weight_bytes)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a sample from a run belongs."""

    table: str
    """The same operation measured alone."""
    curve: str
    """Its factors inside runs."""
    slowdown: str
    """Its factors beside a companion."""
    arguments: Mapping[str, float]
    """Of the table."""

    @property
    def sizes(self) -> dict[str, float]:
        """Arguments on which factors depend."""
        return {axis: self.arguments[axis] for axis in _SIZE_AXES[self.curve.split(".")[1]]}


def place_of(sample: Sample, units: float) -> Place | None:
    """Return where a sample belongs; None for one that is not from a run, or was seen only a few times."""
    what = sample.kind.removeprefix("run_")
    if what in (sample.kind, "grouped") or len(sample.seconds) < _LEAST_TIMES:
        return None
    labels, mode = sample.labels, mode_of(sample.labels["cache"], sample.labels["stream"])
    bits, direction = labels["bits"], labels.get("direction", "")
    tables = {"expert": f"expert.{bits}", "copy": f"copy.{direction}.pinned"}
    curves = {"expert": f"run.expert.{labels.get('state')}.{mode}.{bits}", "copy": f"run.copy.{direction}.{mode}"}
    lane = direction if what == "copy" else "compute"
    return Place(
        table=tables.get(what, what),
        curve=curves.get(what, f"run.{what}.{mode}"),
        slowdown=f"run.slowdown.{lane}.{mode}.{bits}",
        arguments=expert_row(sample, units) | {"experts": sample.arguments["experts"]}
        if what == "expert"
        else sample.arguments,
    )


def alone_s(place: Place, surface: Surface, pause_s: float) -> float:
    """Return what an operation takes alone; pause_s: of copies, the table holds the pause before the next piece too."""
    seconds, _ = surface.predict(place.arguments)
    return max(seconds - (pause_s if place.table.startswith("copy.") else 0.0), 1e-9)


def fit_runs(
    samples: SampleSet,
    surfaces: Mapping[str, Surface],
    curves: MutableMapping[str, Curve],
    units: float,
    citation: str,
) -> None:
    """Add the factors that samples from runs give to `curves`."""
    alone: dict[str, list[Row]] = {}
    beside: list[tuple[Place, float, int]] = []
    pause_s = _pause(samples)
    for sample in samples:
        place = place_of(sample, units)
        if place is None or place.table not in surfaces:
            continue
        # Reads follow each other, so slow ones add up; a disk's times are skewed, and the middle half would forget them.
        taken = sample.mean_s if sample.labels.get("link") == DISK_LINK else sample.midmean_s
        ratio, times = taken / alone_s(place, surfaces[place.table], pause_s), len(sample.seconds)
        if sample.labels["beside"] == NOTHING:
            alone.setdefault(place.curve, []).append((place.sizes, ratio, times))
        elif sample.labels["beside"] == BESIDE_COPIES and sample.kind in ("run_expert", "run_copy"):
            beside.append((place, ratio, times))
    for name, rows in alone.items():
        curves[name] = _curve(rows, _SHAPE_AXIS[name.split(".")[1]], citation)
    grouped: dict[str, list[Row]] = {}
    for sample in samples:
        if sample.kind == "run_grouped" and sample.labels["beside"] == NOTHING:
            found = _grouped_row(sample, surfaces, curves, units)
            if found is not None:
                grouped.setdefault(found[0], []).append(found[1])
    for name, rows in grouped.items():
        curves[name] = _curve(rows, _SHAPE_AXIS["grouped"], citation)
    slower: dict[str, list[Row]] = {}
    for place, ratio, times in beside:
        if place.curve in curves:
            row = (place.sizes, max(1.0, ratio / factor(curves[place.curve], **place.sizes)), times)
            slower.setdefault(place.slowdown, []).append(row)
    for name, rows in slower.items():
        curves[name] = _curve(rows, "bytes" if "bytes" in rows[0][0] else "weight_bytes", citation)


def _grouped_row(
    sample: Sample, surfaces: Mapping[str, Surface], curves: Mapping[str, Curve], units: float
) -> tuple[str, Row] | None:
    """Return (curve, row) of a grouped launch in a run; None where its experts, or its launch, were not measured alone."""
    bits, mode = sample.labels["bits"], mode_of(sample.labels["cache"], sample.labels["stream"])
    surface, base = surfaces.get(f"grouped_item.{bits}"), curves.get(f"grouped_base.{bits}")
    experts = sample.arguments["experts"]
    share = {FRESH: sample.arguments["fresh"] / experts, AHEAD: sample.arguments["ahead"] / experts}
    share[RESIDENT] = 1.0 - sum(share.values())
    states = {state: curves.get(f"run.expert.{state}.{mode}.{bits}") for state in share if share[state] > 0}
    if surface is None or base is None or any(curve is None for curve in states.values()):
        return None
    row = expert_row(sample, units) | {"tokens": sample.arguments["tokens"] / experts}
    sizes = {"tokens": row["tokens"], "weight_bytes": row["weight_bytes"], "experts": experts}
    times = sum(share[state] * factor(curve, **sizes) for state, curve in states.items())
    expected = base.seconds[0] + experts * surface.predict(row)[0] * times
    return f"run.grouped.{mode}.{bits}", (sizes, sample.midmean_s / expected, len(sample.seconds))


def _pause(samples: SampleSet) -> float:
    found = samples.of("host", what="piece")
    return found[0].midmean_s if found else 0.0


def _curve(rows: Sequence[Row], shape_axis: str, citation: str) -> Curve:
    arguments = {axis: tuple(float(sizes[axis]) for sizes, _, _ in rows) for axis in rows[0][0]}
    curve = Curve(
        arguments=arguments | {"times": tuple(float(times) for _, _, times in rows)},
        seconds=tuple(ratio for _, ratio, _ in rows),
        relative_uncertainty=0.0,
        citation=citation,
    )
    wrong = left_out_error(curve, shape_axis)
    return Curve(arguments=curve.arguments, seconds=curve.seconds, relative_uncertainty=wrong, citation=citation)
