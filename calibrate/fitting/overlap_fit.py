"""Runs of one layer's experts on a GPU into the ratios that predictions of overlap go by (`costs.overlap_table`).

Modelled: a ratio is of medians, measured in one process on one shape; of multiprocessors the median over the numbers of rows. Two things of
lengths a and c that leave each other the speed s while both run take min(a, c) / s + |a - c| together. Uncertainty is how far
neighbouring points lie from the line between their own neighbours. Ignored: other shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...base.errors import InputError
from ...specs.machines.profile import Curve
from ..costs.overlap_table import BESIDE, DENSE, LAUNCHES, MULTIPROCESSORS
from ..samples import Sample, SampleSet

KERNELS = ("grouped", "dense")
BESIDE_PARTS = ("products", "copies", "together")
_LEAST_UNCERTAIN = 0.02


def overlap_curves(samples: SampleSet, citation: str) -> dict[str, Curve]:
    """Return the curves of overlap, none where nothing was measured; raises InputError where a part of a ratio is missing."""
    found: dict[str, Curve] = {}
    grouped = samples.of("layer_experts", kernel="grouped")
    whole = {
        sample.arguments["rows"]: sample.median_s
        for sample in grouped
        if sample.arguments["launches"] == 1 and sample.arguments["share"] == 1
    }
    dense = samples.of("layer_experts", kernel="dense")
    if dense:
        rows = [sample.arguments["rows"] for sample in dense]
        found[DENSE] = _curve({"rows": rows}, [_over(sample, whole) for sample in dense], citation)
    launches = [sample for sample in grouped if sample.arguments["share"] == 1]
    if len(launches) > len(whole):
        axes = {axis: [sample.arguments[axis] for sample in launches] for axis in ("rows", "launches")}
        found[LAUNCHES] = _curve(axes, [_over(sample, whole) for sample in launches], citation)
    fewer = [sample for sample in grouped if sample.arguments["share"] < 1]
    if fewer:
        by_share: dict[float, list[float]] = {1.0: [1.0]}
        for sample in fewer:
            by_share.setdefault(sample.arguments["share"], []).append(_over(sample, whole))
        shares = sorted(by_share)
        found[MULTIPROCESSORS] = _curve({"share": shares}, [float(np.median(by_share[at])) for at in shares], citation)
    beside = {what: samples.of("layer_beside", what=what) for what in BESIDE_PARTS}
    if any(beside.values()):
        found[BESIDE] = _beside(beside, citation)
    return found


def _over(sample: Sample, whole: Mapping[float, float]) -> float:
    """Return a sample's time over that of one grouped launch with as many rows."""
    rows = sample.arguments["rows"]
    if rows not in whole:
        raise InputError("samples: layer_experts", f"{rows:g} rows", "no grouped launch as a whole", "measure again")
    return sample.median_s / whole[rows]


def _beside(parts: Mapping[str, Sequence[Sample]], citation: str) -> Curve:
    """Return the curve of one point: how many times as long each takes while the other runs, and never less than alone."""
    missing = [what for what in BESIDE_PARTS if not parts[what]]
    if missing:
        raise InputError("samples: layer_beside.what", missing[0], "none measured", "measure again")
    products, copies, together = (parts[what][0].median_s for what in BESIDE_PARTS)
    shorter, left = min(products, copies), abs(products - copies)
    longer = max(1.0, (together - left) / shorter)
    wrong = max(parts[what][0].spread for what in BESIDE_PARTS)
    return Curve(
        arguments={"bytes": (parts["copies"][0].arguments["bytes"],)}, seconds=(longer,),
        relative_uncertainty=min(1.0, max(_LEAST_UNCERTAIN, wrong)), citation=citation,
    )  # fmt: skip


def _curve(axes: Mapping[str, Sequence[float]], ratios: Sequence[float], citation: str) -> Curve:
    """Return a curve of ratios, as uncertain as its inner points are from the lines between their neighbours."""
    values = np.log(ratios)
    off = np.abs(values[1:-1] - (values[:-2] + values[2:]) / 2) if len(values) > 2 else np.zeros(1)
    wrong = float(min(1.0, max(_LEAST_UNCERTAIN, np.median(off))))
    return Curve(
        arguments={axis: tuple(column) for axis, column in axes.items()}, seconds=tuple(float(each) for each in ratios),
        relative_uncertainty=wrong, citation=f"{citation}: times one grouped launch",
    )  # fmt: skip
