"""Samples from inside runs into factors: how much longer, or shorter, an operation takes there than measured alone.

    run.expert.STATE.MODE.BITS      one expert's kernel, nothing beside it
    run.dense.MODE, run.head.MODE   the dense part and the output matrix
    run.copy.DIRECTION.MODE         one copy
    run.slowdown.LANE.MODE.BITS     the same with a companion on the other lane, over without

Modelled: factors against the fitted surface at the sample's own sizes; what they are worth at other shapes is found by leaving
shapes out. Ignored: operations that were seen only a few times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence

from ..hardware import Curve
from .run_kind import BESIDE_COPIES, NOTHING, factor, left_out_error, mode_of
from .samples import Sample, SampleSet
from .surface import Surface

_LEAST_TIMES = 3
_SIZE_AXES = {"expert": ("tokens", "weight_bytes", "experts"), "dense": ("tokens", "weight_bytes"), "head": ("tokens", "weight_bytes"),
              "copy": ("bytes", "experts")}  # fmt: skip
_SHAPE_AXIS = {"expert": "weight_bytes", "dense": "weight_bytes", "head": "weight_bytes", "copy": "bytes"}

Row = tuple[dict[str, float], float, int]
"""Sizes, factor, repetitions."""


def fit_runs(
    samples: SampleSet,
    surfaces: Mapping[str, Surface],
    curves: MutableMapping[str, Curve],
    expert_row: Callable[[Sample], dict[str, float]],
    citation: str,
) -> None:
    """Add the factors that samples from runs give to `curves`."""
    alone: dict[str, list[Row]] = {}
    beside: list[tuple[str, str, dict[str, float], float, int]] = []
    for sample in samples:
        what = sample.kind.removeprefix("run_")
        if what == sample.kind or len(sample.seconds) < _LEAST_TIMES:
            continue
        labels, mode = sample.labels, mode_of(sample.labels["cache"], sample.labels["stream"])
        arguments = dict(sample.arguments) | (expert_row(sample) if what == "expert" else {})
        table, name, lane = {
            "expert": (f"expert.{labels['bits']}", f"run.expert.{labels.get('state')}.{mode}.{labels['bits']}", "compute"),
            "dense": ("dense", f"run.dense.{mode}", "compute"),
            "head": ("head", f"run.head.{mode}", "compute"),
            "copy": (f"copy.{labels.get('direction')}.pinned", f"run.copy.{labels.get('direction')}.{mode}",
                     labels.get("direction", "")),
        }[what]  # fmt: skip
        if table not in surfaces:
            continue
        expected, _ = surfaces[table].predict(arguments)
        if what == "copy":  # the table holds the pause before the next piece too
            expected -= _pause(samples)
        sizes = {axis: arguments[axis] for axis in _SIZE_AXES[what]}
        row = (sizes, sample.midmean_s / max(expected, 1e-9), len(sample.seconds))
        if labels["beside"] == NOTHING:
            alone.setdefault(name, []).append(row)
        elif labels["beside"] == BESIDE_COPIES and what in ("expert", "copy"):
            beside.append((name, f"run.slowdown.{lane}.{mode}.{labels['bits']}", *row))
    for name, rows in alone.items():
        curves[name] = _curve(rows, _SHAPE_AXIS[name.split(".")[1]], citation)
    slower: dict[str, list[Row]] = {}
    for name, target, sizes, ratio, times in beside:
        if name in curves:
            slower.setdefault(target, []).append((sizes, max(1.0, ratio / factor(curves[name], **sizes)), times))
    for name, rows in slower.items():
        curves[name] = _curve(rows, "bytes" if "bytes" in rows[0][0] else "weight_bytes", citation)


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
