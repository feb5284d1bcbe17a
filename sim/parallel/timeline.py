"""What ran when on every rank of an expert-parallel step: rows with the columns that all timelines share.

A row is an activity on a lane of a rank: kernels on `compute`, exchanges on the port towards other nodes (`inter`) and on
the port inside the node (`intra`). `bytes` are those the rank sends, `tokens` those it sends or computes. Rows of one lane
of one rank never overlap. Activities that take no time leave no row.
Ignored: what moved between which two ranks; the traffic matrices say that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ...base.errors import Internal
from ..policies.state import Array
from ..timeline import COLUMNS
from .program import EP_OPS

EP_LANES = ("compute", "inter", "intra")
LANE_COMPUTE, LANE_INTER, LANE_INTRA = range(3)
NUM_EP_LANES = 3
EP_RANK, EP_LANE, EP_OP, EP_LAYER, EP_MICRO, EP_GROUP, EP_START, EP_END, EP_BYTES, EP_TOKENS, EP_FIELDS = range(11)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpTimeline:
    """Rows of one step in canonical order (start, rank, lane), int64 [num_rows, EP_FIELDS]."""

    rows: Array
    step: int = 0

    def frame(self) -> pd.DataFrame:
        """Return the rows with the named columns that simulator and executor share; the device is the rank."""
        rows = self.rows
        return pd.DataFrame(
            {
                "lane": pd.Categorical.from_codes(rows[:, EP_LANE], categories=pd.Index(EP_LANES)),
                "op": pd.Categorical.from_codes(rows[:, EP_OP], categories=pd.Index(EP_OPS)),
                "step": np.full(len(rows), self.step, np.int64),
                "layer": rows[:, EP_LAYER],
                "expert": np.full(len(rows), -1, np.int64),
                "device": [f"rank {rank}" for rank in rows[:, EP_RANK].tolist()],
                "start_ns": rows[:, EP_START],
                "end_ns": rows[:, EP_END],
                "bytes": rows[:, EP_BYTES],
                "tokens": rows[:, EP_TOKENS],
            },
            columns=list(COLUMNS),
        )

    def check(self) -> None:
        """Return nothing; raises Internal when two rows of one lane overlap or a row ends before it starts."""
        rows = self.rows
        if np.any(rows[:, EP_END] <= rows[:, EP_START]):
            raise Internal("a timeline row ends before it starts")
        order = np.lexsort((rows[:, EP_START], rows[:, EP_LANE], rows[:, EP_RANK]))
        rows = rows[order]
        same = np.all(rows[1:, [EP_RANK, EP_LANE]] == rows[:-1, [EP_RANK, EP_LANE]], axis=1)
        if np.any(same & (rows[1:, EP_START] < rows[:-1, EP_END])):
            raise Internal("rows of one lane overlap")

    def to_csv(self) -> str:
        """Return the rows as text, byte-identical for equal timelines."""
        return self.frame().to_csv(index=False, lineterminator="\n")


def ep_canonical(rows: Array) -> Array:
    """Return rows sorted by (start, rank, lane): a lane runs one activity at a time, so no two rows compare equal."""
    order = np.lexsort((rows[:, EP_LANE], rows[:, EP_RANK], rows[:, EP_START]))
    return np.ascontiguousarray(rows[order])
