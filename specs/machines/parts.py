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
from dataclasses import dataclass, field

from ...base.errors import InputError
from ...base.units import GIB, GIGA, KILO, MEGA, MIB, TERA, TIB, parse_bytes

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
_MEMORY_KIND = re.compile(r"\b((?:lp)?ddr[345]x?)(?![a-z])", re.IGNORECASE)
_MEMORY_STICKS = re.compile(r"\b([0-9]{1,2})\s?[x×*]\s?([0-9]{1,4})\s?(?:gi?b|g)\b", re.IGNORECASE)
_MEMORY_SIZE = re.compile(r"(?<![0-9.])([0-9]{1,5}(?:\.[0-9]{1,3})?)\s?(gi?b|g|ti?b|t|mi?b)\b(?!/s)", re.IGNORECASE)
_MEMORY_CHANNELS = re.compile(
    r"(?<![0-9])([0-9]{1,2}|single|dual|quad|hexa|octa|six|eight|twelve)[- ]?(?:channels?|ch)\b", re.IGNORECASE
)
_MEMORY_TIMES = re.compile(r"(?<=[0-9])\s?[x×]\s?([0-9]{1,2})\b", re.IGNORECASE)
_MEMORY_COUNT = re.compile(r"(?<![0-9.a-z])([0-9]{1,2})\s?[x×*](?=\s|\Z)", re.IGNORECASE)
_MEMORY_SPEED = re.compile(r"(?<![0-9.])([0-9]{3,5})\s?(?:mhz|mt/s|mts|mt)?(?![0-9a-z])", re.IGNORECASE)
_MEMORY_WORDS = re.compile(
    r"\b(?:ram|memory|ecc|[rul]?dimms?|lrdimms?|so-?dimms?|reg|registered|unbuffered|system|host|main|of|at|sticks?|modules?|kit|total|"
    r"expo|xmp|c?l ?[0-9]{2}|c[0-9]{2}|with|channel|[12]r)\b",
    re.IGNORECASE,
)
_USUAL_MT_PER_S = {
    "ddr3": 1600,
    "ddr4": 3200,
    "ddr5": 5600,
    "lpddr4": 4267,
    "lpddr4x": 4267,
    "lpddr5": 6400,
    "lpddr5x": 7500,
}
_DESKTOP_CHANNELS, _MOST_CHANNELS = 2, 32
_BUILT_MT_PER_S = {"ddr3": (800, 2933), "ddr4": (1600, 5400), "ddr5": (3200, 10_400), "lpddr4": (1600, 4267), "lpddr4x": (1600, 4267),
                   "lpddr5": (3200, 6400), "lpddr5x": (4800, 10_700)}  # fmt: skip
"""Slowest and fastest modules of each kind (JEDEC standards; the fastest sold with profiles beyond them)."""
_PCIE = re.compile(
    r"(?:pci[- ]?e(?:xpress)?)?[- :]*(?:gen[- ]?)?([23456])(?:\.0)?(?:[- ]?[x×][- ]?([0-9]{1,2}))?\Z", re.IGNORECASE
)
_COUNTS = {"single": 1, "one": 1, "dual": 2, "two": 2, "triple": 3, "three": 3, "quad": 4, "four": 4, "six": 6, "hexa": 6, "eight": 8,
           "octa": 8, "twelve": 12}  # fmt: skip
_BEFORE = re.compile(rf"(?:([0-9]{{1,2}})\s*[x×*]\s*|({'|'.join(_COUNTS)})\s+)(.+)\Z", re.IGNORECASE)
_BEHIND = re.compile(r"(.*\S)\s+[x×*]\s*([0-9]{1,2})\Z", re.IGNORECASE)


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
    bridge_bytes_per_s: float | None = None
    """Of the bridge that may join it to another card (NVLink), in one direction; None: it has no connector for one."""
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
    assumed: tuple[str, ...] = field(default=(), compare=False)
    """What of it was not stated."""

    @property
    def bytes_per_s(self) -> float:
        """Theoretical bandwidth over all channels."""
        return self.mt_per_s * MEGA * BYTES_PER_TRANSFER * self.channels


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenMemory:
    """What somebody wrote of the host's memory; None: not said."""

    kind: str | None
    mt_per_s: int | None
    channels: int | None
    sticks: int | None
    """Modules."""
    capacity_bytes: int | None


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
    host_bytes_per_s: float | None = None
    """What a program was measured to read of the host's memory in a second, where stated: no engine reads more."""
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


def parse_link(text: str) -> tuple[str, int | None]:
    """Return generation and lanes (None: not said) of "4.0x16", "PCIe Gen4 x8" or "pcie-5.0"; raises InputError."""
    match = _PCIE.match(text.strip())
    lanes = None if match is None or match[2] is None else int(match[2])
    if match is None or lanes not in (None, 1, 2, 4, 8, 16):
        raise InputError("pcie", text, "not a generation and lanes", "write for instance 4.0x16")
    return f"{match[1]}.0", lanes


def pcie_bytes_per_s(link: str) -> float:
    """Return the bytes per second of one direction of a link written as "4.0x16"."""
    generation, lanes = parse_link(link)
    if lanes is None:
        raise InputError("pcie", link, "its lanes are not said", f"write for instance {generation}x16")
    return _PCIE_BYTES_PER_S[generation] * lanes


def parse_memory(text: str) -> WrittenMemory | None:
    """Return what `text` says of the host's memory, None where it is about something else.

    Read: "ddr5-6000x2:64GiB", and as people write it: "64 GB DDR5-6000", "2x32GB DDR5 6000MHz", "12-channel DDR5-4800". A GB of memory
    modules is a GiB, as they are sold. Raises InputError where a kind of memory is named and a word beside it is not understood.
    """
    found: dict[str, list[str]] = {}
    rest = text.lower()
    for what, pattern in (("sticks", _MEMORY_STICKS), ("size", _MEMORY_SIZE), ("kind", _MEMORY_KIND), ("channels", _MEMORY_CHANNELS),
                          ("times", _MEMORY_TIMES), ("speed", _MEMORY_SPEED), ("count", _MEMORY_COUNT)):  # fmt: skip
        found[what] = ["|".join(match.groups()) for match in pattern.finditer(rest)]
        rest = pattern.sub(" ", rest)
    rest = re.sub(r"[\s:@,/()-]+", " ", _MEMORY_WORDS.sub(" ", rest)).strip()
    if not found["kind"] and (rest or found["speed"] or not found["sticks"] + found["size"]):
        return None
    remedy = "write for instance ddr5-6000x2:64GiB or 2x32GB DDR5-6000"
    in_channels = found["channels"] + found["times"]
    twice = [
        one for one in (found["sticks"] + found["size"], found["kind"], in_channels, found["speed"]) if len(one) > 1
    ]
    if rest or twice or len(found["count"]) > 1:
        raise InputError("memory", text, f"{rest!r} is not understood" if rest else "something is said twice", remedy)
    kind = found["kind"][0] if found["kind"] else None
    speed = int(found["speed"][0]) if found["speed"] else None
    channels = next((_COUNTS.get(one) or int(one) for one in in_channels), None)
    if kind not in (None, *_BUILT_MT_PER_S) or not 1 <= (channels or 1) <= _MOST_CHANNELS:
        raise InputError("memory", text, "no such kind, or channels outside of what is built", remedy)
    if kind is not None and speed is not None and not _BUILT_MT_PER_S[kind][0] <= speed <= _BUILT_MT_PER_S[kind][1]:
        slowest, fastest = _BUILT_MT_PER_S[kind]
        raise InputError(
            "memory", text, f"{kind} is built for {slowest} to {fastest} million transfers a second", remedy
        )
    sticks, capacity = (int(found["count"][0]) if found["count"] else None), None
    if found["sticks"]:
        sticks, gib = (int(one) for one in found["sticks"][0].split("|"))
        capacity = sticks * gib * GIB
    elif found["size"]:
        number, unit = found["size"][0].split("|")
        capacity = int(float(number) * {"m": MIB, "g": GIB, "t": TIB}[unit[0]])
    if sticks == 0 or capacity == 0:
        raise InputError("memory", text, "nothing is nothing to run on", remedy)
    return WrittenMemory(kind=kind, mt_per_s=speed, channels=channels, sticks=sticks, capacity_bytes=capacity)


def settled_memory(written: WrittenMemory, cpu: CpuPart | None, sockets: int) -> MemoryPart:
    """Return the memory with what was not said as `cpu` has it: its kind, the speed it is made for, all of its channels.

    Modules that are counted fill one channel each, as far as there are channels.
    """
    kind = written.kind or (cpu.memory if cpu is not None else "ddr5")
    speed, channels = written.mt_per_s, written.channels
    assumed = []
    if speed is None:
        own = None if cpu is None else {cpu.memory: cpu.max_mt_per_s, cpu.also: cpu.also_mt_per_s}.get(kind)
        speed = own or _USUAL_MT_PER_S[kind]
        assumed.append(f"{kind} at {speed} million transfers a second")
    if channels is None:
        most = _DESKTOP_CHANNELS if cpu is None else cpu.channels * sockets
        channels = most if written.sticks is None else min(written.sticks, most)
        if cpu is None and (written.sticks or 0) > 2 * most:
            channels = min(written.sticks or 0, _MOST_CHANNELS)  # no desktop takes so many
        if cpu is None or written.sticks is None:
            assumed.append(f"{channels} channel{'s' if channels > 1 else ''} of memory")
    return MemoryPart(
        kind=kind, mt_per_s=speed, channels=channels, capacity_bytes=written.capacity_bytes, assumed=tuple(assumed)
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
    """Return (2, "epyc-9355") of "2 x epyc-9355", "2x epyc-9355", "dual epyc-9355" and "epyc-9355 x2".

    A part without a count is there once.
    """
    whole = text.strip()
    if (match := _BEFORE.match(whole)) is not None:
        return int(match[1]) if match[1] else _COUNTS[match[2].lower()], match[3].strip()
    if (match := _BEHIND.match(whole)) is not None:
        return int(match[2]), match[1].strip()
    return 1, whole
