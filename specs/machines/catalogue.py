"""The bundled parts and serving engines, read once and by name.

Modelled: three files, one line a part or engine, each with its source; other names for the same part. Ignored: how parts
become a machine (`compose`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from ...base.errors import UnknownName
from ...base.units import GIB, GIGA, TERA
from ..catalog import PARTS_FOLDER
from .parts import CpuPart, GpuPart, nearest_part, plain_name

_DERIVED_FROM = ("architecture", "units", "boost_ghz", "memory_bus_bits", "memory_gbit_per_s")
"""What a card's bandwidth and peak follow from; the tests hold the stated figures against them."""


@cache
def architectures() -> Mapping[str, Mapping[str, Any]]:
    """Return what one unit of each architecture does in a cycle, with its source."""
    return MappingProxyType(dict(_rows("architectures")))


@cache
def gpu_parts() -> Mapping[str, GpuPart]:
    """Return the bundled GPUs by name and by their other names."""
    parts: dict[str, GpuPart] = {}
    for name, row in _rows("gpus").items():
        part = GpuPart(
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
            **{key: row.get(key) for key in _DERIVED_FROM},
        )
        parts |= dict.fromkeys((name, *row.get("aliases", ())), part)
    return MappingProxyType(parts)


@cache
def cpu_parts() -> Mapping[str, CpuPart]:
    """Return the bundled processors by name."""
    parts: dict[str, CpuPart] = {}
    for name, row in _rows("cpus").items():
        part = CpuPart(name=name, **{key: value for key, value in row.items() if key != "aliases"})
        parts |= dict.fromkeys((name, *row.get("aliases", ())), part)
    return MappingProxyType(parts)


def find_gpu(text: str) -> GpuPart:
    """Return the bundled GPU that `text` names; raises UnknownName with the nearest one."""
    part = gpu_parts().get(plain_name(text)) or nearest_part(text, gpu_parts())
    if part is None:
        raise UnknownName("gpu", text, gpu_parts())
    return part


def find_cpu(text: str) -> CpuPart:
    """Return the bundled processor that `text` names; raises UnknownName with the nearest one."""
    part = cpu_parts().get(plain_name(text)) or nearest_part(text, cpu_parts())
    if part is None:
        raise UnknownName("cpu", text, cpu_parts())
    return part


def _rows(file: str) -> Mapping[str, Any]:
    """Return one bundled table."""
    rows: dict[str, Any] = json.loads((PARTS_FOLDER / f"{file}.json").read_text(encoding="utf-8"))
    return rows
