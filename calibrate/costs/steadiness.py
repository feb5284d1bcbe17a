"""How steady the machine was while it was calibrated: what each pass of the calibration took, against all of them.

    passes.compute, passes.copy     one ratio a pass; the curve's uncertainty is how far one time lies from all passes' mean

A machine that others use too, or whose clocks change, is faster or slower for minutes at a time. No fit sees that: all points of a
table move together. What one pass differed from the others by is what a run at some other time is to be expected to differ by.

A calibration of seconds has a single pass, and cannot see that. Then the share of the processor's time that others took meanwhile
stands for it: by so much a run may be faster without them, or slower with more of them. On an idle machine that is next to nothing.

Modelled: each part of a pass (one kind of measurement in one weight format, some seconds) has a level, the median over its sizes; the
variance of a part's levels over passes, averaged over the parts that compute and over those that copy. Ignored: changes slower than
the whole calibration (those between days), for which only measuring again helps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...specs.machines.profile import Curve
from ..samples import SampleSet
from .surface import Array

COMPUTE_PASSES, COPY_PASSES = "passes.compute", "passes.copy"
KINDS: Mapping[str, tuple[str, ...]] = {
    COMPUTE_PASSES: ("expert", "grouped", "dense", "head", "run_expert", "run_grouped", "run_dense", "run_head"),
    COPY_PASSES: ("copy", "run_copy"),
}
_LEAST_ROWS = 3
# Of a normal distribution, nine in ten lie within so many standard deviations.
_NINE_IN_TEN = 1.645


def pass_curves(samples: SampleSet, citation: str, *, meanwhile: bool) -> dict[str, Curve]:
    """Return the curves of `samples`; none where there are too few passes to tell.

    meanwhile: what is to be predicted went on between the passes, so that only their mean may be off; False: it runs at another time.
    """
    found = {}
    for name, kinds in KINDS.items():
        parts: dict[tuple[str, str], list[Array]] = {}
        for sample in samples:
            medians = sample.lap_medians()
            if sample.kind in kinds and medians is not None:
                row = np.log(medians)
                part = (sample.kind, sample.labels.get("bits") or sample.labels.get("direction", ""))
                parts.setdefault(part, []).append(row - row.mean())
        if not parts:
            continue
        # What several parts of a pass measure has more passes than there were; most is measured once a pass.
        passes = Counter(len(row) for rows in parts.values() for row in rows).most_common(1)[0][0]
        levels = np.array([
            np.median(usual, axis=0)
            for rows in parts.values()
            if len(usual := [row for row in rows if len(row) == passes]) >= _LEAST_ROWS
        ])  # fmt: skip
        if not len(levels):
            continue
        wrong = _NINE_IN_TEN * math.sqrt(float(np.var(levels, axis=1, ddof=1).mean()))
        found[name] = Curve(
            arguments={"pass": tuple(float(number) for number in range(passes))},
            seconds=tuple(float(ratio) for ratio in np.exp(levels.mean(0))),
            relative_uncertainty=wrong / (math.sqrt(passes) if meanwhile else 1.0),
            citation=citation,
        )
    return found


def others_curves(samples: SampleSet, citation: str) -> dict[str, Curve]:
    """Return curves of a single pass, as uncertain as others' share of the processor's time; none where that is 0 or unknown."""
    share = others_share(samples.conditions)
    if share <= 0:
        return {}
    alone = Curve(arguments={"pass": (0.0,)}, seconds=(1.0,), relative_uncertainty=share, citation=citation)
    return dict.fromkeys(KINDS, alone)


def others_share(conditions: Mapping[str, Any]) -> float:
    """Return the share of all cores' time that other programs, or a hypervisor, took between two readings of `conditions`; 0: unknown."""
    readings = [conditions.get(when) for when in ("began", "ended")]
    before, after = (one.get("cpu_jiffies") if isinstance(one, Mapping) else None for one in readings)
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return 0.0
    try:
        total, busy, own = (float(after[name]) - float(before[name]) for name in ("total", "busy", "own"))
    except (KeyError, TypeError, ValueError):
        return 0.0
    return min(1.0, max(0.0, busy - own) / total) if total > 0 else 0.0
