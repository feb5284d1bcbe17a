"""The nouns of a machine: a `Profile` of named constants, each with where it comes from and how sure we are of it.

Modelled: one accelerator (memory, peak operations, launch cost, what share of its peaks kernels reach), its link to the host in
both directions, the host (memory, overheads of an engine written in Python, optionally its cores as a place to compute),
optionally a disk and a node of several accelerators, and how much activities that run together slow each other down. Ignored:
clocks and throttling (a measured profile holds what they were), NUMA, PCIe switches shared by several devices. Everything is a
plain dataclass; files are read and validated by `specs_io`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import InputError, UnknownName

SCHEMA_VERSION = 1
SOURCES = ("measured", "published", "datasheet", "assumed")
"""Where a constant may come from, most trusted first."""
LANES = ("compute", "h2d", "d2h", "cpu", "disk")
"""What may run at the same time on one machine."""
DTYPES = ("float32", "float16", "float8")
"""Precisions a peak is given for; float16 stands for the faster of float16 and bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A number of a machine, with where it comes from."""

    value: float
    source: str
    """measured, published, datasheet or assumed."""
    citation: str
    """The document, table or command the value was taken from; for an assumption, the reason."""
    relative_uncertainty: float
    """Half the width of the interval the true value is believed to lie in, over the value."""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise UnknownName("source", self.source, SOURCES)
        for name in ("value", "relative_uncertainty"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number) or number < 0:
                raise InputError(name, number, "not a finite number of at least zero", "correct the profile")
        if not self.citation.strip():
            raise InputError("citation", self.citation, "every constant says where it comes from", "name the source")


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
class Curve:
    """A measured cost as a table: seconds at given arguments."""

    arguments: Mapping[str, tuple[float, ...]]
    """Named axes; every axis has as many entries as `seconds`."""
    seconds: tuple[float, ...]
    relative_uncertainty: float
    source: str = "measured"
    citation: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Everything the cost model knows of one machine."""

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
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """Tables of a calibration, by the cost they replace."""
    samples: str | None = None
    """File of raw samples the curves were fitted to."""
    schema_version: int = SCHEMA_VERSION

    @property
    def memory_bytes(self) -> int:
        """Device memory as the vendor counts it."""
        return int(self.device.memory_bytes.value)
