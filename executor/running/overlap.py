"""How long the rows of one lane ran beside those of another.

Modelled: two lanes whose own rows do not overlap. Ignored: how much slower either was for it; the fit finds that.
"""

from __future__ import annotations

import numpy as np

from ...sim.policies.state import Array
from ...sim.timeline import ROW_END, ROW_START


def overlap_ns(rows: Array, others: Array) -> Array:
    """Return float64 [num_rows]: how long some row of another lane, whose rows do not overlap, ran beside each row."""
    if len(others) == 0 or len(rows) == 0:
        return np.zeros(len(rows))
    others = others[np.argsort(others[:, ROW_START], kind="stable")]
    edges = np.concatenate([others[:, [ROW_START]], others[:, [ROW_END]]], 1).ravel().astype(float)
    busy = np.concatenate([[0.0], np.cumsum((others[:, ROW_END] - others[:, ROW_START]).astype(float))])
    levels = np.repeat(busy, 2)[1:-1]  # busy time at every edge: unchanged before a start, grown at an end
    until = np.interp(rows[:, ROW_END], edges, levels) - np.interp(rows[:, ROW_START], edges, levels)
    found: Array = np.maximum(until, 0.0)
    return found
