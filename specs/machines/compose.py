"""Parts and a serving engine become a profile: the constants that every prediction starts from.

Modelled: peaks and bandwidths from the parts, shares of them and fixed times from the engine. A machine without a GPU runs
on its cores: host memory is its device memory. Unified memory is one pool, counted once. What was not stated is assumed,
and the profile's description says so. Ignored: several cards (one is taken), sockets beyond what memory channels show.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ...base.units import GIB, GIGA, US_PER_S
from .bundled_kernels import bundled_kernels
from .catalogue import cpu_parts
from .engines import Engine, EngineRates, choose_backend, load_engine, rates
from .notation import describe_parts, link_of, parse_parts
from .parts import CpuPart, GpuPart, MemoryPart, Parts, pcie_bytes_per_s
from .profile import (
    USUAL_KERNELS,
    Constant,
    CpuConstants,
    DeviceConstants,
    DiskConstants,
    EngineConstants,
    HostConstants,
    LinkDirection,
    Profile,
)

DEFAULT_ENGINE = "llama.cpp"
FLOPS_PER_CYCLE = {
    "sse4": 8, "avx2-half": 12, "avx2": 24, "avx2-vnni": 72, "avx512": 24, "avx512-vnni": 112, "avx512-vnni-wide": 168, "amx": 112,
    "neon": 24,
}  # fmt: skip
"""Multiplications and additions of 8-bit integers or floats that one core retires a cycle on its vector or matrix unit,
as engines' kernels for quantised weights use it: those for 8-bit dot products (VNNI) do several times what others do. The vendors'
manuals give two to eight times as much for dense code; matrix units (AMX) are counted as VNNI, which GGUF kernels use of them. "Wide" ones
have a data path of 512 bits (Zen 5), where earlier ones take two turns."""
_RUNTIME_BYTES = GIB // 2
_DESKTOP_CHANNELS = 4
# What systems let a program take of unified memory: Apple's default limit for graphics is three quarters.
_UNIFIED_SHARE = {"metal": 0.75}
_UNIFIED_SHARE_ELSE = 0.94
_USUAL_CLOCK_GHZ, _USUAL_FLOPS_PER_CYCLE = 2.5, 512.0
"""Of the cards that engines' constants are given for; those of other clocks and generations follow from them."""
_UNKNOWN_CLOCK_GHZ = 2.0
_CORES_KV_SHARE = 0.8
"""Of the bandwidth that weights are read at, where cores read keys and values."""
_LINK_LATENCY_S = 10 / US_PER_S
_LINK_HALF_BYTES = 0
"""Engines queue copies, so that one's set-up hides behind another's bytes."""
_STAGED_BYTES_PER_S, _STAGED_UNCERTAINTY = 9.6 * GIGA, 0.4
"""Of copies from ordinary memory, which the driver moves through a buffer of its own, page-locked, on one core."""
_STAGED_SOURCE = "copies of 0.8 MB from a mapped file to an RTX 5090: github.com/kekzl/imp/pull/1409"
_DISK_LATENCY_S = 100 / US_PER_S
_ASSUMED_MEMORY = MemoryPart(kind="ddr5", mt_per_s=5600, channels=2, capacity_bytes=64 * GIB)
_ASSUMED_CPU = "ryzen-7-7700x"


def compose(parts: Parts, engine: Engine, backend: str | None = None, name: str | None = None,
            table: Mapping[str, Any] | None = None, built: str | None = None) -> Profile:  # fmt: skip
    """Return the profile of `parts` run by `engine`, a build of month `built`; raises InputError where it has no backend for them."""
    backend = choose_backend(engine, backend, parts.gpu.backend if parts.gpu is not None else "cpu")
    found = rates(engine.name, backend, table, parts.gpu.architecture if parts.gpu is not None else None)
    assumed: list[str] = []
    cpu, memory = _host_parts(parts, assumed)
    host_rate = _host_memory_rate(parts, memory, found)
    cores = parts.threads or cpu.cores * parts.sockets
    large = cpu.large_cores(cores) if parts.sockets == 1 else float(cores)
    flops = large * cpu.all_core_ghz * GIGA * FLOPS_PER_CYCLE[cpu.vector]
    worth = "" if large == cores else f", worth {large:.4g} large ones,"
    on_cores = _scaled(
        flops,
        found["cpu_share"],
        f"{cores} cores{worth} × {cpu.all_core_ghz} GHz × {FLOPS_PER_CYCLE[cpu.vector]} ({cpu.vector}), {cpu.source}",
    )
    capacity = memory.capacity_bytes or _ASSUMED_MEMORY.capacity_bytes or 0
    if parts.gpu is not None and parts.unified_memory:
        capacity = parts.gpu.memory_bytes
    if memory.capacity_bytes is None and not parts.unified_memory:
        assumed.append("host memory of 64 GiB")
    nothing = Constant(
        value=0.0, source="assumed", citation="part of the engine's time a layer", relative_uncertainty=0.0
    )
    host = HostConstants(
        memory_bytes=_sheet(float(capacity), "as stated" if not assumed else "assumed where not stated"),
        per_step_s=found["step_s"], per_layer_s=nothing, per_kernel_s=nothing, per_transfer_s=nothing,
        kernels_per_dense_layer=nothing, kernels_per_head=nothing,
        cpu=CpuConstants(flops_per_s=on_cores, memory_bytes_per_s=host_rate, launch_s=nothing),
    )  # fmt: skip
    if parts.gpu is not None:
        device = _gpu(parts, found, _reach(parts.gpu, engine, backend, found))
        link = _link(parts, found, fetches=engine.upload_tokens == 1, pageable=engine.copies_pageable(built))
    else:
        device = _cores(capacity, on_cores, host_rate, found)
        link = _memory_copy(host_rate)
    return Profile(
        name=name or describe_parts(parts),
        description=_description(parts, engine, backend, assumed),
        device=device, host_to_device=link, device_to_host=link, host=host, contention={},
        disk=_disk(parts), engine=_engine_constants(parts, engine, backend, found, built),
        kernels=bundled_kernels(parts.gpu.name, engine.name) if parts.gpu is not None and backend == "cuda" else None,
    )  # fmt: skip


def host_bytes_per_s(parts: Parts) -> float | None:
    """Return the theoretical bandwidth of the host's memory, as stated or as assumed; None for shared memory."""
    if parts.unified_memory:
        return None
    return _host_parts(parts, [])[1].bytes_per_s


def compose_text(text: str, engine: str | None = None, backend: str | None = None) -> Profile:
    """Return the profile of a machine written by its parts, under the engine called `engine` (llama.cpp where none is named)."""
    return compose(parse_parts(text), load_engine(engine or DEFAULT_ENGINE), backend)


# --- pieces ------------------------------------------------------------------------------------------------------------


def _host_parts(parts: Parts, assumed: list[str]) -> tuple[CpuPart, MemoryPart]:
    """Return processor and memory, those not stated assumed and noted."""
    cpu = parts.cpu
    if cpu is None and parts.gpu is not None and parts.gpu.host is not None:
        cpu = cpu_parts()[parts.gpu.host]
    if cpu is None:
        cpu = cpu_parts()[_ASSUMED_CPU]
        if not parts.unified_memory:
            assumed.append(f"a {_ASSUMED_CPU}")
    memory = parts.memory
    if memory is None:
        if parts.cpu is None:
            memory = _ASSUMED_MEMORY
        else:
            memory = MemoryPart(
                kind=cpu.memory, mt_per_s=cpu.max_mt_per_s, channels=cpu.channels * parts.sockets, capacity_bytes=None
            )
        if not parts.unified_memory:
            assumed.append(f"{memory.kind}-{memory.mt_per_s}x{memory.channels}")
    return cpu, memory


def _host_memory_rate(parts: Parts, memory: MemoryPart, found: EngineRates) -> Constant:
    """Return the bandwidth at which the engine reads experts from the host's memory."""
    if parts.sockets > 1:
        share = found["sockets_memory_share"]
    elif memory.channels > _DESKTOP_CHANNELS:
        share = found["server_memory_share"]
    else:
        share = found["desktop_memory_share"]
        if memory.channels == _DESKTOP_CHANNELS and not parts.unified_memory:  # between desktops and servers
            between = math.sqrt(share.value * found["server_memory_share"].value)
            share = dataclasses.replace(share, value=between)
    rate = memory.bytes_per_s
    if parts.cpu is not None and parts.cpu.memory_gb_per_s is not None:
        # Few chiplets cannot ask for all that the channels give: what they get, they read as a desktop's do.
        most = parts.cpu.memory_gb_per_s * GIGA * parts.sockets
        if most * found["desktop_memory_share"].value < rate * share.value:
            return _scaled(most, found["desktop_memory_share"], f"{parts.cpu.memory_gb_per_s} GB/s of {parts.cpu.name}")
    if parts.gpu is not None and parts.unified_memory:
        rate = parts.gpu.bandwidth_bytes_per_s
    return _scaled(rate, share, f"{memory.channels} channels of {memory.kind}-{memory.mt_per_s}")


def _gpu(parts: Parts, found: EngineRates, reach: Constant) -> DeviceConstants:
    gpu = parts.gpu
    assert gpu is not None  # noqa: S101
    usable = 1.0
    if gpu.unified_memory:
        usable = _UNIFIED_SHARE.get(gpu.backend, _UNIFIED_SHARE_ELSE)
    peaks = {
        "float16": _sheet(gpu.float16_flops_per_s, gpu.source, gpu.uncertainty),
        "float32": _sheet(gpu.float16_flops_per_s / 2, gpu.source, 0.5),
    }
    if gpu.float8_flops_per_s is not None:
        peaks["float8"] = _sheet(gpu.float8_flops_per_s, gpu.source, gpu.uncertainty)
    return DeviceConstants(
        kind="gpu", memory_bytes=_sheet(gpu.memory_bytes * usable, gpu.source),
        runtime_bytes=_guess(float(_RUNTIME_BYTES), "driver, context and compute buffers"),
        memory_bytes_per_s=_sheet(gpu.bandwidth_bytes_per_s, gpu.source), memory_efficiency=reach,
        peak_flops_per_s=peaks, compute_efficiency=found["dense_efficiency"],
        launch_s=Constant(value=0.0, source="assumed", citation="part of the engine's time a layer", relative_uncertainty=0.0),
        dequantise_efficiency={}, unified_memory=gpu.unified_memory,
    )  # fmt: skip


def _reach(gpu: GpuPart, engine: Engine, backend: str, found: EngineRates) -> Constant:
    """Return the share of the memory's bandwidth that matrix–vector kernels reach.

    Kernels that expand blocks of 8 bits or less take what a unit draws in a clock: wide memory behind few or slow units (HBM) is used
    less well. Kernels for Metal show none of it.
    """
    share = found["memory_efficiency"]
    if engine.products != "units" or backend == "metal" or gpu.units is None or gpu.boost_ghz is None:
        return share
    drawn = gpu.units * gpu.boost_ghz * GIGA * found["unit_bytes_per_cycle"].value
    return dataclasses.replace(share, value=1 / (1 / share.value + gpu.bandwidth_bytes_per_s / drawn))


def _cores(capacity: int, flops: Constant, rate: Constant, found: EngineRates) -> DeviceConstants:
    """Return the host's cores as the device."""
    whole = Constant(
        value=1.0, source="assumed", citation="the rate is what the engine reaches already", relative_uncertainty=0.0
    )
    return DeviceConstants(
        kind="cpu", memory_bytes=_sheet(float(capacity), "host memory"),
        runtime_bytes=Constant(value=float(_RUNTIME_BYTES), source="assumed", citation="system and engine", relative_uncertainty=0.5),
        memory_bytes_per_s=rate, memory_efficiency=whole, peak_flops_per_s={"float16": flops, "float32": flops},
        compute_efficiency=whole, launch_s=dataclasses.replace(whole, value=0.0), dequantise_efficiency={}, host_shares_compute=True,
    )  # fmt: skip


def _link(parts: Parts, found: EngineRates, *, fetches: bool, pageable: bool) -> LinkDirection:
    """Return the way between host and card.

    fetches: the engine fetches in every step, and is as uncertain as such engines are. pageable: it has no page-locked memory.
    """
    gpu = parts.gpu
    assert gpu is not None  # noqa: S101
    lanes = link_of(parts)
    rate = gpu.bandwidth_bytes_per_s / 2 if lanes is None else pcie_bytes_per_s(lanes)
    where = "shared memory, read and written" if lanes is None else f"PCIe {lanes} after line coding"
    share = found["upload_share"]
    if fetches:
        wide = max(share.relative_uncertainty, found["fetch_layer_s"].relative_uncertainty)
        share = dataclasses.replace(share, relative_uncertainty=wide)
    moving = _scaled(rate, share, where)
    staged = moving
    if lanes is not None and moving.value > _STAGED_BYTES_PER_S:
        staged = Constant(value=_STAGED_BYTES_PER_S, source="published", citation=_STAGED_SOURCE,
                          relative_uncertainty=max(share.relative_uncertainty, _STAGED_UNCERTAINTY))  # fmt: skip
    return LinkDirection(
        pinned_bytes_per_s=staged if pageable else moving, pageable_bytes_per_s=staged,
        latency_s=_guess(_LINK_LATENCY_S, "a copy asked for"), half_size_bytes=_guess(float(_LINK_HALF_BYTES), "set-up of a copy"),
    )  # fmt: skip


def _memory_copy(rate: Constant) -> LinkDirection:
    """Return copies inside the host's memory."""
    latency = _guess(_LINK_LATENCY_S, "a call")
    half = _guess(float(_LINK_HALF_BYTES), "set-up of a copy")
    slower = dataclasses.replace(rate, value=rate.value / 2)
    return LinkDirection(
        pinned_bytes_per_s=slower, pageable_bytes_per_s=slower, latency_s=latency, half_size_bytes=half
    )


def _disk(parts: Parts) -> DiskConstants | None:
    if parts.disk_bytes_per_s is None:
        return None
    return DiskConstants(
        read_bytes_per_s=Constant(
            value=parts.disk_bytes_per_s, source="datasheet", citation="as stated", relative_uncertainty=0.3
        ),
        latency_s=Constant(
            value=_DISK_LATENCY_S, source="assumed", citation="a read of a solid-state disk", relative_uncertainty=0.5
        ),
    )


def _engine_constants(
    parts: Parts, engine: Engine, backend: str, found: EngineRates, built: str | None
) -> EngineConstants:
    gpu = parts.gpu
    constants = EngineConstants(
        name=engine.name, backend=backend, version=engine.checked,
        layer_s=found["cpu_layer_s"], pass_layer_s=found["pass_layer_s"], kv_efficiency=found["kv_efficiency"],
        dense_efficiency=found["dense_efficiency"], expert_efficiency=found["expert_efficiency"],
        attention_efficiency=found["attention_efficiency"], tile_tokens=found["tile_tokens"], cpu_layer_s=found["cpu_layer_s"],
        fetch_layer_s=found["fetch_layer_s"],
        matvec_tokens=engine.matvec_tokens, memory_layout=engine.memory_layout,
    )  # fmt: skip
    if gpu is None:
        return _on_cores(constants)
    launches = engine.launched(built)
    kernel = found[f"{launches}_kernel_s"]
    # A graph's kernels wait for each other only, and that takes clocks; others wait for the host.
    pace = _USUAL_CLOCK_GHZ / (gpu.boost_ghz or _UNKNOWN_CLOCK_GHZ) if launches == "graph" else 1.0
    if launches == "graph":
        pace *= engine.kernels_left(built, backend)
    layer = dataclasses.replace(kernel, value=kernel.value * USUAL_KERNELS * pace)
    share = 1.0
    if engine.products == "units":
        share = min(1.0, _USUAL_FLOPS_PER_CYCLE / (gpu.flops_per_unit_cycle or _USUAL_FLOPS_PER_CYCLE))
    return dataclasses.replace(
        constants, layer_s=layer, dense_efficiency=_of(constants.dense_efficiency, share),
        expert_efficiency=_of(constants.expert_efficiency, share), attention_efficiency=_of(constants.attention_efficiency, share),
    )  # fmt: skip


def _on_cores(constants: EngineConstants) -> EngineConstants:
    """Return the constants of an engine whose device are the cores: their rates are what it reaches already."""
    whole = Constant(
        value=1.0,
        source="assumed",
        citation="the cores' rate is what the engine reaches already",
        relative_uncertainty=0.0,
    )
    return dataclasses.replace(
        constants, kv_efficiency=dataclasses.replace(constants.kv_efficiency, value=_CORES_KV_SHARE), dense_efficiency=whole,
        expert_efficiency=whole, attention_efficiency=whole, tile_tokens=dataclasses.replace(whole, value=0.0), matvec_tokens=0,
    )  # fmt: skip


def _of(constant: Constant, share: float) -> Constant:
    return dataclasses.replace(constant, value=constant.value * share)


def _guess(value: float, citation: str, uncertainty: float = 0.5) -> Constant:
    return Constant(value=value, source="assumed", citation=citation, relative_uncertainty=uncertainty)


def _sheet(value: float, citation: str, uncertainty: float = 0.02) -> Constant:
    return Constant(value=value, source="datasheet", citation=citation or "as stated", relative_uncertainty=uncertainty)


def _scaled(peak: float, share: Constant, citation: str) -> Constant:
    """Return a share of a peak as one constant."""
    return Constant(
        value=peak * share.value, source=share.source, citation=f"{share.value:.2f} of {citation}; {share.citation}",
        relative_uncertainty=share.relative_uncertainty,
    )  # fmt: skip


def _description(parts: Parts, engine: Engine, backend: str, assumed: list[str]) -> str:
    text = f"{describe_parts(parts)}, run by {engine.name} ({backend})"
    return text + (f"; assumed because not stated: {', '.join(assumed)}" if assumed else "")
