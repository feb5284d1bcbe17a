"""How stages 2 to 4 begin: which device, what identifies it, how its kernels are launched, and the file that goes on.

Modelled: kernels are launched as they were when the profile was measured. Stage 1 leaves what it found in OUT/tuned as well as in the
user's cache, so that another machine of the same kind, with an empty cache, takes it from there; where the two differ from what
stage 2 was measured with, the stage says so. Ignored: what a stage does (`copies`, `validation`, `speedups`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.base.errors import InputError
from moeplan.base.jit import compiled
from moeplan.base.text_files import write_atomic
from moeplan.devices.device import metadata_of, open_device
from moeplan.kernels.tuning import cache_folder, device_slug

from .results import Results

CONFIGURATIONS = "launch_configurations"
_CHANGED = "launch configurations are others than when the profile was measured: measure again in an empty folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a stage begins with."""

    kind: str
    """cuda; cpu in a dry run."""
    told: Mapping[str, Any]
    """What identifies the device."""
    results: Results
    warnings: tuple[str, ...]
    """What makes its results doubtful."""


def open_results(out: Path, stage: str, *, dry: bool, deadline_s: float) -> Opening:
    """Return the device of a stage and its file OUT/STAGE.json; raises InputError where there is no GPU or the file is of another run."""
    kind = "cpu" if dry else "cuda"
    device = open_device(kind)
    try:
        found, wait = metadata_of(device), device.synchronize
    finally:
        device.close()
    told: dict[str, Any] = {**found, "decisions": "compiled" if compiled() else "plain Python"}
    warnings: tuple[str, ...] = ()
    if not dry:
        bring_configurations(out)
        now = configurations(str(found["name"]))
        told[CONFIGURATIONS] = calibrated_with(out) or now
        if told[CONFIGURATIONS] != now:
            warnings = (_CHANGED,)
            print(f"WARNING {_CHANGED}", file=sys.stderr)
    results = Results(out / f"{stage}.json", stage=stage, dry=dry, device=told, deadline_s=deadline_s, alive=wait)
    return Opening(kind=kind, told=told, results=results, warnings=warnings)


def bring_configurations(out: Path) -> None:
    """Put what stage 1 has found where kernels look for it, unless something is there already or nothing can be put there."""
    for kept in sorted((out / "tuned").glob("*.json")):
        used = cache_folder() / kept.name
        if not used.exists():
            with contextlib.suppress(OSError, InputError):
                used.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(used, kept.read_text(encoding="utf-8"))


def configurations(device_name: str) -> str:
    """Return a digest of what searches have found for a device."""
    used = cache_folder() / f"{device_slug(device_name)}.json"
    return hashlib.sha256(used.read_bytes()).hexdigest()[:16] if used.exists() else "as shipped"


def calibrated_with(out: Path) -> str | None:
    """Return the digest with which stage 2 began to measure; None where it has not."""
    path = out / "copies.json"
    if not path.exists():
        return None
    found: str | None = json.loads(path.read_text(encoding="utf-8")).get("device", {}).get(CONFIGURATIONS)
    return found
