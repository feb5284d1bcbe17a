"""Scores of predictions beside public reports: by kind and by cut, and what a miss may come from.

Modelled: median and 90th percentile of |predicted / measured − 1|, median ratio, share of intervals that hold, Kendall's tau
within a rig and within a model (pairs at least 1.25 times apart), the same errors of two one-liners. Ignored: rows that could
not be predicted, but for their number.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from ...specs.machines.engines import fitted_table
from .choices import scores_of
from .drafts import drafts_anything
from .predict import Predicted, predict_report
from .rows import Report

Pair: TypeAlias = tuple[float, float | None]
"""Measured, and predicted where it was."""
KINDS = ("gpu-decode", "gpu-prefill", "cpu-decode", "cpu-prefill", "cache-decode", "cache-prefill")
ROOFLINE_SHARE = 0.6
APART = 1.25
"""Pairs of measurements closer than this say nothing about order."""
MISS = 1.5


def cuts() -> Mapping[str, Callable[[Report], bool]]:
    """Return the cuts that are scored besides the kinds, by name."""
    return {
        "unified memory": lambda report: any(
            "unified" in str(card.get("name")).lower() for card in report.row.get("gpus") or []
        ),
        "batches above 1": lambda report: (report.number("workload", "batch") or 1) > 1,
        "several cards": lambda report: report.num_gpus > 1,
        "drafting": drafts_anything,
        "vulkan": lambda report: report.part("engine").get("backend") == "vulkan",
        "memory stated": lambda report: report.kind == "cpu-decode" and bool(report.part("host").get("memory")),
    }


def predict_all(reports: Iterable[Report], progress: Callable[[int, int, str], None] | None = None) -> list[Predicted]:
    """Return every report beside its prediction, in order."""
    rows = list(reports)
    found = []
    for number, report in enumerate(rows):
        if progress is not None:
            progress(number, len(rows), "reports")
        found.append(predict_report(report))
    return found


def score(rows: Sequence[Predicted]) -> dict[str, Any]:
    """Return the scores of some rows; null where none was predicted."""
    known = [row for row in rows if row.value is not None]
    if not known:
        return {"n": len(rows), "predicted": 0} | dict.fromkeys(
            ("median_relative_error", "p90_relative_error", "bias", "coverage", "median_half_width", "kendall_tau",
             "roofline_median", "roofline06_median")
        )  # fmt: skip
    errors = [abs(row.value / row.report.measured - 1) for row in known if row.value is not None]
    ratios = [row.value / row.report.measured for row in known if row.value is not None]
    held = [row.low <= row.report.measured <= row.high for row in known if row.low is not None and row.high is not None]
    widths = [
        (row.high - row.low) / 2 / row.value
        for row in known
        if row.low is not None and row.high is not None and row.value
    ]
    lines = [row.roofline for row in known]
    return {
        "n": len(rows), "predicted": len(known), "median_relative_error": statistics.median(errors),
        "p90_relative_error": float(np.quantile(errors, 0.9)), "bias": statistics.median(ratios),
        "coverage": sum(held) / len(held), "median_half_width": statistics.median(widths), "kendall_tau": _tau(known),
        "roofline_median": _line_error(known, lines, 1.0), "roofline06_median": _line_error(known, lines, ROOFLINE_SHARE),
    }  # fmt: skip


def document(rows: Sequence[Predicted], *, bundled: bool = False) -> dict[str, Any]:
    """Return everything that `moeplan reproduce field --json` prints.

    bundled: the reports are those that engines' constants were fitted on; the errors of machines left out stand beside.
    """
    kinds = {
        kind: score([row for row in rows if row.report.reason is None and row.report.kind == kind]) for kind in KINDS
    }
    others = {
        name: score([row for row in rows if row.report.reason is None and holds(row.report)])
        for name, holds in cuts().items()
    }
    return {
        "kinds": {name: found for name, found in kinds.items() if found["n"]},
        "cuts": {name: found for name, found in others.items() if found["n"]},
        "choices": scores_of(rows),
        "rows": [_row(row) for row in rows],
        "in_sample": bundled,
        "left_out": fitted_table().get("left_out", {}) if bundled else {},
        "num_reports": len(rows),
        "num_predicted": sum(row.value is not None for row in rows),
    }


def _row(row: Predicted) -> dict[str, Any]:
    readable = row.report.reason is None
    return {
        "id": row.report.id, "kind": row.report.kind if readable else None, "measured": row.report.measured if readable else None,
        "predicted": row.value, "low": row.low, "high": row.high, "bound": row.bound, "reason": row.reason,
        "model": str(row.report.row.get("model")), "engine": str(row.report.part("engine").get("name")), "machine": row.report.rig,
        "metric": row.report.row.get("metric"), "roofline": row.roofline, "assumed": list(row.assumed), "could_explain": _explanation(row),
    }  # fmt: skip


def _explanation(row: Predicted) -> str | None:
    """Return which assumption could explain a miss by more than `MISS` times, None for other rows."""
    ratio = row.ratio
    if ratio is None or 1 / MISS <= ratio <= MISS:
        return None
    if row.assumed:
        return f"not stated, assumed: {'; '.join(row.assumed)}"
    version = row.report.part("engine").get("version")
    note = f"engine version {version}: " if version else "the engine's version is not stated; "
    return f"{note}constants are of the versions that `moeplan engine show` names; {row.bound} binds in the prediction"


def _line_error(rows: Sequence[Predicted], lines: Sequence[float | None], share: float) -> float:
    """Return the median error of a one-liner: a speed's is multiplied by `share`, a time's divided."""
    errors = []
    for row, line in zip(rows, lines, strict=True):
        if line is not None:
            scaled = line / share if row.report.metric == "ttft_s" else line * share
            errors.append(abs(scaled / row.report.measured - 1))
    return statistics.median(errors)


def _tau(rows: Sequence[Predicted]) -> float | None:
    """Return Kendall's tau over pairs of one rig or one model that were measured at least `APART` times apart."""
    groups: dict[tuple[str, str, str], list[Pair]] = defaultdict(list)
    for row in rows:
        pair = row.report.measured, row.value
        groups["rig", row.report.rig, row.report.metric].append(pair)
        groups["model", str(row.report.row.get("model")), row.report.metric].append(pair)
    return kendall_tau(groups.values())


def kendall_tau(groups: Iterable[Sequence[Pair]]) -> float | None:
    """Return Kendall's tau over the pairs within each group that were measured at least `APART` times apart; None without any."""
    agree = total = 0
    for members in groups:
        for (one, predicted), (other, beside) in itertools.combinations(members, 2):
            low, high = sorted((one, other))
            if high < APART * low or predicted is None or beside is None or predicted == beside:
                continue
            total += 1
            agree += (predicted > beside) == (one > other)
    return 2 * agree / total - 1 if total else None
