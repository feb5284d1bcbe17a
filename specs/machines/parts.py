"""The parts a machine is put together from, in the words people use for them.

    rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB [+ pcie-4.0x16] [+ disk:7GB/s]
    2 x epyc-9355 + ddr5-6400x24:768GiB

Modelled: a GPU's memory, bandwidth and dense peaks; a CPU's cores, clock, vector unit and memory channels; the memory's
transfers a second, channels over all sockets and capacity; the lanes of the link; a disk's rate. A part that is not in the
catalogue is written with its figures: `name:memory=24GiB,bandwidth=936GB/s,fp16=71TFLOPS`. Ignored: clocks that change,
power limits, ranks and timings of memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...base.errors import InputError
from ...base.units import GIGA, KILO, MEGA, TERA, parse_bytes

BYTES_PER_TRANSFER = 8
"""A channel of DDR memory is 64 bits wide."""

VECTOR_UNITS = ("sse4", "avx2-half", "avx2", "avx2-vnni", "avx512", "avx512-vnni", "avx512-vnni-wide", "amx", "neon")
_PCIE_BYTES_PER_S = {
    "2.0": 0.5 * GIGA,
    "3.0": 0.985 * GIGA,
    "4.0": 1.969 * GIGA,
    "5.0": 3.938 * GIGA,
    "6.0": 7.563 * GIGA,
}
"""Of one lane in one direction, after line coding (PCI Express Base Specification)."""
_RATE = re.compile(r"([0-9.]+)\s*([A-Za-z]+)/s\Z")
_MOST_FLOPS_PER_S = 1e21
_FLOPS = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*(T|P|G)(?:FLOPS|FLOP/S|OPS)?\Z", re.IGNORECASE)
_MEMORY = re.compile(r"((?:lp)?ddr[345]x?)-([0-9]{3,5})\s?x\s?([0-9]{1,2})(?::\s?(.+))?\Z", re.IGNORECASE)
_BUILT_MT_PER_S = {"ddr3": (800, 2933), "ddr4": (1600, 5400), "ddr5": (3200, 10_400), "lpddr4": (1600, 4267), "lpddr4x": (1600, 4267),
                   "lpddr5": (3200, 6400), "lpddr5x": (4800, 10_700)}  # fmt: skip
"""Slowest and fastest modules of each kind (JEDEC standards; the fastest sold with profiles beyond them)."""
_PCIE = re.compile(r"(?:pcie[- ]?)?([23456])(?:\.0)?\s?x\s?([0-9]{1,2})\Z", re.IGNORECASE)
_COUNTED = re.compile(r"([0-9]{1,2})\s*[x×]\s+(.+)\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPart:
    """A graphics card or accelerator, as sold."""

    name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    float16_flops_per_s: float
    """Dense peak of matrix units with 16-bit inputs and 32-bit sums; without matrix units that of the vector units."""
    float8_flops_per_s: float | None = None
    pcie: str | None = None
    """Generation and lanes, as "4.0x16"; None for a device that shares the host's memory."""
    backend: str = "cuda"
    unified_memory: bool = False
    source: str = ""
    uncertainty: float = 0.05
    architecture: str | None = None
    """Which table of rates its units follow (`specs/catalog/parts/architectures.json`); None where a maker publishes the sum only."""
    units: int | None = None
    """Streaming multiprocessors, compute units or cores."""
    boost_ghz: float | None = None
    memory_bus_bits: int | None = None
    memory_gbit_per_s: float | None = None
    """Of one pin."""
    memory_options_bytes: tuple[int, ...] = ()
    """Sizes it is sold with, where one name stands for several; `memory_bytes` is the largest."""
    host: str | None = None
    """The processor on the same chip."""
    link_bytes_per_s: float | None = None
    """Of a module, in one direction to the other modules of its board (NVLink, Infinity Fabric); None for cards that meet over PCIe."""

    @property
    def flops_per_unit_cycle(self) -> float | None:
        """Of the 16-bit peak, what one unit does a clock; None where units or clock are not known."""
        if self.units is None or self.boost_ghz is None:
            return None
        return self.float16_flops_per_s / (self.units * self.boost_ghz * GIGA)


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuPart:
    """One processor package."""

    name: str
    cores: int
    all_core_ghz: float
    vector: str
    """One of VECTOR_UNITS: the widest that engines use."""
    memory: str
    """ddr3, ddr4, ddr5 or lpddr5x."""
    channels: int
    max_mt_per_s: int
    also: str | None = None
    """A second kind of memory that some boards pair it with."""
    also_mt_per_s: int | None = None
    efficient_cores: int = 0
    """Small ones among `cores`."""
    efficient_share: float = 1.0
    """What a small core does of a large one's vector work: its clock and the width of its units."""
    base_ghz: float | None = None
    boost_ghz: float | None = None
    memory_gb_per_s: float | None = None
    """What the maker states where the processor cannot use all of its channels' bandwidth."""
    pcie: str | None = None
    """Generation of its own lanes."""
    sockets: int = 1
    """Most of them on one board."""
    source: str = ""

    def large_cores(self, used: int) -> float:
        """Return what `used` of its cores are worth in large ones; the large ones are used first."""
        large = self.cores - self.efficient_cores
        return min(used, large) + max(0, used - large) * self.efficient_share


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPart:
    """The host's memory."""

    kind: str
    mt_per_s: int
    """Millions of transfers a second."""
    channels: int
    """Over all sockets."""
    capacity_bytes: int | None
    """None: not stated."""

    @property
    def bytes_per_s(self) -> float:
        """Theoretical bandwidth over all channels."""
        return self.mt_per_s * MEGA * BYTES_PER_TRANSFER * self.channels


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One card of several, and the slot that it stands in."""

    gpu: GpuPart
    pcie: str | None = None
    """Of the slot, where stated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What stands in one box."""

    gpu: GpuPart | None
    """The card, the first of several."""
    cpu: CpuPart | None
    sockets: int
    memory: MemoryPart | None
    pcie: str | None
    """Of the slot, where stated."""
    disk_bytes_per_s: float | None
    threads: int | None = None
    """Cores that the engine is told to use; None: all."""
    more: tuple[Slot, ...] = ()
    """Further cards, in the order in which engines number them."""
    bridge_bytes_per_s: float | None = None
    """Between cards over a bridge of their own (NVLink), in one direction; None: they meet over PCIe."""
    shared_pcie: str | None = None
    """The one port that all cards stand behind (a switch), where stated."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every card with its slot."""
        return () if self.gpu is None else (Slot(gpu=self.gpu, pcie=self.pcie), *self.more)

    @property
    def unified_memory(self) -> bool:
        """Whether card and host share one memory."""
        return self.gpu is not None and self.gpu.unified_memory


def pcie_bytes_per_s(link: str) -> float:
    """Return the bytes per second of one direction of a link written as "4.0x16"."""
    match = _PCIE.match(link)
    if match is None or int(match[2]) not in (1, 2, 4, 8, 16):
        raise InputError("pcie", link, "not a generation and lanes", "write for instance 4.0x16")
    return _PCIE_BYTES_PER_S[f"{match[1]}.0"] * int(match[2])


def parse_memory(text: str) -> MemoryPart | None:
    """Return the memory that `text` ("ddr5-6000x2:64GiB") describes, None where it is about something else."""
    match = _MEMORY.match(text)
    if match is None:
        return None
    kind, speed, channels, size = match[1].lower(), int(match[2]), int(match[3]), match[4]
    if kind not in _BUILT_MT_PER_S or not 1 <= channels <= 32:
        raise InputError(
            "memory", text, "no such kind, or channels outside of what is built", "write for instance ddr5-6000x2:64GiB"
        )
    slowest, fastest = _BUILT_MT_PER_S[kind]
    if not slowest <= speed <= fastest:
        raise InputError("memory", text, f"{kind} is built for {slowest} to {fastest} million transfers a second",
                         "write for instance ddr5-6000x2:64GiB")  # fmt: skip
    return MemoryPart(
        kind=kind,
        mt_per_s=speed,
        channels=channels,
        capacity_bytes=None if size is None else parse_bytes(size, "memory"),
    )


def parse_rate(text: str, field: str) -> float:
    """Return bytes per second of "936GB/s"."""
    match = _RATE.match(text.strip())
    if match is None:
        raise InputError(field, text, "not a rate", "write for instance 936GB/s")
    rate = float(parse_bytes(match[1] + match[2], field))
    if rate <= 0:
        raise InputError(field, text, "not above zero", "write for instance 936GB/s")
    return rate


def parse_flops(text: str, field: str) -> float:
    """Return operations per second of "71TFLOPS"."""
    match = _FLOPS.match(text.strip())
    rate = 0.0 if match is None else float(match[1]) * {"G": GIGA, "T": TERA, "P": KILO * TERA}[match[2].upper()]
    if not 0 < rate < _MOST_FLOPS_PER_S:
        raise InputError(field, text, "not a rate of operations", "write for instance 71TFLOPS")
    return rate


def custom_gpu(text: str) -> GpuPart | None:
    """Return the GPU of "name:memory=24GiB,bandwidth=936GB/s,fp16=71TFLOPS", None where `text` has no figures."""
    name, colon, figures = text.partition(":")
    if not colon or "=" not in figures:
        return None
    known = ("memory", "bandwidth", "fp16", "fp8", "pcie", "backend")
    given: dict[str, str] = {}
    for entry in figures.split(","):
        key, _, value = entry.partition("=")
        if key.strip() not in known:
            raise InputError(f"{name}: figure", key.strip(), f"not one of {', '.join(known)}", "correct the part")
        given[key.strip()] = value.strip()
    missing = [key for key in ("memory", "bandwidth", "fp16") if key not in given]
    if missing:
        raise InputError(f"{name}: figure", missing[0], "not given", f"add {missing[0]}=…")
    return GpuPart(
        name=name.strip() or "custom",
        memory_bytes=parse_bytes(given["memory"], f"{name}: memory"),
        bandwidth_bytes_per_s=parse_rate(given["bandwidth"], f"{name}: bandwidth"),
        float16_flops_per_s=parse_flops(given["fp16"], f"{name}: fp16"),
        float8_flops_per_s=parse_flops(given["fp8"], f"{name}: fp8") if "fp8" in given else None,
        pcie=given.get("pcie", "4.0x16"), backend=given.get("backend", "cuda"), source="given by the user", uncertainty=0.1,
    )  # fmt: skip


def counted(text: str) -> tuple[int, str]:
    """Return (2, "epyc-9355") of "2 x epyc-9355"; a part without a count is there once."""
    match = _COUNTED.match(text.strip())
    return (int(match[1]), match[2].strip()) if match else (1, text.strip())
