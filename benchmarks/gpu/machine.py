"""What a GPU run is going to stand on, told before anything is measured: decisions, cores, memory, the disk below.

Modelled: what has made whole runs worthless without anybody noticing: decisions that are not compiled (the host then takes longer than
the GPU), a host with less memory than the experts need, a temporary folder that is not on a disk. Ignored: the GPU itself, which each
stage names in its results. Neither torch nor a GPU is needed.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

from moeplan.base.jit import compiled
from moeplan.base.units import GIB
from moeplan.devices.host_memory import available_host_bytes

_IN_MEMORY = ("tmpfs", "ramfs")


def lines() -> list[str]:
    """Return one line for each thing that a run stands on; a WARNING says what its results would not be."""
    return [decisions(), host(), disk(Path(tempfile.gettempdir()))]


def decisions() -> str:
    """Return whether the decisions of schedules, and the simulator, are compiled here."""
    if compiled():
        return f"decisions: compiled (numba {importlib.metadata.version('numba')})"
    return f"WARNING decisions: plain Python ({_why_not()}); hosts take many times longer, so no figure of stages 2 to 4 is this machine's"


def host() -> str:
    """Return how many cores and how much memory there are."""
    return f"host: {len(os.sched_getaffinity(0))} cores, {available_host_bytes() / GIB:.0f} GiB of memory available"


def disk(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Return where experts below the host's memory will lie, and how much is free there."""
    kind = _file_system(folder, mounts)
    free = shutil.disk_usage(folder).free / GIB
    if kind in _IN_MEMORY:
        return f"WARNING disk: {folder} lies in memory ({kind}); set TMPDIR to a folder on a disk, or the disk's figures are memory's"
    return f"disk: {folder} ({kind}), {free:.0f} GiB free"


def _why_not() -> str:
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set"
    try:
        import numba  # noqa: F401 - only whether it can be had
    except ImportError as error:
        return " ".join(f"{error}".split())
    return "numba came too late"


def _file_system(folder: Path, mounts: Path) -> str:
    """Return the kind of the file system that a folder is on, as the system lists it."""
    try:
        rows = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return "unknown"
    here = folder.resolve()
    above = [
        (len(Path(row[1]).parts), at, row[2])
        for at, row in enumerate(rows)
        if len(row) > 2 and here.is_relative_to(row[1])
    ]
    return max(above)[2] if above else "unknown"
