"""The parts of this computer, as far as they can be seen without asking for rights.

Modelled: cards from nvidia-smi, else rocm-smi, else lspci; the processor and its sockets from /proc/cpuinfo; memory from /proc/meminfo, its
kind, speed and channels from dmidecode where that is allowed; Apple's chips from sysctl. What cannot be seen, or only guessed at (a chip
that is sold as several cards, a virtual machine's sockets), is listed, with what to write instead. Ignored: disks, and
everything about a card but its name, memory and link.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...base.errors import InputError
from ...base.units import GIB, KIB, MIB
from .catalogue import known_cpu, known_gpu
from .notation import check_parts
from .parts import CpuPart, GpuPart, MemoryPart, Parts

_WAIT_S = 10
_CHANNEL_BITS = 64
_OWN_FIGURES = "write it as name:memory=…,bandwidth=…,fp16=…"
_CONSOLES = ("aspeed", "matrox", "cirrus", "qxl", "virtio", "vmware", "bochs", "hyper-v")
"""Makers of what shows a server's or a virtual machine's screen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected:
    """What was seen of a computer, and what was not."""

    parts: Parts
    unseen: list[str] = field(default_factory=list)
    """In words: what could not be seen, and how to state it."""


def detect(proc: Path = Path("/proc")) -> Detected:
    """Return the parts of this computer; raises InputError where neither card nor processor is known."""
    unseen: list[str] = []
    gpu, _, pcie = _gpu(unseen)
    cpu, sockets, cores = (None, 1, 1) if gpu is not None and gpu.backend == "metal" else _cpu(proc, unseen)
    if gpu is not None and gpu.unified_memory:
        gpu, memory = _shared_memory(gpu, proc), None
    else:
        memory = _memory(proc, cpu, sockets, unseen)
    if gpu is None and cpu is None:
        raise InputError(
            "--detect", "this computer", f"no part of it is in the catalogue ({'; '.join(unseen)})", "name its parts"
        )
    parts = Parts(
        gpu=gpu, cpu=cpu, sockets=sockets, memory=memory, pcie=pcie, disk_bytes_per_s=None,
        threads=cores if cpu is not None and cores != cpu.cores * sockets else None,
    )  # fmt: skip
    unseen.append("the disk's rate: add disk:7GB/s")
    return Detected(parts=_possible(parts, unseen), unseen=unseen)


def _run(*command: str) -> str | None:
    """Return what a program prints, None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_WAIT_S, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _possible(parts: Parts, unseen: list[str]) -> Parts:
    """Return the parts without those that cannot stand beside the others: something was misread."""
    for _ in range(3):
        try:
            check_parts(parts)
        except InputError as error:
            unseen.append(f"{error.field}: what was read is not possible ({error}); state it")
            if error.field == "pcie":
                parts = replace(parts, pcie=None)
            elif error.field == "memory":
                parts = replace(parts, memory=None)
            elif parts.gpu is not None:
                parts = replace(parts, cpu=None, sockets=1)
    return parts


# --- cards -------------------------------------------------------------------------------------------------------------


def _gpu(unseen: list[str]) -> tuple[GpuPart | None, int, str | None]:
    """Return the first card, how many there are, and its link where that is seen."""
    query = "name,memory.total,pcie.link.gen.max,pcie.link.width.max"
    text = _run("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits")
    if text is not None and text.strip():
        return _from_nvidia_smi(text, unseen)
    text = _run("rocm-smi", "--showproductname", "--showmeminfo", "vram")
    if text is not None and (cards := _from_rocm_smi(text)):
        return _first(cards, unseen), len(cards), None
    chip = _run("sysctl", "-n", "machdep.cpu.brand_string")
    if chip is not None and chip.startswith("Apple"):
        unseen.append(
            "how many GPU cores this chip has: the most are taken; smaller ones are named like m4-max-32-core"
        )
        return _named(chip.strip(), unseen), 1, None
    found = _from_lspci(_run("lspci") or "", unseen)
    if found is None:
        unseen.append("a card: none was recognised by nvidia-smi, rocm-smi or lspci; name it")
    return found, int(found is not None), None


def _named(name: str, unseen: list[str]) -> GpuPart | None:
    gpu = known_gpu(name)
    if gpu is None:
        unseen.append(f"the card {name[:60]!r}: {_OWN_FIGURES}")
    return gpu


def _first(cards: list[tuple[str, int | None]], unseen: list[str]) -> GpuPart | None:
    """Return the first of the cards that are given by name and bytes, with its memory as the driver sees it."""
    gpu = _named(cards[0][0], unseen)
    if len(cards) > 1:
        unseen.append(f"{len(cards) - 1} more cards: one is taken; name all of them, e.g. 2 x rtx-3090")
    if gpu is None or cards[0][1] is None or gpu.unified_memory:
        return gpu
    # One name may stand for several sizes, at other speeds: the name with the size comes first.
    sized = known_gpu(f"{cards[0][0]} {round(cards[0][1] / GIB)}GB")
    return replace(sized or gpu, memory_bytes=cards[0][1])


def _from_nvidia_smi(text: str, unseen: list[str]) -> tuple[GpuPart | None, int, str | None]:
    rows = [[cell.strip() for cell in line.split(",")] for line in text.strip().splitlines()]
    cards = [(row[0], int(row[1]) * MIB if len(row) > 1 and row[1].isdecimal() else None) for row in rows]
    gpu = _first(cards, unseen)
    generation, lanes = (rows[0] + [""] * 4)[2:4]
    seen = gpu is not None and gpu.pcie is not None and generation.isdecimal() and lanes.isdecimal()
    return gpu, len(rows), f"{generation}.0x{lanes}" if seen else None


def _from_rocm_smi(text: str) -> list[tuple[str, int | None]]:
    """Return name and bytes of every card."""
    names = dict(re.findall(r"GPU\[(\d+)\]\s*: Card series:\s*(\S.*)", text, re.IGNORECASE))
    sizes = dict(re.findall(r"GPU\[(\d+)\]\s*: VRAM Total Memory \(B\):\s*(\d+)", text, re.IGNORECASE))
    return [(name.strip(), int(sizes[card]) if card in sizes else None) for card, name in names.items()]


def _from_lspci(text: str, unseen: list[str]) -> GpuPart | None:
    """Return the first card that is in the catalogue; a chip that is sold as several cards is listed with their names."""
    for line in text.splitlines():
        if not re.search(r"VGA compatible|3D controller|Display controller|Processing accelerators", line):
            continue
        device = line.split(": ", 1)[-1]
        if any(maker in device.lower() for maker in _CONSOLES):
            continue
        brackets = re.findall(r"\[([^]]*)\]", device)
        name = (brackets[-1] if brackets else device).replace("Max-Q / Mobile", "Mobile")
        choices = name.split("/")
        # "Radeon RX 7900 XT/7900 XTX": those after the first leave the family out.
        family = re.match(r"(?:.*\b(?:RX|RTX|GTX|Pro|PRO) )?", choices[0])
        full = [
            choices[0],
            *(one if known_gpu(one) else (family[0] if family else "") + one.strip() for one in choices[1:]),
        ]
        found = {gpu.name: gpu for one in full if (gpu := known_gpu(one)) is not None}
        if len(found) == 1 and len(choices) == 1:
            return next(iter(found.values()))
        if found:
            unseen.append(f"which card of this chip: {', '.join(found)}; name it")
        else:
            unseen.append(f"the card {name[:60]!r}: {_OWN_FIGURES}")
    return None


# --- processor and memory ------------------------------------------------------------------------------------------------


def _cpu(proc: Path, unseen: list[str]) -> tuple[CpuPart | None, int, int]:
    """Return the processor, its sockets and the cores that are there."""
    try:
        text = (proc / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        unseen.append("the processor: /proc/cpuinfo cannot be read; name one")
        return None, 1, 1
    name = re.search(r"^(?:model name|Model)\s*:[ \t]*([^\n]*[^\d\n][^\n]*)$", text, re.MULTILINE)
    sockets = max(1, len(set(re.findall(r"^physical id\s*:\s*(\d+)$", text, re.MULTILINE))))
    blocks = re.split(r"\n\s*\n", text)
    places = [
        (re.search(r"^physical id\s*:\s*(\d+)$", one, re.M), re.search(r"^core id\s*:\s*(\d+)$", one, re.M))
        for one in blocks
    ]
    cores = len({(socket[1], core[1]) for socket, core in places if socket is not None and core is not None})
    cores = cores or len(re.findall(r"^processor\s*:", text, re.MULTILINE)) or 1
    if name is None:
        unseen.append("the processor's name; name one")
        return None, sockets, cores
    cpu = known_cpu(name[1])
    if cpu is None:
        unseen.append(f"the processor {name[1].strip()[:60]!r} is not in the catalogue: name the nearest one")
        return None, sockets, cores
    virtual = re.search(r"^flags\s*:.*\bhypervisor\b", text, re.MULTILINE) is not None
    if sockets > cpu.sockets:
        unseen.append(f"sockets: {sockets} are shown, and {cpu.name} works in at most {cpu.sockets}; one is taken")
        sockets = 1
    if virtual or cores < cpu.cores * sockets:
        what = "a virtual machine" if virtual else "part of the cores"
        unseen.append(
            f"{what}: {cores} of {cpu.cores * sockets} cores are seen, and what of the memory's bandwidth they get is not"
        )
    return cpu, sockets, min(cores, cpu.cores * sockets)


def _memory_bytes(proc: Path) -> int | None:
    try:
        found = re.search(r"^MemTotal:\s*(\d+) kB$", (proc / "meminfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * KIB
    whole = (_run("sysctl", "-n", "hw.memsize") or "").strip()
    return int(whole) if whole.isdecimal() else None


def _shared_memory(gpu: GpuPart, proc: Path) -> GpuPart:
    """Return a chip with the memory it is sold with: the smallest size that holds what the system sees."""
    seen = _memory_bytes(proc)
    sizes = [size for size in gpu.memory_options_bytes if seen is not None and size >= seen]
    if not sizes:
        return gpu
    return known_gpu(f"{gpu.name} {min(sizes) // GIB}GB") or gpu


def _memory(proc: Path, cpu: CpuPart | None, sockets: int, unseen: list[str]) -> MemoryPart | None:
    capacity = _memory_bytes(proc)
    if capacity is None:
        unseen.append("the memory's size: write for instance ddr5-5600x2:64GiB")
    modules = []
    for device in (_run("dmidecode", "--type", "17") or "").split("Memory Device")[1:]:
        fields = dict(re.findall(r"^\s*([A-Za-z ]+):[ \t]*(.*?)\s*$", device, re.MULTILINE))
        speed = re.match(r"(\d+) MT/s", fields.get("Configured Memory Speed", ""))
        kind = re.fullmatch(r"(?:LP)?DDR[345]X?", fields.get("Type", ""), re.IGNORECASE)
        width = re.match(r"(\d+) bits", fields.get("Data Width", ""))
        if speed is not None and kind is not None:
            modules.append((kind[0].lower(), int(speed[1]), int(width[1]) if width is not None else _CHANNEL_BITS))
    if modules:
        # Two modules may share a channel, and soldered ones are narrower than one.
        filled = max(1, sum(width for _, _, width in modules) // _CHANNEL_BITS)
        channels = min(filled, (cpu.channels if cpu is not None else 2) * sockets)
        return MemoryPart(
            kind=modules[0][0],
            mt_per_s=min(speed for _, speed, _ in modules),
            channels=channels,
            capacity_bytes=capacity,
        )
    what = "the memory's kind, speed and channels (dmidecode needs rights)"
    if cpu is None:
        unseen.append(f"{what}: write for instance ddr5-5600x2:64GiB")
        return None
    unseen.append(f"{what}: what the processor is sold for is taken")
    return MemoryPart(
        kind=cpu.memory, mt_per_s=cpu.max_mt_per_s, channels=cpu.channels * sockets,
        capacity_bytes=capacity if capacity is None else max(GIB, capacity),
    )  # fmt: skip
