"""A machine as it is written, in one line: read into its parts, checked, and written again.

    rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB [+ pcie-4.0x16] [+ disk:7GB/s]
    2 x rtx-3090 + rtx-3060 + pcie-3.0x4 + ryzen-9-5950x [+ nvlink:56GB/s] [+ switch-4.0x16]
    2 x epyc-9355 + ddr5-6400x24:768GiB

Modelled: which parts do not go together; several cards, each in the slot that stands behind it, bridged, or behind one port. Ignored:
what is not written (`compose` assumes it), boards and how many lanes they give each slot.
"""

from __future__ import annotations

import itertools
import os
import re
from typing import TypeVar

from ...base.errors import InputError
from ...base.units import GIB, GIGA
from .catalogue import is_sized_gpu, known_cpu, known_gpu, sharing_cpus, unknown_gpu, unknown_part
from .parts import (
    CpuPart,
    GpuPart,
    Parts,
    Slot,
    WrittenMemory,
    counted,
    custom_gpu,
    parse_link,
    parse_memory,
    parse_rate,
    settled_memory,
)  # fmt: skip

T = TypeVar("T")
MOST_CARDS = 16
"""What engines number in one box (GGML_CUDA_MAX_DEVICES of llama.cpp)."""
_MOST_LANES = 16
_SLOT = re.compile(r"pci[- ]?e|gen[- ]?[2-6](?![0-9a-z])")
_BRIDGE = re.compile(r"nvlink(?:[- ]?bridge)?[: ]*(.*)\Z")
_DISK = re.compile(r"\b(?:disk|ssd|nvme|m\.2)\b")
_JOINS = re.compile(r"\s*[,;]\s*(?![^()]*\))|\s+and\s+|\s+(?:with|w/)\s+(?!.*\b(?:radeon|graphics)\b)", re.IGNORECASE)
"""What joins parts beside a plus sign. Processors are named "with Radeon Graphics"."""


def is_parts(text: str) -> bool:
    """Return whether `text` describes a machine by its parts rather than by a bundled name or a file."""
    if os.path.exists(text) or text.endswith(".json"):
        return False
    if "+" in text or counted(text)[0] > 1 or len(_pieces(text)) > 1:
        return True
    return custom_gpu(text) is not None or known_gpu(text) is not None or known_cpu(text) is not None


def parse_parts(text: str) -> Parts:
    """Return the parts of "rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB".

    Raises UnknownName (with the nearest name) or InputError for a part that is unknown, twice there or impossible beside another.
    """
    cpu: CpuPart | None = None
    memory: WrittenMemory | None = None
    disk: float | None = None
    bridge: float | None = None
    shared: str | None = None
    cards: list[tuple[GpuPart, int]] = []
    links: list[tuple[int, tuple[str, int | None]]] = []  # cards named before each slot
    sockets = 1
    for piece in _pieces(text):
        if not piece:
            raise InputError(
                "hardware", text, "a part is empty", "write for instance rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB"
            )
        lowered = piece.lower()
        count, name = counted(piece)
        if (found := parse_memory(piece)) is not None:
            memory = _once(memory, found, "memory", text)
        elif _SLOT.match(lowered):
            links.append((len(cards), parse_link(lowered)))
        elif lowered.startswith("switch"):
            link, lanes = parse_link(lowered.removeprefix("switch").strip(" -:"))
            shared = _once(shared, f"{link}x{lanes or _MOST_LANES}", "switch", text)
        elif (rate := _BRIDGE.match(lowered)) is not None:
            bridge = _once(bridge, parse_rate(rate[1], "nvlink") if rate[1] else 0.0, "nvlink", text)
        elif _DISK.search(lowered):
            disk = _once(disk, _disk_rate(piece), "disk", text)
        elif _SLOT.match(name.lower()):
            raise InputError(
                "pcie", piece, "a slot is not counted", "write it once, behind the cards that stand in such slots"
            )
        elif (card := custom_gpu(name)) is not None:
            cards.append((card, count))
        else:
            part = _part(name, cards[-1][0] if cards else None)
            if isinstance(part, CpuPart):
                cpu, sockets = _once(cpu, part, "cpu", text), count
            else:
                cards.append((part, count))
    slots = _slots(cards, links, text)
    parts = Parts(
        gpu=slots[0].gpu if slots else None, cpu=cpu, sockets=sockets,
        memory=None if memory is None else settled_memory(memory, cpu, sockets), pcie=slots[0].pcie if slots else _alone(links, text),
        disk_bytes_per_s=disk, more=slots[1:], bridge_bytes_per_s=_bridge(bridge, slots), shared_pcie=shared,
    )  # fmt: skip
    check_parts(parts)
    return parts


def _bridge(rate: float | None, slots: tuple[Slot, ...]) -> float | None:
    """Return the rate of what joins cards; raises InputError where it was not said (0) and the catalogue has none for these cards.

    Modules on one board are joined by their own links.
    """
    if rate != 0.0 or len(slots) < 2 or all(slot.gpu.link_bytes_per_s is not None for slot in slots):
        return rate or (0.0 if len(slots) < 2 and rate is not None else None)
    own = {slot.gpu.bridge_bytes_per_s for slot in slots}
    if len(slots) > 2 or len(own) > 1 or None in own:
        names = " and ".join(sorted({slot.gpu.name for slot in slots}))
        rule = "a bridge joins two cards of one kind" if None not in own else "no connector for a bridge is known of it"
        remedy = "leave it out, or write the rate in one direction, nvlink:56GB/s"
        raise InputError("nvlink", f"{len(slots)} cards, {names}", rule, remedy)
    return own.pop()


def _disk_rate(text: str) -> float:
    """Return bytes per second of "disk:7GB/s", "NVMe 7 GB/s" or "7GB/s SSD"; raises InputError where none is said."""
    rest = _DISK.sub(" ", text.lower()).strip(" :-")
    if not rest:
        raise InputError("disk", text, "its rate is not said", "write for instance disk:7GB/s")
    return parse_rate(rest, "disk")


def _slots(
    cards: list[tuple[GpuPart, int]], links: list[tuple[int, tuple[str, int | None]]], text: str
) -> tuple[Slot, ...]:
    """Return every card with its slot; raises InputError for a slot that is no card's, or twice there."""
    if sum(count for _, count in cards) > MOST_CARDS or any(count < 1 for _, count in cards):
        total = sum(count for _, count in cards)
        raise InputError("hardware", f"{total} cards", f"1 to {MOST_CARDS} cards stand in one box", "correct the count")
    of_kind: dict[int, str] = {}
    for before, link in links:
        kind = 0 if len(cards) == 1 else before - 1  # of one kind of card, wherever the slot is written
        if kind < 0:
            raise InputError("pcie", link, "no card stands before it", "write each slot behind its card")
        of_kind[kind] = _once(of_kind.get(kind), _with_lanes(link, cards[kind][0].pcie), "pcie", text)
    return tuple(
        Slot(gpu=card, pcie=of_kind.get(kind)) for kind, (card, count) in enumerate(cards) for _ in range(count)
    )


def _alone(links: list[tuple[int, tuple[str, int | None]]], text: str) -> str | None:
    """Return the slot of a machine without a card."""
    found: str | None = None
    for _, link in links:
        found = _once(found, _with_lanes(link, None), "pcie", text)
    return found


def _with_lanes(link: tuple[str, int | None], card: str | None) -> str:
    """Return a slot as "4.0x16": where its lanes are not said, with those of the card."""
    return f"{link[0]}x{link[1] or (_MOST_LANES if card is None else _lanes(card))}"


def _pieces(text: str) -> list[str]:
    """Return the parts of a text: a plus sign separates them, except where it ends a name ("Xeon 8480+", "AI Max+ 395"); a comma, "and"
    and "with" do where no figures of a part of one's own are given.
    """
    pieces: list[str] = []
    joined = text if "=" in text else _JOINS.sub(" + ", text)
    for piece in re.split(r"(?:^|\s)\+(?=\s|$)", joined):
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
    _check_cards(parts)
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
    for slot in parts.slots:
        _check_slot(slot, cpu)


def _check_slot(slot: Slot, cpu: CpuPart | None) -> None:
    """Return nothing; raises InputError for a slot that is faster or wider than its card, or faster than the processor."""
    gpu, pcie = slot.gpu, slot.pcie
    if pcie is None:
        return
    if gpu.pcie is None:
        raise InputError("pcie", pcie, f"{gpu.name} shares the host's memory", "leave it out")
    if pcie[0] > gpu.pcie[0]:
        raise InputError("pcie", pcie, f"{gpu.name} is a card of PCIe {gpu.pcie}", "name the slower of slot and card")
    if _lanes(pcie) > _lanes(gpu.pcie):
        raise InputError("pcie", pcie, f"{gpu.name} has {_lanes(gpu.pcie)} lanes", f"write at most x{_lanes(gpu.pcie)}")
    if cpu is not None and cpu.pcie is not None and pcie[0] > cpu.pcie[0]:
        raise InputError(
            "pcie", pcie, f"{cpu.name} has lanes of PCIe {cpu.pcie}", "name the slower of slot and processor"
        )


def _check_cards(parts: Parts) -> None:
    """Return nothing; raises InputError for cards that no engine uses together, and for links between cards where there is one."""
    slots = parts.slots
    if len(slots) < 2:
        link = "nvlink" if parts.bridge_bytes_per_s is not None else "switch" if parts.shared_pcie is not None else None
        if link is not None:
            raise InputError("hardware", link, "it joins several cards, and one or none is named", "leave it out")
        return
    for slot in slots:
        if slot.gpu.unified_memory:
            raise InputError(
                "hardware",
                slot.gpu.name,
                "a chip with memory of its own is the only card in its box",
                "name it alone; several such boxes joined by a network are not modelled",
            )
    kinds = sorted({slot.gpu.backend for slot in slots})
    if len(kinds) > 1:
        raise InputError("hardware", " and ".join(kinds), "cards of two makers under one engine are not modelled",
                         "name cards of one maker")  # fmt: skip


def describe_parts(parts: Parts) -> str:
    """Return the parts as they are written on the command line."""
    pieces = []
    slots = parts.slots
    for slot, same in itertools.groupby(slots):
        count = len(list(same))
        pieces.append(slot.gpu.name if count == 1 else f"{count} x {slot.gpu.name}")
        if slot.pcie is not None and len(slots) > 1:
            pieces.append(f"pcie-{slot.pcie}")
    if parts.cpu is not None:
        pieces.append(f"{parts.sockets} x {parts.cpu.name}" if parts.sockets > 1 else parts.cpu.name)
    if parts.memory is not None:
        size = f":{parts.memory.capacity_bytes // GIB}GiB" if parts.memory.capacity_bytes else ""
        pieces.append(f"{parts.memory.kind}-{parts.memory.mt_per_s}x{parts.memory.channels}{size}")
    if parts.pcie is not None and len(slots) <= 1:
        pieces.append(f"pcie-{parts.pcie}")
    if parts.shared_pcie is not None:
        pieces.append(f"switch-{parts.shared_pcie}")
    if parts.bridge_bytes_per_s is not None:
        pieces.append(f"nvlink:{parts.bridge_bytes_per_s / GIGA:g}GB/s")
    if parts.disk_bytes_per_s is not None:
        pieces.append(f"disk:{parts.disk_bytes_per_s / GIGA:g}GB/s")
    return " + ".join(pieces)


def link_of(parts: Parts, slot: Slot | None = None) -> str | None:
    """Return the link between a card (the first for None) and the host as "4.0x16": the stated slot, else the slower of card and
    processor; None for shared memory.
    """
    gpu, cpu, pcie = parts.gpu, parts.cpu, parts.pcie
    if slot is not None:
        gpu, pcie = slot.gpu, slot.pcie
    if gpu is None or pcie is not None or gpu.pcie is None:
        return pcie
    if cpu is None or cpu.pcie is None or cpu.pcie >= gpu.pcie[:3]:
        return gpu.pcie
    return f"{cpu.pcie}x{_lanes(gpu.pcie)}"


def _lanes(link: str) -> int:
    return int(link.rpartition("x")[2])


def _once(before: T | None, now: T, what: str, text: str) -> T:
    if before is not None:
        raise InputError("hardware", text, f"{what} is named twice", "name each part once")
    return now
