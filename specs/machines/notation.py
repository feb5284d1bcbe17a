"""A machine as it is written, in one line: read into its parts, checked, and written again.

    rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB [+ pcie-4.0x16] [+ disk:7GB/s]
    2 x epyc-9355 + ddr5-6400x24:768GiB

Modelled: which parts do not go together. Ignored: what is not written (`compose` assumes it), boards and their slots.
"""

from __future__ import annotations

import os
import re
from typing import TypeVar

from ...base.errors import InputError
from ...base.units import GIB, GIGA
from .catalogue import is_sized_gpu, known_cpu, known_gpu, sharing_cpus, unknown_gpu, unknown_part
from .parts import CpuPart, GpuPart, MemoryPart, Parts, counted, custom_gpu, parse_memory, parse_rate, pcie_bytes_per_s

T = TypeVar("T")


def is_parts(text: str) -> bool:
    """Return whether `text` describes a machine by its parts rather than by a bundled name or a file."""
    if os.path.exists(text) or text.endswith(".json"):
        return False
    return "+" in text or custom_gpu(text) is not None or known_gpu(text) is not None or known_cpu(text) is not None


def parse_parts(text: str) -> Parts:
    """Return the parts of "rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB".

    Raises UnknownName (with the nearest name) or InputError for a part that is unknown, twice there or impossible beside another.
    """
    gpu: GpuPart | None = None
    cpu: CpuPart | None = None
    memory: MemoryPart | None = None
    pcie: str | None = None
    disk: float | None = None
    num_gpus, sockets = 0, 1
    for piece in _pieces(text):
        if not piece:
            raise InputError(
                "hardware", text, "a part is empty", "write for instance rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB"
            )
        count, name = counted(piece)
        lowered = name.lower()
        if (found := parse_memory(name)) is not None:
            memory = _once(memory, found, "memory", text)
        elif lowered.startswith("pcie"):
            pcie_bytes_per_s(name)
            pcie = _once(pcie, lowered.removeprefix("pcie").strip(" -:"), "pcie", text)
        elif lowered.startswith("disk:"):
            disk = _once(disk, parse_rate(name[5:], "disk"), "disk", text)
        elif (card := custom_gpu(name)) is not None:
            gpu, num_gpus = _once(gpu, card, "gpu", text), count
        else:
            part = _part(name, gpu)
            if isinstance(part, CpuPart):
                cpu, sockets = _once(cpu, part, "cpu", text), count
            else:
                gpu, num_gpus = _once(gpu, part, "gpu", text), count
    parts = Parts(gpu=gpu, num_gpus=num_gpus, cpu=cpu, sockets=sockets, memory=memory, pcie=pcie, disk_bytes_per_s=disk)
    check_parts(parts)
    return parts


def _pieces(text: str) -> list[str]:
    """Return the parts of a text: a plus sign separates them, except where it ends a name ("Xeon 8480+", "AI Max+ 395")."""
    pieces: list[str] = []
    for piece in re.split(r"(?:^|\s)\+(?=\s|$)", text):
        whole = piece.strip()
        named = known_gpu(counted(whole)[1]) is not None or known_cpu(counted(whole)[1]) is not None
        pieces += [whole] if named else [part.strip() for part in whole.split("+")]
    return pieces


def _part(name: str, before: GpuPart | None) -> GpuPart | CpuPart:
    """Return the card or processor called `name`; raises InputError for neither, and for a number that several have.

    before: the card named so far. What has both on one chip is the chip, unless that is named already.
    """
    card, processor = known_gpu(name), known_cpu(name)
    if processor is not None and (
        name.lower() == processor.name or (before is not None and before.host == processor.name)
    ):
        return processor
    if card is not None and not card.unified_memory and (shared := sharing_cpus(name, processor)):
        raise InputError("hardware", name, f"may be {card.name} or {' or '.join(shared)}", "write the whole name")
    if card is not None:
        return card
    if processor is not None:
        return processor
    raise unknown_gpu(name) if is_sized_gpu(name) else unknown_part(name)


def check_parts(parts: Parts) -> None:
    """Return nothing; raises InputError where two parts do not go together."""
    gpu, cpu, memory = parts.gpu, parts.cpu, parts.memory
    if gpu is None and cpu is None:
        raise InputError("hardware", "parts", "neither a GPU nor a processor", "name at least one of them")
    if parts.num_gpus > 1:
        raise InputError("hardware", f"{parts.num_gpus} x {gpu.name if gpu else ''}", "several cards in one box are not modelled yet",
                         "name one card")  # fmt: skip
    if cpu is not None and parts.sockets > cpu.sockets:
        raise InputError(
            "cpu",
            f"{parts.sockets} x {cpu.name}",
            f"at most {cpu.sockets} of it work on one board",
            "correct the count",
        )
    if cpu is not None and gpu is not None and gpu.host not in (None, cpu.name):
        raise InputError("cpu", cpu.name, f"{gpu.name} has a processor of its own", "leave it out")
    if gpu is not None and gpu.unified_memory and memory is not None:
        raise InputError("memory", memory.kind, f"{gpu.name} has its own, which card and cores share",
                         f"leave it out, and write its size behind the name: {gpu.name}-{gpu.memory_bytes // GIB}gb")  # fmt: skip
    if cpu is not None and memory is not None:
        if memory.kind not in (cpu.memory, cpu.also):
            kinds = cpu.memory if cpu.also is None else f"{cpu.memory} or {cpu.also}"
            raise InputError("memory", memory.kind, f"{cpu.name} takes {kinds}", "choose memory of that kind")
        if memory.channels > cpu.channels * parts.sockets:
            most = cpu.channels * parts.sockets
            raise InputError(
                "memory", f"x{memory.channels}", f"{cpu.name} has {most} channels", f"write at most x{most}"
            )
    if gpu is not None and parts.pcie is not None:
        if gpu.pcie is None:
            raise InputError("pcie", parts.pcie, f"{gpu.name} shares the host's memory", "leave it out")
        if parts.pcie[0] > gpu.pcie[0]:
            raise InputError(
                "pcie", parts.pcie, f"{gpu.name} is a card of PCIe {gpu.pcie}", "name the slower of slot and card"
            )
        if _lanes(parts.pcie) > _lanes(gpu.pcie):
            raise InputError(
                "pcie", parts.pcie, f"{gpu.name} has {_lanes(gpu.pcie)} lanes", f"write at most x{_lanes(gpu.pcie)}"
            )
        if cpu is not None and cpu.pcie is not None and parts.pcie[0] > cpu.pcie[0]:
            raise InputError(
                "pcie", parts.pcie, f"{cpu.name} has lanes of PCIe {cpu.pcie}", "name the slower of slot and processor"
            )


def describe_parts(parts: Parts) -> str:
    """Return the parts as they are written on the command line."""
    pieces = []
    if parts.gpu is not None:
        pieces.append(parts.gpu.name)
    if parts.cpu is not None:
        pieces.append(f"{parts.sockets} x {parts.cpu.name}" if parts.sockets > 1 else parts.cpu.name)
    if parts.memory is not None:
        size = f":{parts.memory.capacity_bytes // GIB}GiB" if parts.memory.capacity_bytes else ""
        pieces.append(f"{parts.memory.kind}-{parts.memory.mt_per_s}x{parts.memory.channels}{size}")
    if parts.pcie is not None:
        pieces.append(f"pcie-{parts.pcie}")
    if parts.disk_bytes_per_s is not None:
        pieces.append(f"disk:{parts.disk_bytes_per_s / GIGA:g}GB/s")
    return " + ".join(pieces)


def link_of(parts: Parts) -> str | None:
    """Return the link between card and host as "4.0x16": the stated slot, else the slower of card and processor; None for shared memory."""
    gpu, cpu = parts.gpu, parts.cpu
    if gpu is None or parts.pcie is not None or gpu.pcie is None:
        return parts.pcie
    if cpu is None or cpu.pcie is None or cpu.pcie >= gpu.pcie[:3]:
        return gpu.pcie
    return f"{cpu.pcie}x{_lanes(gpu.pcie)}"


def _lanes(link: str) -> int:
    return int(link.rpartition("x")[2])


def _once(before: T | None, now: T, what: str, text: str) -> T:
    if before is not None:
        raise InputError("hardware", text, f"{what} is named twice", "name each part once")
    return now
