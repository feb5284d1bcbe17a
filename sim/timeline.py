"""What ran when: timeline rows, their order, and their summary as busy time per lane.

Simulator and executor write the same columns. A row is an activity on a lane: `lane, op, step, layer, expert, device,
start_ns, end_ns, bytes, tokens`. `layer` counts MoE layers; `expert` is -1 where an activity concerns no single expert
(the dense part, a grouped kernel). A transfer cut into chunks has one row a chunk. Rows of one lane never overlap.
Ignored: activities that take no time; they leave no row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..base.errors import Internal
from ..base.records import Array, whole_numbers

LANE_NAMES = ("compute", "h2d", "d2h", "cpu", "disk", "host")
COMPUTE, H2D, D2H, CPU, DISK, HOST = range(6)
NUM_LANES = len(LANE_NAMES)
# Lanes whose activities slow each other down: the first ones. A disk is slow enough not to be noticed; the host only waits.
NUM_RATED_LANES = 4
RATE_ONE = 65536
"""Work units per nanosecond at full speed: rates are whole 65,536ths."""

OP_NAMES = (
    "dense", "expert", "head", "fetch", "prefetch", "write-back",
    "host layer", "host submit", "host launch", "host step", "cpu expert", "disk read",
)  # fmt: skip
(
    OP_DENSE, OP_EXPERT, OP_HEAD, OP_DEMAND, OP_PREFETCH, OP_BACK,
    OP_HOST_LAYER, OP_HOST_SUBMIT, OP_HOST_LAUNCH, OP_HOST_STEP, OP_CPU, OP_DISK,
) = range(12)  # fmt: skip

COLUMNS = ("lane", "op", "step", "layer", "expert", "device", "start_ns", "end_ns", "bytes", "tokens")
# Columns of the integer form; the device is the timeline's, not a row's.
ROW_LANE, ROW_OP, ROW_STEP, ROW_LAYER, ROW_EXPERT, ROW_START, ROW_END, ROW_BYTES, ROW_TOKENS, ROW_FIELDS = range(10)
ROW = whole_numbers("lane", "op", "step", "layer", "expert", "start", "end", "bytes", "tokens")
"""The same columns as a record's fields, for compiled code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Rows in canonical order (start, lane, end) as int64 [num_rows, ROW_FIELDS], all on one device."""

    rows: Array
    device: str = "device 0"
    cards: tuple[int, ...] = ()
    """Where several cards work at once: the card of each MoE layer, then that of the head."""

    def frame(self) -> pd.DataFrame:
        """Return the rows with the named columns that simulator and executor share."""
        rows = self.rows
        return pd.DataFrame(
            {
                "lane": pd.Categorical.from_codes(rows[:, ROW_LANE], dtype=pd.CategoricalDtype(list(LANE_NAMES))),
                "op": pd.Categorical.from_codes(rows[:, ROW_OP], dtype=pd.CategoricalDtype(list(OP_NAMES))),
                "step": rows[:, ROW_STEP],
                "layer": rows[:, ROW_LAYER],
                "expert": rows[:, ROW_EXPERT],
                "device": self.device if not self.cards else [f"card {card}" for card in self.row_cards().tolist()],
                "start_ns": rows[:, ROW_START],
                "end_ns": rows[:, ROW_END],
                "bytes": rows[:, ROW_BYTES],
                "tokens": rows[:, ROW_TOKENS],
            },
            columns=list(COLUMNS),
        )

    def steps(self, first: int, last: int) -> Timeline:
        """Return only the rows of steps `first` to `last`, both included."""
        keep = (self.rows[:, ROW_STEP] >= first) & (self.rows[:, ROW_STEP] <= last)
        return Timeline(rows=self.rows[keep], device=self.device, cards=self.cards)

    def row_cards(self) -> Array:
        """Return the card of each row, 0 where there is one."""
        if not self.cards:
            return np.zeros(len(self.rows), np.int64)
        of_head = np.isin(self.rows[:, ROW_OP], (OP_HEAD, OP_HOST_STEP))
        return np.array(self.cards, np.int64)[np.where(of_head, len(self.cards) - 1, self.rows[:, ROW_LAYER])]

    def busy_ns(self) -> dict[str, int]:
        """Return the time each lane was busy."""
        length = self.rows[:, ROW_END] - self.rows[:, ROW_START]
        return {name: int(length[self.rows[:, ROW_LANE] == lane].sum()) for lane, name in enumerate(LANE_NAMES)}

    def check(self) -> None:
        """Return nothing; raises Internal when two rows of one lane overlap or a row ends before it starts."""
        if np.any(self.rows[:, ROW_END] <= self.rows[:, ROW_START]):
            raise Internal("a timeline row ends before it starts")
        cards = self.row_cards()
        for card in np.unique(cards):
            for lane, name in enumerate(LANE_NAMES):
                mine = self.rows[(self.rows[:, ROW_LANE] == lane) & (cards == card)]
                if np.any(mine[1:, ROW_START] < mine[:-1, ROW_END]):
                    raise Internal(f"rows of lane {name} overlap")

    def to_csv(self) -> str:
        """Return the rows as text, byte-identical for equal timelines."""
        return self.frame().to_csv(index=False, lineterminator="\n")


def canonical(rows: Array) -> Array:
    """Return rows sorted by (start, lane, end, step, layer, operation): lanes of a card do not overlap, so no two rows compare equal."""
    order = np.lexsort(
        (
            rows[:, ROW_OP],
            rows[:, ROW_LAYER],
            rows[:, ROW_STEP],
            rows[:, ROW_END],
            rows[:, ROW_LANE],
            rows[:, ROW_START],
        )
    )
    return np.ascontiguousarray(rows[order])


def plain_rows(rows: Array) -> Array:
    """Return ROW [num_rows] as int64 [num_rows, ROW_FIELDS], the same memory."""
    return rows.view(np.int64).reshape(len(rows), ROW_FIELDS)
