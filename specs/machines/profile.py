"""The nouns of a machine: a `Profile` of named constants, each with where it comes from and how sure we are of it.

Modelled: one accelerator (memory, peak operations, launch cost, what share of its peaks kernels reach), its link to the
host in both directions, the host (memory, overheads of an engine written in Python, optionally its cores as a place to
compute), optionally several cards in the box and what joins them, a disk, a node of several accelerators, and how much
activities that run together slow each other down. Ignored: clocks and throttling (a measured profile holds what they were),
NUMA. Everything is a plain dataclass; `profile_file` reads and validates files.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...base.errors import InputError, UnknownName
from ...base.units import format_bytes
from .curve import Curve as Curve
from .gpu_kernels import GpuKernels, check_kernels
from .ranges import MOST_UNCERTAIN, check_number, check_points, check_uncertainty, range_of

SCHEMA_VERSION = 1
SET_BY_USER = "set by the user"
SOURCES = ("measured", "published", "datasheet", "assumed", SET_BY_USER)
"""Where a constant may come from, most trusted first; what a command line sets is a supposition."""
LANES = ("compute", "h2d", "d2h", "cpu", "disk", "exchange")
"""What may run at the same time on one machine."""
DTYPES = ("float32", "float16", "float8")
"""Precisions a peak is given for; float16 stands for the faster of float16 and bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A number of a machine, with where it comes from."""

    value: float
    source: str
    """measured, published, datasheet, assumed or set by the user."""
    citation: str
    """The document, table or command the value was taken from; for an assumption, the reason."""
    relative_uncertainty: float
    """Half the width of the interval the true value is believed to lie in, over the value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConstants:
    """The accelerator that runs the model."""

    kind: str
    """gpu, or cpu where the "device" is the host's own cores."""
    memory_bytes: Constant
    runtime_bytes: Constant
    """Memory that the driver, libraries and allocator take before any weight is loaded."""
    memory_bytes_per_s: Constant
    """Peak bandwidth of device memory."""
    memory_efficiency: Constant
    """Share of that bandwidth which matrix kernels reach on large weights."""
    peak_flops_per_s: Mapping[str, Constant]
    """Dense peak by precision, without sparsity."""
    compute_efficiency: Constant
    """Share of the peak which matrix kernels reach on large batches."""
    launch_s: Constant
    """What a kernel costs on the device besides its work: start, tail, gap to the next one."""
    dequantise_efficiency: Mapping[str, Constant]
    """By weight format: share of `memory_efficiency` left when weights are expanded inside the kernel."""
    host_shares_compute: bool = False
    """The host's own work stops the device from computing (a CPU device)."""
    unified_memory: bool = False
    """Device and host share one memory: what the device holds is not free on the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDirection:
    """One direction between host and device: seconds = latency + (bytes + half size) / bandwidth."""

    pinned_bytes_per_s: Constant
    """Bandwidth of large copies of page-locked memory."""
    pageable_bytes_per_s: Constant
    """Bandwidth of large copies of ordinary memory, staged by the driver."""
    latency_s: Constant
    """From submission to the first byte, however small the copy."""
    half_size_bytes: Constant
    """Size at which half the bandwidth is reached, latency apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuConstants:
    """The host's cores as a place to run experts."""

    flops_per_s: Constant
    """Achieved on matrix products of many rows."""
    memory_bytes_per_s: Constant
    """Achieved when weights are read once."""
    launch_s: Constant
    """Handing one expert to the cores and taking the result back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConstants:
    """The host: its memory, and what an engine written in Python costs it."""

    memory_bytes: Constant
    per_step_s: Constant
    """Between two forward passes: sampling, bookkeeping."""
    per_layer_s: Constant
    """From the routing being computed to the host having read it and decided."""
    per_kernel_s: Constant
    """Issuing one kernel."""
    per_transfer_s: Constant
    """Issuing one copy."""
    kernels_per_dense_layer: Constant
    """Kernels an engine issues for what surrounds the experts of one layer."""
    kernels_per_head: Constant
    """Kernels from the last layer to the next token."""
    cpu: CpuConstants | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskConstants:
    """Where experts live when the host's memory is too small."""

    read_bytes_per_s: Constant
    latency_s: Constant


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConstants:
    """Several such devices in a server, and servers in a network. All bandwidths are of one direction, per device."""

    num_gpus: int
    gpu_link_bytes_per_s: Constant
    """Usable by one device towards the others of its server."""
    gpu_link_latency_s: Constant
    nic_bytes_per_s: Constant | None = None
    """Usable by one device towards other servers."""
    nic_latency_s: Constant | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CardConstants:
    """One of several cards in a box: all that is its own."""

    name: str
    device: DeviceConstants
    host_to_device: LinkDirection
    device_to_host: LinkDirection
    engine: EngineConstants | None = None
    """The engine's constants on this card: its clock and its generation count."""
    kernels: GpuKernels | None = None


PCIE, BRIDGE, MODULES = "pcie", "bridge", "modules"


@dataclass(frozen=True, slots=True, kw_only=True)
class CardLinks:
    """What several cards in a box say to each other, and over what."""

    kind: str
    """pcie, bridge where cards have links of their own, or modules where these are the ones that such modules are made with."""
    card_bytes_per_s: Constant | None
    """Between two cards, in one direction; None where nothing says."""
    hop_s: Constant
    """What handing a pass over from one card to the next costs, besides its bytes."""
    reduce_step_s: Constant
    """One step of a reduction over n cards, which takes 2 (n-1) of them behind slots, 2 log2 n over links of their own."""
    shared_bytes_per_s: Constant | None = None
    """The one port to the host that all cards stand behind; None: each has its own."""


_FEW_TOKENS = 8
USUAL_KERNELS = 22
"""Kernels of a layer with grouped attention and experts, as engines launch them one after another."""
DELTA_KERNELS = 28
"""Of a mixer with a gated delta rule where the rule itself is one kernel: two projections in, convolution and its state, norms of queries
and keys, decay and gates, the rule and its state, gated norm, projection out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConstants:
    """How a serving engine uses a machine made of parts: shares of peaks and fixed times that its own kernels have.

    What it reaches of the device memory's bandwidth, of the link and of the host stands in the profile's own constants.
    """

    name: str
    """The engine, as `moeplan engine list` names it."""
    backend: str
    """cuda, rocm, vulkan, metal or cpu."""
    version: str
    """Which versions, or which dates, the constants belong to."""
    layer_s: Constant
    """What a layer of a decoding step takes besides its bytes: kernels one after another, however they are launched. It is that of a layer
    of `USUAL_KERNELS` kernels, with grouped attention and experts; others take it by their number of kernels."""
    pass_layer_s: Constant
    """What a layer of a pass of many tokens takes on top of that."""
    kv_efficiency: Constant
    """Share of the memory's bandwidth at which attention reads keys and values while decoding."""
    dense_efficiency: Constant
    """Share of the peak that large products of dense weights reach."""
    expert_efficiency: Constant
    """Share of the peak that large products of experts' weights reach."""
    attention_efficiency: Constant
    """Share of the peak that attention of a prompt reaches."""
    tile_tokens: Constant
    """Tokens whose work an expert's matrix product costs on top of its own: tiles that are not full."""
    cpu_layer_s: Constant
    """What a layer takes whose experts run on the cores, besides their work: handing over, waking threads, waiting."""
    fetch_layer_s: Constant
    """What a layer takes whose missing experts are fetched, besides copying: the routing read back, copies asked for."""
    matvec_tokens: int
    """Up to so many tokens of an expert, kernels read weights and multiply as they come: bytes alone count."""
    delta_kernels: int = DELTA_KERNELS
    """Kernels of a mixer with a delta rule (linear attention), which engines have merged into fewer over the years."""
    delta_flops_per_s: float | None = None
    """Of a prompt's delta rule where it goes token by token; None: at attention's rate."""
    codebook_prompts: float = 2.5
    """How many times longer than others products of formats with codebooks (IQ1_S to IQ3_S) take cores that compute a prompt."""
    codebook_steps: float = 2.7
    """The same of a decoding step, over steps of other formats."""
    expand_tokens: float = 0.0
    """Tokens whose multiplications on cores take as long as unpacking a matrix's blocks once, where kernels unpack them for many tokens at
    a time; nought where they unpack them anew for each."""
    repack_gain: float = 1.0
    """How many times faster prompts of formats are that the engine lays out anew for the cores' matrix instructions (`is_repacked`)."""
    memory_layout: str = "plain"
    """Where the engine puts what it holds, by a name that the memory breakdown knows."""
    one_writer: bool = False
    """Experts that are uploaded to several cards at once pass one process's buffers, which no further card makes faster."""
    follows_over_cards: bool = False
    """Passes of a prompt follow each other over cards that hold layers."""
    input_copies: int = 1
    """How many times each card keeps the inputs of a pass where every layer lies on cards, one after another."""

    def core_tokens(self, tokens: int, *, codebook: bool, repacked: bool) -> float:
        """Return how many tokens' multiplications at the cores' rate for prompts `tokens` tokens of a matrix take on cores."""
        if codebook and tokens <= _FEW_TOKENS:
            return tokens * self.codebook_steps * (1.0 + self.expand_tokens)
        if codebook:
            return tokens * self.codebook_prompts
        return self.expand_tokens + tokens / (self.repack_gain if repacked else 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Everything the cost model knows of one machine."""

    schema_version: int = SCHEMA_VERSION
    name: str
    description: str
    device: DeviceConstants
    host_to_device: LinkDirection
    device_to_host: LinkDirection
    host: HostConstants
    contention: Mapping[str, Constant]
    """"lane/companion": speed of `lane` while `companion` runs, relative to running alone; a missing pair is 1."""
    disk: DiskConstants | None = None
    node: NodeConstants | None = None
    engine: EngineConstants | None = None
    """The serving engine that the constants are of, for a machine made of parts."""
    kernels: GpuKernels | None = None
    """What the kernels of an engine take on this device, where they were measured; predictions then go by them."""
    cards: tuple[CardConstants, ...] = ()
    """Every card of a box of several, the first one `device` again, in the order in which engines number them; empty for one card."""
    links: CardLinks | None = None
    """Between those cards."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """Tables of a calibration, by the cost they replace."""
    samples: str | None = None
    """File of raw samples the curves were fitted to."""

    def __post_init__(self) -> None:
        _check_profile(self)

    @property
    def memory_bytes(self) -> int:
        """Device memory, of all cards together."""
        return sum(self.card_bytes)

    @property
    def card_bytes(self) -> tuple[int, ...]:
        """Device memory of each card."""
        devices = [card.device for card in self.cards] or [self.device]
        return tuple(int(device.memory_bytes.value) for device in devices)

    @property
    def card_names(self) -> tuple[str, ...]:
        """The name of each card."""
        return tuple(card.name for card in self.cards) or (self.name,)

    @property
    def num_cards(self) -> int:
        """Cards in the box; the cores of a machine without any count as one device."""
        return max(1, len(self.cards))

    def of_card(self, card: int) -> Profile:
        """Return the machine with one of its cards alone."""
        if not self.cards:
            return self
        mine = self.cards[card]
        return dataclasses.replace(
            self, device=mine.device, host_to_device=mine.host_to_device, device_to_host=mine.device_to_host, engine=mine.engine,
            kernels=mine.kernels, cards=(), links=None,
        )  # fmt: skip

    def with_rates_uncertain_by(self, spread: float) -> Profile:
        """Return the profile with every rate at which weights are read less certain by `spread`: bytes that nobody knows exactly."""

        def wider(part: Any, *names: str) -> Any:
            if part is None:
                return None
            changes = {
                name: dataclasses.replace(
                    constant,
                    relative_uncertainty=min(math.hypot(constant.relative_uncertainty, spread), MOST_UNCERTAIN),
                )
                for name, constant in ((name, getattr(part, name)) for name in names)
            }
            return dataclasses.replace(part, **changes)

        def wider_card(card: Any) -> dict[str, Any]:
            return {
                "device": wider(card.device, "memory_bytes_per_s"),
                "host_to_device": wider(card.host_to_device, "pinned_bytes_per_s", "pageable_bytes_per_s"),
            }

        host = dataclasses.replace(self.host, cpu=wider(self.host.cpu, "memory_bytes_per_s"))
        return dataclasses.replace(
            self, host=host, disk=wider(self.disk, "read_bytes_per_s"), **wider_card(self),
            cards=tuple(dataclasses.replace(card, **wider_card(card)) for card in self.cards),
        )  # fmt: skip

    def constants(self) -> Iterator[tuple[str, Constant]]:
        """Yield (dotted name, constant) for every constant of the profile, in declaration order."""
        yield from _constants("", self)


def profile_values(profile: Profile) -> dict[str, Any]:
    """Return a profile as plain values; one card is written as it always was."""
    data = dataclasses.asdict(profile)
    if not profile.cards:
        del data["cards"], data["links"]
    return data


def profile_to_json(profile: Profile) -> str:
    """Return `profile` as JSON text; the same profile always gives the same bytes."""
    data = profile_values(profile)
    if profile.kernels is None:
        del data["kernels"]  # most machines have none
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


_MAX_GPUS = 2**16


def _constants(prefix: str, part: Any) -> Iterator[tuple[str, Constant]]:
    """Yield the constants below `part`, a dataclass, a mapping or anything else."""
    if isinstance(part, Constant):
        yield prefix, part
    elif dataclasses.is_dataclass(part):
        for each in dataclasses.fields(part):
            yield from _constants(f"{prefix}.{each.name}" if prefix else each.name, getattr(part, each.name))
    elif isinstance(part, Mapping):
        for key, value in part.items():
            yield from _constants(f"{prefix}.{key}", value)
    elif isinstance(part, tuple):
        for key, value in enumerate(part):
            yield from _constants(f"{prefix}.{key}", value)


def _check_profile(profile: Profile) -> None:
    """Return nothing; raises InputError for the first constant, name or count that breaks a rule."""
    if profile.schema_version != SCHEMA_VERSION:
        rule = f"this version knows {SCHEMA_VERSION}"
        raise InputError("schema_version", profile.schema_version, rule, "calibrate again")
    if profile.device.kind not in ("gpu", "cpu"):
        raise UnknownName("device.kind", profile.device.kind, ("gpu", "cpu"))
    for dtype in profile.device.peak_flops_per_s:
        if dtype not in DTYPES:
            raise UnknownName("device.peak_flops_per_s", dtype, DTYPES)
    for pair in profile.contention:
        lane, slash, companion = pair.partition("/")
        if not slash or lane not in LANES or companion not in LANES or lane == companion:
            rule = f"not lane/companion of {', '.join(LANES)}"
            raise InputError("contention", pair, rule, "write for instance compute/h2d")
    if profile.node is not None and not 1 <= profile.node.num_gpus <= _MAX_GPUS:
        rule = "below one" if profile.node.num_gpus < 1 else f"more than {_MAX_GPUS}"
        raise InputError("node.num_gpus", profile.node.num_gpus, rule, "give the devices of a server")
    if profile.cards and (len(profile.cards) < 2 or profile.links is None or profile.cards[0].device != profile.device):
        raise InputError("cards", len(profile.cards), "one card, no links between cards, or a first card that is not the device",
                         "list every card of a box of several, the device first, and what joins them")  # fmt: skip
    for name, constant in profile.constants():
        _check_constant(name, constant)
    for name, curve in profile.curves.items():
        check_points(f"curves.{name}", curve.arguments, curve.seconds, curve.relative_uncertainty)
        if curve.source not in SOURCES:
            raise UnknownName(f"curves.{name}.source", curve.source, SOURCES)
    if profile.kernels is not None:
        check_kernels(profile.kernels, SOURCES)


def _check_constant(name: str, constant: Constant) -> None:
    if constant.source not in SOURCES:
        raise UnknownName(f"{name}.source", constant.source, SOURCES)
    if not constant.citation.strip():
        raise InputError(
            f"{name}.citation", constant.citation, "every constant says where it comes from", "name the source"
        )
    for key in ("value", "relative_uncertainty"):
        check_number(f"{name}.{key}", getattr(constant, key))
    check_uncertainty(name, constant.relative_uncertainty)
    least, most, words = range_of(name)
    if not least <= constant.value <= most:
        ends = [format_bytes(int(end)) if words == "bytes" else f"{end:g}" for end in (least, most)]
        rule = f"{words} from {ends[0]} to {ends[1]} expected"
        raise InputError(f"{name}.value", constant.value, rule, "correct the profile")
