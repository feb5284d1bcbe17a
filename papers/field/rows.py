"""Field reports, one JSON object a line: read and checked; nothing in them stops a run.

Modelled: every key of the format (docs/field.md); a line that is no report, or lacks what a prediction needs, is kept with
the reason. Ignored: keys that are not known.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.errors import InputError
from ...base.text_files import read_text
from ...base.units import MIB

MAX_BYTES = 64 * MIB
METRICS = ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s")
_MOST = 1e18
_CORES = ("cpu-moe", "n-cpu-moe", "gpu-experts", "cpu")
_CACHES = ("expert-cache", "fetch")
BUNDLED = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One line of a file of reports."""

    id: str
    row: Mapping[str, Any]
    folder: Path
    """Where the configurations it names are found."""
    reason: str | None = None
    """Why nothing can be predicted for it, where that shows at once."""

    def part(self, name: str) -> Mapping[str, Any]:
        """Return the table called `name`, empty where it is absent."""
        found = self.row.get(name)
        return found if isinstance(found, Mapping) else {}

    @property
    def measured(self) -> float:
        """The figure."""
        return float(self.row["value"])

    @property
    def metric(self) -> str:
        """Which figure it is."""
        return str(self.row["metric"])

    @property
    def decodes(self) -> bool:
        """Whether the figure is of decoding."""
        return self.metric == "decode_tokens_per_s"

    @property
    def rig(self) -> str:
        """The machine it came from."""
        return str(self.row.get("rig") or self.id)

    @property
    def kind(self) -> str:
        """What it is scored as: gpu-, cpu- or cache-, decode or prefill."""
        placement = str(self.part("placement").get("kind"))
        where = "cpu" if placement in _CORES else "cache" if placement in _CACHES else "gpu"
        return f"{where}-{'decode' if self.decodes else 'prefill'}"

    @property
    def cards(self) -> list[Mapping[str, Any]]:
        """The cards in the box, one table a kind."""
        found = self.row.get("gpus")
        return [card for card in found if isinstance(card, Mapping)] if isinstance(found, list) else []

    @property
    def num_gpus(self) -> int:
        """How many cards that is."""
        return sum(cards_of(card) for card in self.cards)

    def number(self, part: str, key: str) -> float | None:
        """Return a number above zero of a table, None where it is not stated or not one."""
        return _positive(self.part(part).get(key))


def cards_of(card: Mapping[str, Any]) -> int:
    """Return how many cards a line of a report's cards stands for."""
    return int(_positive(card.get("count")) or 1)


def _positive(value: object) -> float | None:
    """Return a number above zero and of a size that any count or rate has, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 < value < _MOST and math.isfinite(value) else None


def read_reports(path: str | os.PathLike[str] | None = None) -> list[Report]:
    """Return the reports of a file (the bundled ones for None), in its order; raises InputError where it cannot be read."""
    where = BUNDLED / "reports.jsonl" if path is None else Path(path)
    lines = [line for line in read_text(where, "reports", MAX_BYTES).splitlines() if line.strip()]
    if not lines:
        raise InputError(
            "reports", os.fspath(where), "no line in it", "give a file of field reports, one JSON object a line"
        )
    return [_report(number, line, where.parent) for number, line in enumerate(lines, 1)]


def _report(number: int, line: str, folder: Path) -> Report:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return Report(id=f"line {number}", row={}, folder=folder, reason="not JSON")
    if not isinstance(row, dict):
        return Report(id=f"line {number}", row={}, folder=folder, reason="not a JSON object")
    name = str(row.get("id") or f"line {number}")[:80]
    value, metric = row.get("value"), row.get("metric")
    reason = None
    if metric not in METRICS:
        reason = "an unknown metric"
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        reason = "its value is not a number above zero"
    return Report(id=name, row=row, folder=folder, reason=reason)
