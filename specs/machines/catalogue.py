"""The bundled parts and serving engines, read once and by name.

Modelled: one line a part, each with its source; other names for the same part. Ignored: how parts become a machine (`compose`),
how names are read (`names`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any

from ...base.errors import InputError
from ...base.units import GIB, GIGA, TERA
from ..catalog import PARTS_FOLDER
from .names import Names
from .parts import CpuPart, GpuPart, counted

_DERIVED_FROM = ("architecture", "units", "boost_ghz", "memory_bus_bits", "memory_gbit_per_s")
"""What a card's bandwidth and peak follow from; the tests hold the stated figures against them."""


@cache
def architectures() -> Mapping[str, Mapping[str, Any]]:
    """Return what one unit of each architecture does in a cycle, with its source."""
    return MappingProxyType(dict(_rows("architectures")))


@cache
def gpu_parts() -> Mapping[str, GpuPart]:
    """Return the bundled GPUs by name."""
    parts: dict[str, GpuPart] = {}
    for name, row in _rows("gpus").items():
        parts[name] = GpuPart(
            name=name,
            memory_bytes=int(row.get("usable_gib", row["memory_gib"]) * GIB),
            bandwidth_bytes_per_s=row["bandwidth_gb_per_s"] * GIGA,
            float16_flops_per_s=row["float16_tflops"] * TERA,
            float8_flops_per_s=row["float8_tflops"] * TERA if "float8_tflops" in row else None,
            pcie=row["pcie"],
            backend=row["backend"],
            unified_memory=row.get("unified_memory", False),
            source=row["source"],
            uncertainty=row.get("uncertainty", 0.05),
            bridge_bytes_per_s=row["bridge_gb_per_s"] * GIGA if "bridge_gb_per_s" in row else None,
            link_bytes_per_s=row["link_gb_per_s"] * GIGA if "link_gb_per_s" in row else None,
            memory_options_bytes=tuple(int(gib * GIB) for gib in row.get("memory_options_gib", ())),
            **{key: row.get(key) for key in (*_DERIVED_FROM, "host")},
        )
    return MappingProxyType(parts)


@cache
def cpu_parts() -> Mapping[str, CpuPart]:
    """Return the bundled processors by name."""
    return MappingProxyType(
        {
            name: CpuPart(name=name, **{key: value for key, value in row.items() if key != "aliases"})
            for name, row in _rows("cpus").items()
        }
    )


def known_gpu(text: str) -> GpuPart | None:
    """Return the bundled GPU that `text` names, with the memory it names; None for any other text."""
    found = _gpu_names().find(text)
    if found is None:
        return None
    part, gigabytes = found
    sold = _rows("gpus")[part.name]["memory_gib"]
    if gigabytes is None or gigabytes == sold:
        return part
    if gigabytes * GIB not in part.memory_options_bytes:
        return None
    return replace(part, name=f"{part.name}-{gigabytes}gb", memory_bytes=gigabytes * GIB)


def known_cpu(text: str) -> CpuPart | None:
    """Return the bundled processor that `text` names, None for any other text."""
    found = _cpu_names().find(counted(text)[1])
    return found[0] if found is not None and found[1] is None else None


def sharing_cpus(text: str, known: CpuPart | None) -> list[str]:
    """Return the processors that `text` may stand for: the one it names, or those that share it as a short name."""
    return [known.name] if known is not None else _cpu_names().sharing(text)


def find_gpu(text: str) -> GpuPart:
    """Return the bundled GPU that `text` names; raises InputError with the nearest ones."""
    part = known_gpu(text)
    if part is None:
        raise unknown_gpu(text)
    return part


def find_cpu(text: str) -> CpuPart:
    """Return the bundled processor that `text` names; raises InputError with the nearest ones."""
    part = known_cpu(text)
    if part is None:
        raise unknown_part(text, "cpu")
    return part


def is_sized_gpu(text: str) -> bool:
    """Return whether `text` names a bundled GPU together with a memory size, sold or not."""
    found = _gpu_names().find(text)
    return found is not None and found[1] is not None


def unknown_gpu(text: str) -> InputError:
    """Return the error for a GPU that is not bundled, or not with that much memory."""
    found = _gpu_names().find(text)
    if found is None or found[1] is None:
        return unknown_part(text, "gpu")
    part = found[0]
    options = part.memory_options_bytes or (int(_rows("gpus")[part.name]["memory_gib"] * GIB),)
    sizes = ", ".join(f"{size // GIB}" for size in options)
    return InputError(
        "gpu", text, f"{part.name} is not sold with {found[1]} GB but with {sizes}", "correct the size, or leave it out"
    )


def unknown_part(text: str, kind: str | None = None) -> InputError:
    """Return the error for a part that is not bundled; kind: "gpu" or "cpu" where it is clear which was meant."""
    if kind is None:
        lowered = text.lower()
        marks = ("ryzen", "epyc", "xeon", "core", "threadripper", "cpu", "graviton", "altra")
        processor = any(mark in lowered for mark in marks) or _cpu_names().sharing(text)
        kind = "cpu" if processor or _cpu_names().likeness(text) > _gpu_names().likeness(text) else "gpu"
    names: Names[Any] = _cpu_names() if kind == "cpu" else _gpu_names()
    return names.unknown(kind, text)


@cache
def _gpu_names() -> Names[GpuPart]:
    return Names(gpu_parts(), {name: row.get("aliases", ()) for name, row in _rows("gpus").items()})


@cache
def _cpu_names() -> Names[CpuPart]:
    return Names(cpu_parts(), {name: row.get("aliases", ()) for name, row in _rows("cpus").items()})


@cache
def _rows(file: str) -> Mapping[str, Any]:
    """Return one bundled table."""
    rows: dict[str, Any] = json.loads((PARTS_FOLDER / f"{file}.json").read_text(encoding="utf-8"))
    return rows
