"""Figures of expert parallelism, one JSON object a line: read and checked; nothing in them stops a run.

Modelled: every key of the format (docs/field.md); a line that is no figure, or lacks what a prediction needs, is kept with the
reason. Ignored: keys that are not known, and predictions of others that stand beside some figures (`decode_step_ms`,
`prefill_tps_gpu`, `decode_share`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....base.errors import InputError
from ....base.text_files import read_text
from ....base.units import MIB

MAX_BYTES = 64 * MIB
BUNDLED = Path(__file__).parents[1] / "data" / "parallel.jsonl"
KINDS = ("serving-decode", "serving-prefill", "serving-mixed", "kernel", "exchange", "difference", "derived")
TIMES = ("tpot", "step", "ms", "us", "ttft")
"""How names of metrics begin, or are, where less is better."""
_MOST = 1e18


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a file of figures."""

    id: str
    row: Mapping[str, Any]
    folder: Path
    """Where the configurations it names are found."""
    reason: str | None = None
    """Why nothing can be predicted for it, where that shows at once."""

    @property
    def measured(self) -> float:
        """The figure."""
        return float(self.row["measured"])

    @property
    def metric(self) -> str:
        """Which figure it is, as the row says it."""
        return self.text("metric") or ("ratio" if self.group == "difference" else "")

    @property
    def group(self) -> str:
        """Where it comes from."""
        return self.text("group") or "serving"

    @property
    def kind(self) -> str:
        """What it is scored as."""
        group = self.group
        if group in ("kernel-moe", "kernel-exchange", "difference", "derived"):
            return {"kernel-moe": "kernel", "kernel-exchange": "exchange"}.get(group, group)
        phase = self.text("phase")
        mixed = phase == "mixed" or self.number("osl") is not None
        return "serving-mixed" if mixed else "serving-prefill" if phase == "prefill" else "serving-decode"

    @property
    def is_time(self) -> bool:
        """Whether less is better."""
        word = self.metric.replace("/", "_").split("_")[0].split(" ")[0].lower()
        return word in TIMES

    @property
    def source(self) -> str:
        """Who published it: rows of one source are left out of fits together."""
        text = f"{self.text('source')} {self.id}".lower()
        for name, marks in _SOURCES.items():
            if any(mark in text for mark in marks):
                return name
        return (self.text("source") or self.id)[:60]

    def text(self, key: str) -> str:
        """Return a fact that is a word, empty where it is not stated."""
        found = self.row.get(key)
        return found if isinstance(found, str) else ""

    def number(self, key: str) -> float | None:
        """Return a fact above zero, None where it is not stated or no such number."""
        value = self.row.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        return float(value) if 0 < value < _MOST and math.isfinite(value) else None

    def count(self, key: str, default: int | None = None, most: int = 1 << 24) -> int | None:
        """Return a whole number above zero, `default` where it is not stated."""
        value = self.number(key)
        return default if value is None else max(1, min(most, round(value)))


_SOURCES: Mapping[str, tuple[str, ...]] = {
    "InferenceX": ("inferencex",), "Tenstorrent": ("tenstorrent",),
    "AIConfigurator": ("aiconfigurator", "silicon"),
    "DeepSeek": ("deepseek-ai/", "open-infra-index"), "LMSYS": ("lmsys",),
    "InferSim": ("infersim",), "vLLM": ("vllm", "llm-d"), "SGLang": ("sgl-project", "sglang"), "ROCm": ("rocm", "atom"),
}  # fmt: skip
"""Publishers, by words of a source or an id; the first that fits."""


def read_rows(path: str | os.PathLike[str] | None = None) -> list[Row]:
    """Return the figures of a file (the bundled ones for None), in its order; raises InputError where it cannot be read."""
    where = BUNDLED if path is None else Path(path)
    lines = [line for line in read_text(where, "reports", MAX_BYTES).splitlines() if line.strip()]
    if not lines:
        raise InputError("reports", os.fspath(where), "no line in it", "give a file of figures, one JSON object a line")
    return [_row(number, line, where.parent) for number, line in enumerate(lines, 1)]


def _row(number: int, line: str, folder: Path) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return Row(id=f"line {number}", row={}, folder=folder, reason="not JSON")
    if not isinstance(row, dict):
        return Row(id=f"line {number}", row={}, folder=folder, reason="not a JSON object")
    name = str(row.get("id") or f"line {number}")[:120]
    value = row.get("measured")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        return Row(id=name, row=row, folder=folder, reason="its figure is not a number above zero")
    return Row(id=name, row=row, folder=folder)
