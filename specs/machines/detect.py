"""The parts of this computer, as far as they can be seen without asking for rights.

Modelled: cards from nvidia-smi, else from lspci; the processor and its sockets from /proc/cpuinfo; memory from /proc/meminfo, its
kind, speed and channels from dmidecode where that is allowed. What cannot be seen is listed, with what to write instead.
Ignored: disks, and everything about a card but its name, memory and link.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...base.errors import InputError
from ...base.units import GIB, KIB, MIB
from .catalogue import find_cpu, find_gpu
from .parts import CpuPart, GpuPart, MemoryPart, Parts

_WAIT_S = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected:
    """What was seen of a computer, and what was not."""

    parts: Parts
    unseen: list[str] = field(default_factory=list)
    """In words: what could not be seen, and how to state it."""


def detect(proc: Path = Path("/proc")) -> Detected:
    """Return the parts of this computer; raises InputError where neither card nor processor is known."""
    unseen: list[str] = []
    gpu, num_gpus, pcie = _gpu(unseen)
    cpu, sockets, cores = _cpu(proc, unseen)
    memory = _memory(proc, cpu, sockets, unseen)
    if gpu is None and cpu is None:
        raise InputError(
            "--detect", "this computer", f"no part of it is in the catalogue ({'; '.join(unseen)})", "name its parts"
        )
    parts = Parts(
        gpu=gpu, num_gpus=min(num_gpus, 1), cpu=cpu, sockets=sockets, memory=memory, pcie=pcie, disk_bytes_per_s=None,
        threads=cores if cpu is not None and cores != cpu.cores * sockets else None,
    )  # fmt: skip
    unseen.append("the disk's rate: add disk:7GB/s")
    return Detected(parts=parts, unseen=unseen)


def _run(*command: str) -> str | None:
    """Return what a program prints, None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_WAIT_S, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _gpu(unseen: list[str]) -> tuple[GpuPart | None, int, str | None]:
    query = "name,memory.total,pcie.link.gen.max,pcie.link.width.max"
    text = _run("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits")
    if text is not None and text.strip():
        return _from_nvidia_smi(text, unseen)
    text = _run("lspci")
    for line in (text or "").splitlines():
        if re.search(r"VGA compatible|3D controller|Display controller", line):
            name = re.sub(r".*\[(.*?)\].*", r"\1", line.split(": ", 1)[-1])
            try:
                return find_gpu(name), 1, None
            except InputError:
                unseen.append(f"the card {name[:60]!r}: write it as name:memory=…,bandwidth=…,fp16=…")
    unseen.append("a card: none was found by nvidia-smi or lspci")
    return None, 0, None


def _from_nvidia_smi(text: str, unseen: list[str]) -> tuple[GpuPart | None, int, str | None]:
    rows = [[cell.strip() for cell in line.split(",")] for line in text.strip().splitlines()]
    name, mib, generation, lanes = (rows[0] + ["", "", ""])[:4]
    try:
        gpu = find_gpu(name)
    except InputError:
        unseen.append(f"the card {name!r}: write it as name:memory=…,bandwidth=…,fp16=…")
        return None, 0, None
    if mib.isdigit():
        gpu = replace(gpu, memory_bytes=int(mib) * MIB)
    if len(rows) > 1:
        unseen.append(f"{len(rows) - 1} more cards: one is taken")
    link = f"{generation}.0x{lanes}" if generation.isdigit() and lanes.isdigit() and gpu.pcie is not None else None
    return gpu, len(rows), link


def _cpu(proc: Path, unseen: list[str]) -> tuple[CpuPart | None, int, int]:
    try:
        text = (proc / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        unseen.append("the processor: /proc/cpuinfo cannot be read; name one")
        return None, 1, 1
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    sockets = max(1, len(set(re.findall(r"^physical id\s*:\s*(\d+)$", text, re.MULTILINE))))
    cores = len(set(re.findall(r"^physical id\s*:\s*(\d+)\n(?:.*\n)*?core id\s*:\s*(\d+)$", text, re.MULTILINE)))
    threads = len(re.findall(r"^processor\s*:", text, re.MULTILINE))
    if name is None:
        unseen.append("the processor's name; name one")
        return None, sockets, cores or threads
    try:
        return find_cpu(name[1]), sockets, cores or threads
    except InputError:
        unseen.append(f"the processor {name[1][:60]!r} is not in the catalogue: name the nearest one")
        return None, sockets, cores or threads


def _memory(proc: Path, cpu: CpuPart | None, sockets: int, unseen: list[str]) -> MemoryPart | None:
    try:
        found = re.search(r"^MemTotal:\s*(\d+) kB$", (proc / "meminfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    capacity = int(found[1]) * KIB if found else None
    text = _run("dmidecode", "--type", "17") or ""
    speeds = [int(speed) for speed in re.findall(r"Configured Memory Speed:\s*(\d+) MT/s", text)]
    kinds = [kind.lower() for kind in re.findall(r"^\s*Type:\s*((?:LP)?DDR[345]X?)\s*$", text, re.MULTILINE)]
    if speeds and kinds:
        channels = min(len(speeds), (cpu.channels if cpu is not None else 2) * sockets)
        return MemoryPart(kind=kinds[0], mt_per_s=min(speeds), channels=channels, capacity_bytes=capacity)
    unseen.append(
        "the memory's kind, speed and channels (dmidecode needs rights): what the processor is sold for is taken"
    )
    if cpu is None:
        return None
    return MemoryPart(
        kind=cpu.memory, mt_per_s=cpu.max_mt_per_s, channels=cpu.channels * sockets,
        capacity_bytes=capacity if capacity is None else max(GIB, capacity),
    )  # fmt: skip
