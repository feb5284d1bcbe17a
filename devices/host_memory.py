"""How much of the host's memory a program may still take: what the system has left, and what its control group allows.

Modelled: the kernel's own estimate of what can be taken without swapping, and the limits of the control groups (version 1 or
2) that the process is in, whose file cache counts as free because it is given up first. Ignored: limits on address space,
memory that other programs are about to take.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def available_host_bytes(root: Path = Path("/")) -> int:
    """Return the memory that this process can still take. root: where `proc` and `sys` are found (for tests)."""
    found = [_system_bytes(root), *_group_bytes(root)]
    return max(0, min(found))


def _system_bytes(root: Path) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_bytes(root: Path) -> list[int]:
    """Return what each control group above the process leaves, where it limits anything."""
    found = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            base, names = (root / "sys/fs/cgroup/memory", _V1) if controllers else (root / "sys/fs/cgroup", _V2)
            folder = base / path.strip("/")
            if not folder.is_dir():
                folder = base  # inside a container the path may be the host's, and only its own group is mounted
            while True:
                left = _left(folder, *names)
                if left is not None:
                    found.append(left)
                if folder == base:
                    break
                folder = folder.parent
    return found


def _left(folder: Path, limit: str, used: str, cached: str) -> int | None:
    """Return what one group leaves; None where it has no limit or does not say."""
    try:
        most = (folder / limit).read_text().strip()
        taken = int((folder / used).read_text())
    except (OSError, ValueError):
        return None
    if not most.isdigit():  # "max"
        return None
    reclaimed = 0
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == cached:
                reclaimed = int(value)
    return int(most) - taken + min(reclaimed, taken)
