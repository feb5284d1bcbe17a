"""What may be wrong where a run is slow, or not what was said where it is fast: causes whose computed size fits the gap.

Modelled: each cause as a change of machine or settings, predicted as the run itself is. It fits where the measured speeds lie in the
intervals of that prediction, and where it comes nearer to them than the run as described. Ignored: causes that leave speed alone,
and how likely each is before anything is looked at.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from ..base.errors import DoesNotFit, InputError
from ..base.units import GIGA
from ..papers.field.predict import Predicted
from ..sim.offload.memory.host import HOST_SHARE
from ..specs.machines.engines import load_engine
from ..specs.machines.notation import link_of
from ..specs.machines.parts import GpuPart, Parts
from ..specs.machines.profile import Profile
from ..specs.memory import PLAIN, host_dense_bytes
from ..specs.models.mixes.published import published_files
from .case import CORES, DECODE, PREFILL, Case
from .changes import device_bytes, file_bytes, with_host_layers

_BASE_MT_PER_S = {"ddr3": 1333, "ddr4": 2133, "ddr5": 4800}
"""What memory runs at until a profile for more is switched on (JEDEC's first speeds that are sold)."""
_CLOCKS = (0.8, 0.65, 0.5, 0.35)
_LINKS = (8, 4, 1)
_DISKS_BYTES_PER_S = (3.0 * GIGA, 0.5 * GIGA, 14.0 * GIGA)
"""Where none is stated: a solid-state disk on four lanes of PCIe 3; one on SATA; one on four lanes of PCIe 5. Makers' data sheets."""
_SHIFTS_LEAST = 1.05
_STREAMS = (2, 4, 8)
_MOST_DRAFTED = 3.0
_LENGTHS = "workload: requests of"
"""How a case says that it took lengths which nobody said."""


_Three: TypeAlias = tuple[float, float, float]
"""Predicted, low, high."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Something to check, with the speeds that it would give."""

    what: str
    check: str
    """How to look."""
    speeds: Mapping[str, tuple[float, float, float]]
    """By metric: predicted, low, high."""
    distance: float
    """How far the prediction is from what was measured: the mean of |ln(measured / predicted)|, and one where its size is the gap's."""


def causes_of(case: Case, measured: Mapping[str, float], *, slow: bool, over_bytes: float = 0.0) -> list[Cause]:
    """Return the causes whose size fits, the nearest first.

    slow: why it is slower than predicted, else why faster. over_bytes: what of the experts the host's memory cannot hold.
    """
    before = {metric: paged(case, metric, over_bytes) for metric in measured}
    plain = _distance(before, measured)
    found = []
    for what, check, other, factors in _slow(case) if slow else _fast(case, measured, before):
        try:
            speeds = {
                metric: _scaled(paged(other, metric, over_bytes), factors.get(metric, 1.0)) for metric in measured
            }
        except (DoesNotFit, InputError):
            continue
        moved = max(abs(math.log(speeds[metric][0] / before[metric][0])) for metric in measured)
        distance = _distance(speeds, measured)
        fits = all(speeds[metric][1] <= value <= speeds[metric][2] for metric, value in measured.items())
        if fits and distance < plain and moved >= math.log(_SHIFTS_LEAST):
            found.append(Cause(what=what, check=check, speeds=speeds, distance=distance + bool(factors)))
    return _nearest(found)


def paged(case: Case, metric: str, over_bytes: float) -> _Three:
    """Return (predicted, low, high) of a metric where so many bytes of what the host must hold are read from a disk in every pass.

    A token reads its experts' share of them, a micro-batch all. A disk that nobody states may be slow or fast.
    """
    value, low, high = _three(case.predicted(metric))
    if over_bytes <= 0 or case.kind not in (*CORES, "layers", "cpu"):
        return value, low, high
    model, experts, _ = case.formats()
    layers = max(1, case.host_layers)
    on_host = layers * model.num_experts * model.expert_bytes(experts)
    read = layers * model.top_k * model.expert_bytes(experts) * min(1.0, over_bytes / on_host)
    if metric == PREFILL:
        read = over_bytes / min(case.ubatch, case.prompt)
    stated = None if case.parts is None else case.parts.disk_bytes_per_s
    usual, slow, fast = _DISKS_BYTES_PER_S if stated is None else (stated, 0.7 * stated, stated)
    return tuple(1 / (1 / speed + read / disk) for speed, disk in ((value, usual), (low, slow), (high, fast)))  # type: ignore[return-value]


def _nearest(found: list[Cause]) -> list[Cause]:
    """Return causes by distance, of those that are looked for in one way only the nearest."""
    kept: dict[str, Cause] = {}
    for one in sorted(found, key=lambda one: (one.distance, one.what)):
        kept.setdefault(one.check, one)
    return list(kept.values())


def _three(one: Predicted) -> _Three:
    return float(one.value or 0), float(one.low or 0), float(one.high or 0)


def _scaled(three: _Three, factor: float) -> _Three:
    value, low, high = three
    return value * factor, low * factor, high * factor


def _distance(speeds: Mapping[str, tuple[float, float, float]], measured: Mapping[str, float]) -> float:
    return sum(abs(math.log(value / speeds[metric][0])) for metric, value in measured.items()) / len(measured)


_Tried = Iterator[tuple[str, str, Case, Mapping[str, float]]]


# --- slower than predicted -------------------------------------------------------------------------------------------------


def _slow(case: Case) -> _Tried:
    """Yield (what, how to look, the case with it, factors on its speeds)."""
    yield from _layers_fell(case)
    yield from _longer(case)
    parts = case.parts
    if parts is None:
        return
    shares = case.kind in (*CORES, "layers", "cpu")
    if shares and parts.memory is not None and not parts.unified_memory:
        yield from _memory(case, parts)
    if shares and parts.cpu is not None:
        yield from _threads(case, parts)
    if shares and parts.sockets > 1 and parts.memory is not None:
        one = dataclasses.replace(parts.memory, channels=max(1, parts.memory.channels // parts.sockets))
        yield ("the model lies on one socket's memory (NUMA)", "numastat -p PID; start with numactl --interleave=all, or --numa distribute",
               case.changed(parts=dataclasses.replace(parts, memory=one)), {})  # fmt: skip
    gpu = parts.gpu
    if gpu is not None and case.profile.device.kind == "gpu":
        if gpu.boost_ghz is not None:
            for share in _CLOCKS:
                slower = dataclasses.replace(
                    gpu, boost_ghz=gpu.boost_ghz * share, float16_flops_per_s=gpu.float16_flops_per_s * share
                )
                yield (f"the card's clock held at about {share:.0%} (power limit, heat)", _clock_tool(gpu),
                       case.changed(parts=dataclasses.replace(parts, gpu=slower)), {})  # fmt: skip
        yield from _link(case, parts)


def _is_nvidia(parts: Parts) -> bool:
    return parts.gpu is not None and parts.gpu.backend == "cuda"


def _clock_tool(gpu: GpuPart) -> str:
    """Return what shows clocks and power of a card."""
    if gpu.backend == "cuda":
        return "nvidia-smi -q -d POWER,CLOCK,PERFORMANCE while it runs"
    if gpu.backend == "metal":
        return "sudo powermetrics --samplers gpu_power while it runs"
    return "the card's clock and power while it runs (amd-smi metric, intel_gpu_top, radeontop)"


def _layers_fell(case: Case) -> _Tried:
    """Yield placements with more layers on the cores than were said."""
    look = "the engine's log: which buffers hold the model, how many layers were offloaded"
    layers = case.model.num_moe_layers
    if (
        case.kind in ("gpu", "n-cpu-moe", "layers")
        and load_engine(case.engine).offload
        and case.profile.device.kind == "gpu"
        and not case.profile.device.unified_memory
    ):
        steps = sorted({round(case.host_layers + (layers - case.host_layers) * part / 8) for part in range(1, 9)})
        for count in steps:
            yield (
                f"the experts of {count} of {layers} layers on the cores, {case.host_layers} were said",
                look,
                with_host_layers(case, count),
                {},
            )
    parts = case.parts
    runs = "cpu" in load_engine(case.engine).backends
    if runs and parts is not None and parts.gpu is not None and parts.cpu is not None and not parts.unified_memory:
        alone = dataclasses.replace(parts, gpu=None, more=(), pcie=None)
        cores = dataclasses.replace(case, parts=alone, backend="cpu", placement={"kind": "cpu"}, _kept={})
        yield (
            "the card takes no part (a build without its back end)",
            "the engine's log: the devices it found",
            cores.changed(parts=alone),
            {},
        )


def _longer(case: Case) -> _Tried:
    """Yield the same with a longer context behind it."""
    room = case.context
    if room is not None and room > 4 * (case.depth + case.prompt + case.reply):
        for share in (0.25, 0.5, 0.9):
            depth = int(room * share) - case.prompt - case.reply
            if depth > case.depth:
                yield (
                    f"measured at about {depth:,} tokens of context",
                    "say the lengths: --prompt-tokens, --reply-tokens",
                    case.changed(depth=depth),
                    {},
                )


def host_overflow_bytes(case: Case) -> float:
    """Return by how many bytes what the host holds, or the whole model on cores alone, exceeds what it has for a model."""
    stated = case.host_memory_bytes
    if stated is None or case.profile.device.unified_memory:
        return 0.0
    model, experts, dense = case.formats()
    layout = PLAIN if case.profile.engine is None else case.profile.engine.memory_layout
    held = (
        file_bytes(case)
        if case.kind == "cpu"
        else case.host_layers * model.num_experts * model.expert_bytes(experts) + host_dense_bytes(model, dense, layout)
    )
    return max(0.0, held - HOST_SHARE * stated)


def with_unlimited_host(case: Case) -> Case:
    """Return the case on a host with room for everything."""
    parts = case.parts
    if parts is not None and parts.memory is not None:
        return case.changed(
            parts=dataclasses.replace(parts, memory=dataclasses.replace(parts.memory, capacity_bytes=None))
        )
    return case


def _memory(case: Case, parts: Parts) -> _Tried:
    memory = parts.memory
    assert memory is not None  # noqa: S101
    look = "dmidecode -t memory (Linux), CPU-Z (Windows): channels and configured speed"
    for channels in sorted({memory.channels // 2, memory.channels * 3 // 4}):
        if 0 < channels < memory.channels:
            fewer = dataclasses.replace(memory, channels=channels)
            yield (
                f"{channels} of {memory.channels} memory channels in use",
                look,
                case.changed(parts=dataclasses.replace(parts, memory=fewer)),
                {},
            )
    base = _BASE_MT_PER_S.get(memory.kind)
    if base is not None and memory.mt_per_s > 1.05 * base:
        slower = dataclasses.replace(memory, mt_per_s=base)
        yield (f"memory at {memory.kind.upper()}-{base} (its profile, XMP or EXPO, not switched on)", look,
               case.changed(parts=dataclasses.replace(parts, memory=slower)), {})  # fmt: skip


def _threads(case: Case, parts: Parts) -> _Tried:
    """Yield fewer cores, and threads that wait for the slowest: engines give each thread an equal part."""
    cpu = parts.cpu
    assert cpu is not None  # noqa: S101
    cores = cpu.cores * parts.sockets
    used = case.threads or cores
    look = "-t: as many threads as there are large cores; top while it runs"
    for fewer in sorted({max(1, used // 2), max(1, used // 4)}):
        if fewer < min(used, cores):
            yield (
                f"{fewer} cores at work, {used} were said",
                look,
                case.changed(parts=dataclasses.replace(parts, threads=fewer)),
                {},
            )
    if used > cores:  # two threads of a core share it, and all wait for them
        share = used / (2 * cores)
        held = _with_cores_at(case, share)
        yield f"{used} threads on {cores} cores (hyper-threads): all wait for those that share one", look, held, {}
    elif cpu.efficient_cores and used > cpu.cores - cpu.efficient_cores:
        worth = cpu.large_cores(used) / used
        held = _with_cores_at(case, cpu.efficient_share / worth)
        yield (
            f"{used} threads on {cpu.cores - cpu.efficient_cores} large and small cores: all wait for the small ones",
            look,
            held,
            {},
        )


def _with_cores_at(case: Case, share: float) -> Case:
    """Return the case with cores that compute at a share of their rate."""
    profile = case.profile
    cpu = profile.host.cpu
    if cpu is None:
        return case
    slower = dataclasses.replace(
        cpu, flops_per_s=dataclasses.replace(cpu.flops_per_s, value=cpu.flops_per_s.value * min(1.0, share))
    )
    host = dataclasses.replace(profile.host, cpu=slower)
    return dataclasses.replace(case, profile=dataclasses.replace(profile, host=host), _kept={})


def _link(case: Case, parts: Parts) -> _Tried:
    """Yield a slower link: fewer lanes, or copies from ordinary memory."""
    lanes = link_of(parts)
    if lanes is None or case.kind not in (*CORES, "layers"):
        return
    generation, _, count = lanes.partition("x")
    for fewer in _LINKS:
        if fewer < int(count):
            slower = dataclasses.replace(parts, pcie=f"{generation}x{fewer}")
            tool = "nvidia-smi -q -d PCIE or " if _is_nvidia(parts) else ""
            look = f"{tool}lspci -vv (LnkSta) while it runs: generation and width"
            yield f"the card in a slot of {fewer} lanes", look, case.changed(parts=slower), {}
    to_device = case.profile.host_to_device
    pageable = dataclasses.replace(to_device, pinned_bytes_per_s=to_device.pageable_bytes_per_s)
    ordinary: Profile = dataclasses.replace(case.profile, host_to_device=pageable)
    yield ("copies from ordinary memory (pageable), which the driver stages", "start with --no-mmap, and with enough memory to lock",
           dataclasses.replace(case, profile=ordinary, _kept={}), {})  # fmt: skip


# --- faster than predicted -------------------------------------------------------------------------------------------------


def _fast(case: Case, measured: Mapping[str, float], before: Mapping[str, _Three]) -> _Tried:
    """Yield what else may have run than was said."""
    if case.kind in ("n-cpu-moe", "cpu-moe", "layers"):
        layers = case.model.num_moe_layers
        for count in sorted({round(case.host_layers * part / 8) for part in range(8)}, reverse=True):
            if device_bytes(None, count, case) > case.memory().budget_bytes:
                continue
            yield (f"the experts of {count} of {layers} layers on the cores, {case.host_layers} were said",
                   "the engine's log: which buffers hold the model", with_host_layers(case, count), {})  # fmt: skip
    if case.quant is not None and case.line is None:
        for name in published_files(case.model):
            other = case.changed(quant=name)
            if file_bytes(other) < 0.95 * file_bytes(case):
                yield f"a {name} file in place of {case.quant}", "the file's name and size", other, {}
    ratio = {metric: value / before[metric][0] for metric, value in measured.items()}
    if PREFILL in measured and any(text.startswith(_LENGTHS) for text in case.assumed):
        for tokens in sorted({case.ubatch, 2 * case.ubatch, 4 * case.ubatch}):
            if tokens > case.prompt and (case.context is None or tokens + case.reply <= case.context):
                yield (f"prompts of about {tokens:,} tokens were measured, {case.prompt:,} were taken",
                       "the lengths: --prompt-tokens, --reply-tokens say them", case.changed(prompt=tokens), {})  # fmt: skip
    if DECODE in measured and case.concurrency == 1:
        for streams in _STREAMS:
            yield (f"{streams} requests together, their speeds added up", "how many slots were at work; --concurrency says it",
                   case.changed(concurrency=streams), {})  # fmt: skip
        if 1 < ratio[DECODE] <= _MOST_DRAFTED and ratio.get(PREFILL, 1.0) < _SHIFTS_LEAST * 1.3:
            yield (f"drafted tokens: {ratio[DECODE]:.1f} a pass at the predicted speed", "whether a draft model or MTP was at work", case,
                   {DECODE: ratio[DECODE]})  # fmt: skip
    if PREFILL in measured and ratio[PREFILL] > 1 and ratio.get(DECODE, 1.0) < _SHIFTS_LEAST * 1.3:
        yield (f"{1 - 1 / ratio[PREFILL]:.0%} of the prompt came from the prompt cache and was counted",
               "the server's log: tokens evaluated of each prompt", case, {PREFILL: ratio[PREFILL]})  # fmt: skip
