"""The machine of a report, and the engine that ran on it: parts as stated, documented defaults for what is not.

Modelled: cards with their slots, processor and threads used, memory, disk; the engine of its month under the backend that the card can have
run. Ignored: what the engine was told (`setup`, `split`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ...base.errors import InputError
from ...base.units import GIB
from ...specs.machines.catalogue import find_cpu, find_gpu
from ...specs.machines.compose import compose
from ...specs.machines.engines import Engine, load_engine
from ...specs.machines.notation import MOST_CARDS
from ...specs.machines.parts import GpuPart, MemoryPart, Parts, Slot
from ...specs.machines.profile import Profile
from ...specs.models import ModelSpec, WeightFormat
from .programs import built_in, engine_of, program
from .rows import Report, cards_of

UNLIMITED_BYTES = float(1 << 50)
_MOST_SOCKETS = 8
_MAKERS = ("cuda", "rocm", "metal")
"""Backends that only one maker's devices have."""
_USED = re.compile(r"\b([0-9]{1,3}) (?:threads|cores)\b", re.IGNORECASE)
_VIRTUAL = re.compile(r"\bvirtual machine\b", re.IGNORECASE)
_ONE_THREAD_A_CORE = ("neon",)
_THREADS_A_CORE = 1.4
"""Threads of cores with two each that do what a core alone does; clouds sell threads, of Arm's processors cores."""


class NotExpressible(Exception):
    """A report that cannot be predicted, and why."""


def machine_of(report: Report, table: Mapping[str, Any] | None, assumed: list[str]) -> tuple[Profile, Parts]:
    """Return the machine under its engine, and the parts that it is made of."""
    engine = _engine(report, assumed)
    parts = _parts(report, assumed)
    backend = _backend(report, parts, assumed)
    profile = compose(parts, _with_backend(engine, backend), backend, table=table, built=built_in(report))
    return _with_host_memory(report, profile, assumed), parts


def _engine(report: Report, assumed: list[str]) -> Engine:
    name, known = program(report), engine_of(report)
    if known is None:
        assumed.append(f"engine {name[:40]}: what engines of its backend have in common")
    elif known != name:
        assumed.append(f"engine {name[:40]}: as {known}")
    return load_engine(known or "generic")


def _backend(report: Report, parts: Parts, assumed: list[str]) -> str | None:
    """Return the backend that a report names, the card's own where its maker's cards cannot have run that one."""
    stated = str(report.part("engine").get("backend") or "") or None
    if parts.gpu is None:
        return "cpu"
    own = parts.gpu.backend
    if stated in _MAKERS and own in _MAKERS and stated != own:
        assumed.append(f"engine.backend: {own}, no card of this maker runs {stated}")
        return own
    return stated


def _with_backend(engine: Engine, backend: str | None) -> Engine:
    """Return the engine as one that has the reported backend: reports may know more than the catalogue."""
    if backend is None or backend in engine.backends:
        return engine
    return dataclasses.replace(engine, backends=(*engine.backends, backend))


def _parts(report: Report, assumed: list[str]) -> Parts:
    cards = report.cards
    if report.num_gpus > MOST_CARDS:
        raise NotExpressible(f"more than {MOST_CARDS} cards")
    slots = [slot for card in cards for slot in _slots(card)]
    gpu, pcie = (slots[0].gpu, slots[0].pcie) if slots else (None, None)
    host = report.part("host")
    sockets = min(int(report.number("host", "sockets") or 1), _MOST_SOCKETS)
    cpu, threads = None, None
    if isinstance(host.get("cpu"), str):
        try:
            cpu = find_cpu(host["cpu"])
        except InputError:
            assumed.append(f"host.cpu {host['cpu'][:40]}: a usual one with as many cores")
        used = _USED.search(f"{host['cpu']}; {report.row.get('note') or ''}")
        threads = int(used[1]) if used and int(used[1]) else None
    elif gpu is None:
        raise NotExpressible("neither a card nor a processor is stated")
    elif report.kind.startswith("cpu") and not gpu.unified_memory:
        assumed.append("host.cpu: a desktop processor")
    cores = report.number("host", "cores")
    if cores is not None and threads is None:
        threads = int(cores)
    if (
        threads
        and cpu is not None
        and cpu.vector not in _ONE_THREAD_A_CORE
        and _VIRTUAL.search(str(report.row.get("note") or ""))
    ):
        threads = max(1, round(threads / _THREADS_A_CORE))
        assumed.append("host.cores: a virtual machine's are threads of cores")
    memory = _memory(report, assumed)
    rate = report.number("disk", "read_bytes_per_s")
    return Parts(
        gpu=gpu, cpu=cpu, sockets=sockets, memory=memory, pcie=pcie, disk_bytes_per_s=rate, threads=threads, more=tuple(slots[1:]),
        host_bytes_per_s=report.number("host", "measured_bytes_per_s"),
    )  # fmt: skip


def _slots(card: Mapping[str, Any]) -> list[Slot]:
    """Return the cards of one line of a report, each in its slot."""
    gpu, pcie = _card(card)
    return [Slot(gpu=gpu, pcie=pcie)] * cards_of(card)


def _card(card: Mapping[str, Any]) -> tuple[GpuPart, str | None]:
    name = card.get("name")
    try:
        gpu = find_gpu(str(name))
    except InputError:
        raise NotExpressible(f"the card {str(name)[:60]} is not in the catalogue") from None
    gib = card.get("memory_gib")
    if isinstance(gib, (int, float)) and not isinstance(gib, bool) and 0 < gib < 4096:
        gpu = dataclasses.replace(gpu, memory_bytes=int(gib * GIB))
    link = card.get("pcie")
    if isinstance(link, str) and not gpu.unified_memory:
        return gpu, link.replace(" ", "")
    return gpu, None


def _with_host_memory(report: Report, profile: Profile, assumed: list[str]) -> Profile:
    """Return the machine with its host memory as stated, else with enough for the model: whoever reports a speed had it."""
    if profile.device.unified_memory:
        return profile
    stated = report.number("host", "memory_gib")
    if stated is None and not report.kind.startswith("gpu"):
        assumed.append("host.memory_gib: enough for the model")
    room = dataclasses.replace(profile.host.memory_bytes, value=UNLIMITED_BYTES if stated is None else stated * GIB)
    device = profile.device
    if device.kind == "cpu":
        device = dataclasses.replace(device, memory_bytes=room)
    return dataclasses.replace(profile, host=dataclasses.replace(profile.host, memory_bytes=room), device=device)


def streaming(profile: Profile, model: ModelSpec, fmt: WeightFormat) -> Profile:
    """Return the machine where whole layers are fetched: what surrounds the experts moves too, in every layer's time."""
    if profile.engine is None or profile.device.kind == "cpu":
        return profile
    each = sum(model.dense_layer_bytes(layer, fmt) for layer in range(model.num_layers)) / model.num_layers
    layer = profile.engine.layer_s
    moved = layer.value + each / profile.host_to_device.pinned_bytes_per_s.value
    return dataclasses.replace(
        profile, engine=dataclasses.replace(profile.engine, layer_s=dataclasses.replace(layer, value=moved))
    )


def _memory(report: Report, assumed: list[str]) -> MemoryPart | None:
    host = report.part("host")
    kind, channels, gib = host.get("memory"), report.number("host", "channels"), report.number("host", "memory_gib")
    match = re.fullmatch(r"(L?P?DDR[345]X?)-([0-9]{3,5})", kind, re.IGNORECASE) if isinstance(kind, str) else None
    capacity = None if gib is None else int(gib * GIB)
    if match is not None and channels is not None:
        return MemoryPart(
            kind=match[1].lower(), mt_per_s=int(match[2]), channels=int(channels), capacity_bytes=capacity
        )
    if report.kind.startswith("cpu"):
        assumed.append("host.memory: what the processor is sold for")
    return None
