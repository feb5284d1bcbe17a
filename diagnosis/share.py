"""What was measured, as lines of a file of field reports that others can predict, and that `reproduce field --reports` reads.

Modelled: one line a figure with machine, model, weight format, placement and requests as they were predicted; lines that
are there stay, the same line is not written twice. Ignored: the command itself, which may hold paths and names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..base.errors import InputError
from ..base.text_files import read_text, write_atomic
from ..base.units import MIB
from ..papers.field.rows import read_reports
from ..specs.models.load import list_models
from .case import Case, described_machine

_MOST_BYTES = 64 * MIB
_DIGITS = 12


def report_rows(case: Case, measured: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    """Return one line of a file of field reports for each (metric, figure).

    Raises InputError for a machine that is not made of parts of the catalogue and for a model that is not bundled.
    """
    if case.parts is None:
        raise InputError(
            "--share", case.profile.name, "reports say what a machine consists of", "name the machine by its parts"
        )
    if case.model_name not in list_models():
        raise InputError("--share", case.model_name, "reports name bundled models", "name one (moeplan model list)")
    machine = described_machine(case.parts)
    rows = []
    for metric, value in measured:
        row = case.row(metric, value) | machine
        row |= {"rig": f"own/{_hash(machine)}", "source": "moeplan diagnose --share"}
        row["id"] = f"own-{_hash(row)}"
        rows.append(row)
    return rows


def share(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> int:
    """Return how many lines were added to a file of field reports, which is made where it is absent; raises InputError for another file."""
    before: list[str] = []
    if Path(path).exists():
        before = [line for line in read_text(path, "--share", _MOST_BYTES).splitlines() if line.strip()]
        if before and any(report.reason is not None for report in read_reports(path)):
            raise InputError("--share", os.fspath(path), "holds lines that are no field reports", "name another file")
    added = [
        text for text in (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows) if text not in before
    ]
    write_atomic(path, "".join(f"{line}\n" for line in (*before, *added)))
    return len(added)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_DIGITS]
