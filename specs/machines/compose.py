"""Parts and a serving engine become a profile: the constants that every prediction starts from.

Modelled: peaks and bandwidths from the parts, shares of them and fixed times from the engine. A machine without a GPU runs
on its cores: host memory is its device memory. Unified memory is one pool, counted once. What was not stated is assumed,
and the profile's description says so. Several cards are composed one by one, with what joins them. Ignored: sockets beyond what
memory channels show, which cards of a box stand behind which socket.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ...base.units import GIB, GIGA, US_PER_S
from .catalogue import architectures, cpu_parts
from .cores import flops_of_cores, on_cores_alone, with_cores
from .engine_on_card import engine_constants
from .engines import Engine, EngineRates, choose_backend, load_engine, rates, scatter
from .notation import describe_parts, link_of, parse_parts
from .parts import CpuPart, GpuPart, MemoryPart, Parts, Slot, pcie_bytes_per_s
from .profile import (
    BRIDGE,
    MODULES,
    PCIE,
    CardConstants,
    CardLinks,
    Constant,
    CpuConstants,
    DeviceConstants,
    DiskConstants,
    HostConstants,
    LinkDirection,
    Profile,
)
from .siblings import kernels_of_card

DEFAULT_ENGINE = "llama.cpp"
_ASSUMED = "; assumed because not stated: "
_RUNTIME_BYTES = GIB // 2
_DESKTOP_CHANNELS = 4
# What systems let a program take of unified memory: Apple's default limit for graphics is three quarters.
_UNIFIED_SHARE = {"metal": 0.75}
_UNIFIED_SHARE_ELSE = 0.94
_LINK_LATENCY_S = 10 / US_PER_S
_LINK_HALF_BYTES = 0
"""Engines queue copies, so that one's set-up hides behind another's bytes."""
_STAGED_BYTES_PER_S, _STAGED_UNCERTAINTY = 9.6 * GIGA, 0.4
"""Of copies from ordinary memory, which the driver moves through a buffer of its own, page-locked, on one core."""
_STAGED_SOURCE = "copies of 0.8 MB from a mapped file to an RTX 5090: github.com/kekzl/imp/pull/1409"
_DISK_LATENCY_S = 100 / US_PER_S
_PEER_SHARE = Constant(
    value=0.8, source="published", relative_uncertainty=0.3,
    citation="25.9 GB/s of PCIe 4.0 x16 between RTX 4090 with peer access: github.com/tinygrad/open-gpu-kernel-modules/issues/36",
)  # fmt: skip
_HOPS = {
    "cuda": Constant(
        value=170 / US_PER_S, source="published", relative_uncertainty=1.0,
        citation="gpt-oss-120b on 4 RTX 4090 at 180.4 tokens/s (github.com/ggml-org/llama.cpp/pull/19378): what bytes and kernels leave of "
                 "a token, over three hand-overs",
    ),
    "rocm": Constant(
        value=370 / US_PER_S, source="published", relative_uncertainty=0.6,
        citation="gpt-oss-120b at 82.4, 76.8 and 73.4 tokens/s on 2, 4 and 6 cards: github.com/ggml-org/llama.cpp/pull/19922",
    ),
}  # fmt: skip
"""What a pass costs where layers go on on another card; back ends without figures of their own take CUDA's."""
_PCIE_STEP = Constant(
    value=3.3 / US_PER_S, source="published", relative_uncertainty=0.6,
    citation="reductions of a few bytes: 19.4 us on 4 V100 behind a PCIe switch (github.com/haohervchb/sglang-V100/pull/2), 42 us on 8 RTX "
             "4090 (github.com/NVIDIA/nccl/issues/1530), 54 us on 8 RTX 3090 (github.com/NVIDIA/nccl/issues/1439); a ring: 2 (n-1) steps",
)  # fmt: skip
_BRIDGE_STEP = Constant(
    value=2 / US_PER_S, source="published", relative_uncertainty=0.6,
    citation="reductions of 4 to 32 KB in 8.5 and 11.8 us on 4 and 8 H100 by vLLM's kernel: github.com/sgl-project/sglang/pull/2904; "
             "2 log2 n steps",
)  # fmt: skip
_AHEAD = Constant(
    value=0.0, source="published", relative_uncertainty=0.0,
    citation="the host prepares a step while the one before runs: lmsys.org/blog/2024-12-04-sglang-v0-4 (zero-overhead batch scheduler), "
             "vLLM's asynchronous scheduling, TensorRT-LLM's overlap scheduler",
)  # fmt: skip
_ASSUMED_MEMORY = MemoryPart(kind="ddr5", mt_per_s=5600, channels=2, capacity_bytes=64 * GIB)
_ASSUMED_CPU, _ASSUMED_SERVER, _DESKTOP_CORES = "ryzen-7-7700x", "epyc-7543", 24
"""Processors that are not known: a desktop's, or a server's where there are more cores than desktops have."""


def compose(parts: Parts, engine: Engine, backend: str | None = None, name: str | None = None,
            table: Mapping[str, Any] | None = None, built: str | None = None) -> Profile:  # fmt: skip
    """Return the profile of `parts` run by `engine`, a build of month `built`; raises InputError where it has no backend for them."""
    backend = choose_backend(engine, backend, parts.gpu.backend if parts.gpu is not None else "cpu")
    gpu = parts.gpu
    known = (None, None) if gpu is None else (gpu.architecture, gpu.backend)
    found = rates(engine.name, backend, table, *known, earlier=engine.earlier(built))
    assumed: list[str] = []
    cpu, memory = _host_parts(parts, assumed)
    host_rate = _host_memory_rate(parts, memory, found)
    wide = scatter(table, sockets=parts.sockets, known=parts.cpu is not None or parts.unified_memory)
    host_rate = dataclasses.replace(host_rate, relative_uncertainty=host_rate.relative_uncertainty * wide)
    flops, worth = flops_of_cores(cpu, parts.threads or cpu.cores * parts.sockets, parts.sockets)
    on_cores = _scaled(flops, found["cpu_share"], worth)
    unsure = scatter(table, sockets=1, known=parts.cpu is not None or parts.unified_memory)
    on_cores = dataclasses.replace(on_cores, relative_uncertainty=on_cores.relative_uncertainty * unsure)
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
        per_step_s=_AHEAD if engine.steps_ahead else found["step_s"], per_layer_s=nothing, per_kernel_s=nothing, per_transfer_s=nothing,
        kernels_per_dense_layer=nothing, kernels_per_head=nothing,
        cpu=CpuConstants(flops_per_s=on_cores, memory_bytes_per_s=host_rate, launch_s=nothing),
    )  # fmt: skip
    cards = tuple(_card(parts, slot, engine, backend, table, built) for slot in parts.slots)
    cards = tuple(
        dataclasses.replace(card, engine=card.engine and with_cores(card.engine, found, cpu)) for card in cards
    )
    if cards:
        device, link = cards[0].device, cards[0].host_to_device
        constants = cards[0].engine
    else:
        device = _cores(capacity, on_cores, host_rate, found)
        link = _memory_copy(host_rate)
        alone = with_cores(engine_constants(None, engine, backend, found, built), found, cpu)
        constants = on_cores_alone(alone, engine.cores_attention, found, cpu, repacks=cpu.vector in engine.repacks_on)
    return Profile(
        name=name or describe_parts(parts),
        description=_description(parts, engine, backend, assumed),
        device=device, host_to_device=link, device_to_host=link, host=host, contention={},
        disk=_disk(parts), engine=constants,
        kernels=cards[0].kernels if cards else None, cards=cards if len(cards) > 1 else (),
        links=_card_links(parts, backend) if len(cards) > 1 else None,
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
        cpu = cpu_parts()[
            _ASSUMED_SERVER
            if (parts.threads or 0) > _DESKTOP_CORES * parts.sockets or parts.sockets > 1
            else _ASSUMED_CPU
        ]
        if not parts.unified_memory:
            assumed.append(f"a {cpu.name}")
    memory = parts.memory
    if memory is None:
        if parts.cpu is None and cpu.name == _ASSUMED_CPU:
            memory = _ASSUMED_MEMORY
        else:
            memory = MemoryPart(
                kind=cpu.memory, mt_per_s=cpu.max_mt_per_s, channels=cpu.channels * parts.sockets, capacity_bytes=None
            )
        if not parts.unified_memory:
            assumed.append(f"{memory.kind}-{memory.mt_per_s}x{memory.channels}")
    assumed.extend(memory.assumed)
    return cpu, memory


def _host_memory_rate(parts: Parts, memory: MemoryPart, found: EngineRates) -> Constant:
    """Return the bandwidth at which the engine reads experts from the host's memory: no more than was measured there."""
    rate, most = _reached_memory_rate(parts, memory, found), parts.host_bytes_per_s
    if most is None or parts.unified_memory or rate.value <= most:
        return rate
    return dataclasses.replace(rate, value=most, citation=f"{most / GIGA:.4g} GB/s measured, less than {rate.citation}")


def _reached_memory_rate(parts: Parts, memory: MemoryPart, found: EngineRates) -> Constant:
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
        # Few chiplets cannot ask for all that the channels give, and what they can ask for, they nearly get.
        most = parts.cpu.memory_gb_per_s * GIGA * parts.sockets
        if most * found["chiplet_share"].value < rate * share.value:
            return _scaled(most, found["chiplet_share"], f"{parts.cpu.memory_gb_per_s} GB/s of {parts.cpu.name}")
    if parts.gpu is not None and parts.unified_memory:
        rate = parts.gpu.bandwidth_bytes_per_s
    return _scaled(rate, share, f"{memory.channels} channels of {memory.kind}-{memory.mt_per_s}")


def _card(parts: Parts, slot: Slot, engine: Engine, backend: str, table: Mapping[str, Any] | None,
          built: str | None) -> CardConstants:  # fmt: skip
    """Return one card under the engine."""
    gpu = slot.gpu
    found = rates(engine.name, backend, table, gpu.architecture, gpu.backend, earlier=engine.earlier(built),
                  several=len(parts.slots) > 1)  # fmt: skip
    # Of a box that nobody describes, the slot is not known either.
    unsure = scatter(table, sockets=1, known=slot.pcie is not None or parts.cpu is not None or parts.unified_memory)
    link = _link(
        parts, slot, found, fetches=engine.upload_tokens == 1, pageable=engine.copies_pageable(built), unsure=unsure
    )
    device = _gpu(gpu, found, _reach(gpu, engine, backend, found))
    return CardConstants(
        name=gpu.name, device=device, host_to_device=link, device_to_host=link,
        engine=engine_constants(gpu, engine, backend, found, built),
        kernels=kernels_of_card(gpu.name, device, engine.name) if backend == "cuda" else None,
    )  # fmt: skip


def _card_links(parts: Parts, backend: str) -> CardLinks:
    """Return what joins several cards: the bridge that is named or that their modules have, else the slower of their slots."""
    bridge = parts.bridge_bytes_per_s
    if bridge is not None:
        kind, rate = BRIDGE, _sheet(bridge, "the bridge, as stated")
    elif modules := {
        slot.gpu.name: slot.gpu.link_bytes_per_s for slot in parts.slots if slot.gpu.link_bytes_per_s is not None
    }:
        slowest = min(modules, key=lambda name: modules[name] or 0.0)
        kind, rate = MODULES, _sheet(modules[slowest] or 0.0, f"links between modules of {slowest}, data sheet")
    else:
        kind = PCIE
        links = [link for link in (link_of(parts, slot) for slot in parts.slots) if link is not None]
        slow = min(links, key=pcie_bytes_per_s)
        rate = _scaled(pcie_bytes_per_s(slow), _PEER_SHARE, f"PCIe {slow} after line coding")
    shared = None
    if parts.shared_pcie is not None:
        shared = _sheet(pcie_bytes_per_s(parts.shared_pcie), f"PCIe {parts.shared_pcie}, the port of all cards")
    return CardLinks(
        kind=kind, card_bytes_per_s=rate, hop_s=_HOPS.get(backend, _HOPS["cuda"]),
        reduce_step_s=_PCIE_STEP if kind == PCIE else _BRIDGE_STEP, shared_bytes_per_s=shared,
    )  # fmt: skip


def _gpu(gpu: GpuPart, found: EngineRates, reach: Constant) -> DeviceConstants:
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
    less well.
    """
    share = found["memory_efficiency"]
    known = architectures().get(gpu.architecture or "", {})
    if "matvec_share" in known:  # measured on dense models, where no public report of experts is to fit on
        return Constant(
            value=known["matvec_share"],
            source="published",
            citation=known["matvec_source"],
            relative_uncertainty=share.relative_uncertainty,
        )
    if engine.products != "units" or gpu.units is None or gpu.boost_ghz is None:
        return share
    drawn = gpu.units * gpu.boost_ghz * GIGA * found["unit_bytes_per_cycle"].value * known.get("matvec_units", 1.0)
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


def _link(
    parts: Parts, slot: Slot, found: EngineRates, *, fetches: bool, pageable: bool, unsure: float
) -> LinkDirection:
    """Return the way between host and the card in a slot.

    fetches: the engine fetches in every step, and is as uncertain as such engines are. pageable: it has no page-locked memory. unsure:
    by how much more uncertain the slot is than a known one.
    """
    gpu, lanes = slot.gpu, link_of(parts, slot)
    rate = gpu.bandwidth_bytes_per_s / 2 if lanes is None else pcie_bytes_per_s(lanes)
    where = "shared memory, read and written" if lanes is None else f"PCIe {lanes} after line coding"
    share = found["upload_share"]
    if fetches:
        wide = max(share.relative_uncertainty, found["fetch_layer_s"].relative_uncertainty)
        share = dataclasses.replace(share, relative_uncertainty=wide)
    share = dataclasses.replace(share, relative_uncertainty=share.relative_uncertainty * unsure)
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
    return text + (f"{_ASSUMED}{', '.join(assumed)}" if assumed else "")


def assumed_of(profile: Profile) -> str | None:
    """Return what of a machine's parts nobody stated, as its description has it; None where nothing is assumed."""
    return profile.description.partition(_ASSUMED)[2] or None
