"""An unfinished calibration, kept aside as it goes, so that one that was stopped goes on where it was.

    {"schema_version": 1, "kind": "unfinished samples", "settings": {...}, "parts": {"0 ceilings": [...], ...}}

Modelled: parts in the order of measuring; a part is kept when it is complete. What it was measured with (device, software,
shapes, formats, extent) must be the same, or everything is measured anew. Ignored: parts of parts.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...base.errors import InputError
from ...base.text_files import note_written, write_atomic
from ..samples import SCHEMA_VERSION, Sample, sample_from_dict, sample_to_dict

_KIND = "unfinished samples"


@dataclass(slots=True)
class Journal:
    """The parts of a calibration that are done; `close` deletes the file when all of them are elsewhere."""

    path: Path
    settings: Mapping[str, Any]
    parts: dict[str, list[Sample]] = field(default_factory=dict)
    resumed: int = 0
    """Parts that an earlier run had done."""

    def part(self, name: str) -> list[Sample] | None:
        """Return the samples of a part that is done, None for one that is not."""
        return self.parts.get(name)

    def keep(self, name: str, samples: Sequence[Sample]) -> None:
        """Note that a part is done; raises InputError where the file cannot be written."""
        self.parts[name] = list(samples)
        document = {
            "schema_version": SCHEMA_VERSION,
            "kind": _KIND,
            "settings": dict(self.settings),
            "parts": {key: [sample_to_dict(sample) for sample in found] for key, found in self.parts.items()},
        }
        write_atomic(self.path, json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n", unfinished=True)

    def close(self) -> None:
        """Delete the file."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)


def journal_path(out: Path) -> Path:
    """Return where the unfinished calibration of profile `out` is kept."""
    return out.with_suffix(".unfinished.json")


def open_journal(path: Path, settings: Mapping[str, Any]) -> Journal:
    """Return the journal at `path`: with the parts of an earlier run where its settings were the same, else empty.

    A file that cannot be read as one, whole and of this version, counts as none: it can only save time.
    """
    plain = json.loads(json.dumps(settings))
    journal = Journal(path, plain)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if (document["kind"], document["schema_version"], document["settings"]) == (_KIND, SCHEMA_VERSION, plain):
            for name, rows in document["parts"].items():
                journal.parts[name] = [sample_from_dict(row, name) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, InputError):
        journal.parts.clear()
    journal.resumed = len(journal.parts)
    if journal.resumed:
        note_written(path, unfinished=True)
    return journal
