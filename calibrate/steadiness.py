"""How steady the machine was while it was calibrated: what each lap of the calibration took, against all of them.

    laps.compute, laps.copy     one ratio a lap; the curve's uncertainty is how far a time like a lap lies from all laps' figure

A machine that others use too, or whose clocks change, is faster or slower for minutes at a time. No fit sees that: all points of a
table move together. What one lap differed from the others by is what a run at some other time is to be expected to differ by.

Modelled: one factor for everything that computes, one for everything that is copied, normally distributed over laps. Ignored:
changes slower than the whole calibration (those between days), for which only measuring again helps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..hardware import Curve
from .samples import LEAST_LAPS, SampleSet

COMPUTE_LAPS, COPY_LAPS = "laps.compute", "laps.copy"
KINDS: Mapping[str, tuple[str, ...]] = {
    COMPUTE_LAPS: ("expert", "grouped", "dense", "head", "run_expert", "run_dense", "run_head"),
    COPY_LAPS: ("copy", "run_copy"),
}
# Of a normal distribution, nine in ten lie within so many standard deviations.
_NINE_IN_TEN = 1.645


def lap_curves(samples: SampleSet, citation: str, *, meanwhile: bool) -> dict[str, Curve]:
    """Return the curves of `samples`; none where there are too few laps to tell.

    meanwhile: what is to be predicted went on between the laps, so that only their mean may be off; False: it runs at another time.
    """
    found = {}
    for name, kinds in KINDS.items():
        rows = [
            np.log(np.array(medians) / sample.median_s)
            for sample in samples
            if sample.kind in kinds and (medians := sample.lap_medians()) is not None
        ]
        if not rows:
            continue
        laps = max(len(row) for row in rows)
        levels = np.median([row for row in rows if len(row) == laps], axis=0)
        wrong = _NINE_IN_TEN * float(np.std(levels, ddof=1)) / (math.sqrt(laps) if meanwhile else 1.0)
        found[name] = Curve(
            arguments={"lap": tuple(float(lap) for lap in range(laps))},
            seconds=tuple(float(ratio) for ratio in np.exp(levels)),
            relative_uncertainty=wrong,
            citation=citation,
        )
    return found


__all__ = ["COMPUTE_LAPS", "COPY_LAPS", "LEAST_LAPS", "lap_curves"]
