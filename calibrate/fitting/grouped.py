"""What an expert adds to a grouped launch, told apart from what the launch costs besides.

Modelled: launches of several sizes as straight lines with one base. Ignored: how an expert's share depends on its shape (`costs.forms`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..samples import Sample

LEAST_S = 1e-9
"""No launch and no share of one takes less."""


def share_of_groups(samples: Sequence[Sample]) -> tuple[list[tuple[Sample, float]], float]:
    """Return what each expert adds to a grouped launch, for every number of tokens and shape, and what a launch costs besides.

    Launches of several sizes give one straight line for each: seconds = base + experts · share, with one base for all.
    """
    kinds: dict[tuple[float, ...], list[Sample]] = {}
    for sample in samples:
        key = tuple(sample.arguments[axis] for axis in ("tokens", "hidden", "intermediate", "gated"))
        kinds.setdefault(key, []).append(sample)
    rows, target = [], []
    for place, group in enumerate(kinds.values()):
        for sample in group:
            row = np.zeros(len(kinds) + 1)
            row[0], row[1 + place] = 1.0, sample.arguments["experts"]
            rows.append(row / sample.median_s)
            target.append(1.0)
    solved = np.linalg.lstsq(np.array(rows), np.array(target), rcond=None)[0]
    base = max(0.0, float(solved[0]))
    shares = []
    for group in kinds.values():
        largest = max(group, key=lambda s: s.arguments["experts"])
        shares.append(
            (largest, max(LEAST_S, float(np.median([(s.median_s - base) / s.arguments["experts"] for s in group]))))
        )
    return shares, base
