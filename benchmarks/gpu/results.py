"""What a stage of GPU measurements has found so far: named parts in one JSON file, written whole after each.

Modelled: a part that is finished is never repeated; one that failed or was cut short is tried again by the next run, after all
others, so that a part that hangs cannot stand in the way of the rest for ever. Results of another device, another version of torch
or another kind of run (dry) are refused, not mixed. Ignored: what is measured (`copies`, `validation`, `speedups`,
`kernels`).
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import moeplan
from moeplan.base.errors import InputError, MoeplanError

SCHEMA_VERSION = 1
IDENTITY = ("kind", "name", "torch")
_TRACE_LINES = 6
_LEAST_PACE = 0.5

Part = tuple[str, Callable[[], dict[str, Any]]]


class DeviceLost(MoeplanError):
    """The device answers no more; a new process may."""

    exit_status = 75

    def __init__(self, part: str, why: str) -> None:
        super().__init__(" ".join(f"the device was lost in {part!r}: {why}; run again to go on".split()))


class Results:
    """The file of one stage.

    deadline_s: on the clock of `time.monotonic`; no part begins after it. Raises InputError where the file at `path` holds results
    of another device or run.
    """

    def __init__(
        self,
        path: Path,
        *,
        stage: str,
        dry: bool,
        device: Mapping[str, Any],
        deadline_s: float,
        alive: Callable[[], object] = lambda: None,
    ) -> None:
        self.path, self.deadline_s, self._alive = path, deadline_s, alive
        self.document: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "stage": stage,
            "dry": dry,
            "produced_by": f"moeplan {moeplan.__version__}",
            "device": dict(device),
            "complete": False,
            "pending": [],
            "left_out": {},
            "failures": {},
            "begun": [],
            "parts": {},
        }
        if path.exists():
            self._resume(json.loads(path.read_text(encoding="utf-8")))

    @property
    def parts(self) -> dict[str, Any]:
        """What each finished part found."""
        found: dict[str, Any] = self.document["parts"]
        return found

    def run(
        self,
        parts: Sequence[Part],
        *,
        require: int | None = None,
        expected_s: Mapping[str, float | None] | None = None,
    ) -> None:
        """Do every part that is not done yet, while there is time; unfinished business of earlier runs comes last.

        require: how many parts at the front the others cannot do without; when one of them is missing, the others are not tried.
        expected_s: how long parts are expected to take. One that would not be done in time makes way for later ones; nothing is
        begun that can only be cut short, unless nothing else was done: then a larger budget would not help it either.
        Raises DeviceLost where the device stops answering.
        """
        document, expected = self.document, expected_s or {}
        names = [name for name, _ in parts]
        self._note_pending(names, expected)
        left = [(place, name, work) for place, (name, work) in enumerate(parts) if name not in self.parts]
        left.sort(key=lambda one: (one[1] in document["begun"] and one[0] >= (require or 0), one[0]))
        began = len(left)
        while left and time.monotonic() <= self.deadline_s:
            fitting = (at for at, (_, name, _) in enumerate(left) if self._fits(expected.get(name)))
            at = next(fitting, 0 if len(left) == began else None)
            if at is None:
                break
            place, name, work = left.pop(at)
            missing = [other for other in names[: require or 0] if other not in self.parts]
            if missing and place >= (require or 0):
                break
            self._one(name, work, expected.get(name))
        self._note_pending(names, expected)
        self.save()

    def _note_pending(self, names: Sequence[str], expected: Mapping[str, float | None]) -> None:
        """Note what is still to do and, of what did not fail, how long it would take."""
        document, pace = self.document, self._pace()
        pending = dict.fromkeys([*document["pending"], *names])
        document["pending"] = [name for name in pending if name not in self.parts]
        document["left_out"] = {
            name: None if (seconds := expected.get(name)) is None else round(seconds * pace, 1)
            for name in document["pending"]
            if name not in document["failures"]
        }

    def _fits(self, expected_s: float | None) -> bool:
        """Return whether a part would be done in time; where nothing is expected, whether it may begin."""
        left = self.deadline_s - time.monotonic()
        return left >= 0 if expected_s is None else expected_s * self._pace() <= left

    def _pace(self) -> float:
        """Return how much longer parts have taken than expected, earlier runs included; none is counted on to be much shorter."""
        known = [part for part in self.parts.values() if part.get("expected_s")]
        expected = sum(part["expected_s"] for part in known)
        return max(_LEAST_PACE, float(sum(part["took_s"] for part in known) / expected)) if expected else 1.0

    def close(self, **found: Any) -> bool:
        """Write the stage's figures beside its parts; return whether all parts are done."""
        self.document |= found
        self.document["complete"] = not self.document["pending"]
        if self.document["complete"]:
            self.document["begun"] = []
        self.save()
        return bool(self.document["complete"])

    def save(self) -> None:
        """Write the file, aside first."""
        write_json(self.path, self.document)

    def _one(self, name: str, work: Callable[[], dict[str, Any]], expected_s: float | None) -> None:
        document = self.document
        document["begun"] = [*dict.fromkeys([*document["begun"], name])]
        self.save()
        began = time.monotonic()
        try:
            found = work()
        except Exception as error:  # noqa: BLE001 - one part must not cost the others
            last = "".join(traceback.format_exc().splitlines(keepends=True)[-_TRACE_LINES:])
            said = f"{type(error).__name__}: {error}"
            document["failures"][name] = {"error": said, "trace": last}
            self.save()
            print(f"FAILED {name}: {said}", file=sys.stderr)
            try:
                self._alive()
            except Exception as dead:  # noqa: BLE001 - whatever it is, it is said
                raise DeviceLost(name, str(dead)) from None
            return
        took = time.monotonic() - began
        self.parts[name] = {"took_s": round(took, 3), "expected_s": expected_s, **found}
        document["failures"].pop(name, None)
        document["begun"].remove(name)
        self.save()
        print(f"{took:6.1f} s  {name}", file=sys.stderr)

    def _resume(self, before: Any) -> None:
        document = self.document
        old = before.get("device", {}) if isinstance(before, dict) else {}
        same = {
            "schema_version": (before.get("schema_version"), SCHEMA_VERSION),
            "dry": (before.get("dry"), document["dry"]),
            "produced_by": (before.get("produced_by"), document["produced_by"]),
            **{key: (old.get(key), document["device"].get(key)) for key in IDENTITY},
        }
        for key, (theirs, mine) in same.items():
            if theirs != mine:
                raise InputError(
                    str(self.path), f"{key} {theirs}", f"this run's is {mine}", "choose an empty folder with OUT="
                )
        for key in ("parts", "begun", "failures"):
            document[key] = before[key]


def write_json(path: Path, document: Mapping[str, Any]) -> Path:
    """Return `path`, which now holds `document`, written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)
    return path


def target(name: str, goal: float, got: float | None, *, at_most: bool, dry: bool, **more: Any) -> dict[str, Any]:
    """Return one target as it stands in a stage's file: `met` is None where nothing real was measured."""
    met = None if dry or got is None else bool(got <= goal if at_most else got >= goal)
    return {"name": name, "target": goal, "at_most": at_most, "got": got, "met": met, **more}
