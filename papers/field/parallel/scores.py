"""Scores of predictions beside public figures of expert parallelism, in the shape of those of reports on one box.

Modelled: median and 90th percentile of |predicted / measured − 1|, median ratio as speeds (bias), share of intervals that hold, Kendall's
tau within a source and within a model, the same errors of a one-liner. For ratios also whether both lie on the same side of one.
Ignored: rows that could not be predicted, but for their number.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ....specs.machines.overlap import parallel_constants
from ..scores import Pair, kendall_tau
from .predict import Predicted
from .rows import KINDS, Row
from .setup import engine_of

ROOFLINE_SHARE = 0.6
MISS = 1.5
_KEYS = ("median_relative_error", "p90_relative_error", "bias", "coverage", "median_half_width", "kendall_tau", "roofline_median",
         "roofline06_median")  # fmt: skip
SIGN = 0.02
"""A ratio this near to one says nothing of which run is faster."""


def cuts() -> Mapping[str, Callable[[Row], bool]]:
    """Return the cuts that are scored besides the kinds, by name."""
    return {
        "serving": _serves,
        "decode": lambda row: row.kind in ("serving-decode", "serving-mixed"),
        "prefill": lambda row: row.kind == "serving-prefill",
        "one node": lambda row: _serves(row) and (row.count("nodes") or 1) == 1,
        "several nodes": lambda row: _serves(row) and (row.count("nodes") or 1) > 1,
        "whole servers": lambda row: _serves(row) and row.group.startswith("silicon"),
        "published runs": lambda row: _serves(row) and not row.group.startswith("silicon"),
    }


def _serves(row: Row) -> bool:
    return row.kind.startswith("serving")


def score(rows: Sequence[Predicted]) -> dict[str, Any]:
    """Return the scores of some rows; null where none was predicted."""
    known = [row for row in rows if row.value is not None]
    if not known:
        return {"n": len(rows), "predicted": 0} | dict.fromkeys(_KEYS)
    errors = [abs(row.value / row.report.measured - 1) for row in known if row.value is not None]
    ratios = [ratio for row in known if (ratio := row.speed_ratio) is not None]
    held = [row.low <= row.report.measured <= row.high for row in known if row.low is not None and row.high is not None]
    widths = [
        (row.high - row.low) / 2 / row.value
        for row in known
        if row.low is not None and row.high is not None and row.value
    ]
    return {
        "n": len(rows), "predicted": len(known), "median_relative_error": statistics.median(errors),
        "p90_relative_error": float(np.quantile(errors, 0.9)), "bias": statistics.median(ratios),
        "coverage": sum(held) / len(held), "median_half_width": statistics.median(widths), "kendall_tau": _tau(known),
        "roofline_median": _line_error(known, 1.0), "roofline06_median": _line_error(known, ROOFLINE_SHARE),
    }  # fmt: skip


def document(rows: Sequence[Predicted], *, bundled: bool = False) -> dict[str, Any]:
    """Return everything that `moeplan reproduce field --parallel --json` prints."""
    readable = [row for row in rows if row.report.reason is None]
    kinds = {kind: score([row for row in readable if row.report.kind == kind]) for kind in KINDS}
    others = {name: score([row for row in readable if holds(row.report)]) for name, holds in cuts().items()}
    ratios = [row for row in readable if row.report.kind == "difference" and row.value is not None]
    return {
        "kinds": {name: found for name, found in kinds.items() if found["n"]},
        "cuts": {name: found for name, found in others.items() if found["n"]},
        "signs": {"n": len(ratios), "right": sum(_same_side(row) for row in ratios)},
        "rows": [_row(row) for row in rows],
        "in_sample": bundled,
        "fitted_on": parallel_constants()["fitted_on"] if bundled else [],
        "left_out": parallel_constants()["left_out"] if bundled else {},
        "num_reports": len(rows),
        "num_predicted": sum(row.value is not None for row in rows),
    }


def _same_side(row: Predicted) -> bool:
    if row.value is None or abs(row.report.measured - 1) < SIGN:
        return True
    return (row.value > 1) == (row.report.measured > 1)


def _row(row: Predicted) -> dict[str, Any]:
    report, readable = row.report, row.report.reason is None
    return {
        "id": report.id, "kind": report.kind if readable else None, "measured": report.measured if readable else None,
        "predicted": row.value, "low": row.low, "high": row.high, "bound": row.bound, "reason": row.reason,
        "model": report.text("model") or None, "engine": engine_of(report) if readable else None, "machine": report.text("gpu") or None,
        "source": report.source, "metric": report.metric or None, "roofline": row.roofline, "assumed": list(row.assumed),
        "could_explain": _explanation(row),
    }  # fmt: skip


def _explanation(row: Predicted) -> str | None:
    """Return which assumption could explain a miss by more than `MISS` times, None for other rows."""
    ratio = row.speed_ratio
    if ratio is None or 1 / MISS <= ratio <= MISS:
        return None
    flags = row.report.text("flags")
    parts = [f"the row says: {flags}"] if flags else []
    if row.assumed:
        parts.append(f"not stated, assumed: {'; '.join(row.assumed)}")
    return "; ".join(parts) or f"{row.bound} binds in the prediction; the engine's version is not stated"


def _line_error(rows: Sequence[Predicted], share: float) -> float | None:
    """Return the median error of a one-liner: a speed's is multiplied by `share`, a time's divided."""
    errors = []
    for row in rows:
        if row.roofline is not None:
            line = row.roofline / share if row.report.is_time else row.roofline * share
            errors.append(abs(line / row.report.measured - 1))
    return statistics.median(errors) if errors else None


def _tau(rows: Sequence[Predicted]) -> float | None:
    """Return Kendall's tau over pairs of one source or one model that were measured apart."""
    groups: dict[tuple[str, str, str], list[Pair]] = defaultdict(list)
    for row in rows:
        pair = row.report.measured, row.value
        groups["source", row.report.source, row.report.metric].append(pair)
        groups["model", row.report.text("model"), row.report.metric].append(pair)
    return kendall_tau(groups.values())
