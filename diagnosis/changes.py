"""What would help: other settings, another file, other hardware, each predicted as the run itself is, with what it costs.

Modelled: fewer layers on the cores, larger micro-batches, quantised keys and values, half the context, all cores, where prompts are
computed, the next smaller published files, memory and cards that could be bought. Memory decides what fits, with as much of the
card left free as llama.cpp's own fitting leaves. Ignored: settings that the engine does not have, prices, and what a smaller file
does to answers, which is for its reader to judge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..base.errors import DoesNotFit, InputError
from ..base.units import GIB, KIB
from ..planner.served import llamacpp as served
from ..planner.served.setting import device_bytes as setting_bytes
from ..specs.machines.engines import load_engine
from ..specs.models.mixes.published import published_files
from .case import CORES, DECODE, METRICS, PREFILL, Case

SETTING, FILE, HARDWARE = "setting", "file", "hardware"
_LEAST_GAIN = 1.02
"""Less is no gain that anybody could measure."""
_SMALLER = 0.92
"""Of the file's size: what is nearer to it is no other file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something that would make the run faster."""

    what: str
    kind: str
    """setting, file or hardware."""
    cost: str
    decode_gain: float
    """How many times as fast generated tokens come; 1: as before."""
    prefill_gain: float
    request_gain: float
    """Of a whole request, prompt and reply."""
    case: Case = dataclasses.field(repr=False)


def changes_of(case: Case, metrics: tuple[str, ...]) -> list[Change]:
    """Return what would help, by the gain in what was measured: settings and files first, then what money buys."""
    found: dict[tuple[str, str], Change] = {}
    for what, kind, cost, other in _tried(case):
        try:
            change = _change(case, what, kind, cost, other)
        except (DoesNotFit, InputError):
            continue
        if _gain(change, metrics) >= _LEAST_GAIN:
            found.setdefault((kind, what), change)
    kept = [one for one in found.values() if not _said_by_less(one, found.values(), metrics)]
    ranked = sorted(kept, key=lambda one: (-_gain(one, metrics), one.what))
    return [one for one in ranked if one.kind != HARDWARE] + [one for one in ranked if one.kind == HARDWARE]


def _said_by_less(one: Change, every: Iterable[Change], metrics: tuple[str, ...]) -> bool:
    """Return whether a setting with fewer flags gains as much."""
    words = _flags_of(one)
    return one.kind == SETTING and any(
        other.kind == SETTING
        and _flags_of(other) < words
        and _gain(other, metrics) * _LEAST_GAIN >= _gain(one, metrics)
        for other in every
    )


def _flags_of(one: Change) -> set[str]:
    return {word for word in one.what.split() if word.startswith("-")}


def _gain(change: Change, metrics: tuple[str, ...]) -> float:
    if len(metrics) > 1:
        return change.request_gain
    return change.decode_gain if metrics[0] == DECODE else change.prefill_gain


def _change(case: Case, what: str, kind: str, cost: str, other: Case) -> Change:
    gains = {metric: other.speed(metric) / case.speed(metric) for metric in METRICS}
    return Change(
        what=what, kind=kind, cost=cost, decode_gain=gains[DECODE], prefill_gain=gains[PREFILL],
        request_gain=_request_s(case) / _request_s(other), case=other,
    )  # fmt: skip


def _request_s(case: Case) -> float:
    return case.prompt / case.speed(PREFILL) + case.reply * case.concurrency / case.speed(DECODE)


def _tried(case: Case) -> Iterator[tuple[str, str, str, Case]]:
    """Yield (what, kind, cost, the case so changed)."""
    if load_engine(case.engine).gguf and case.kind in (*CORES, "layers", "gpu") and case.kind != "gpu-experts":
        yield from _settings(case)
    if (
        case.parts is not None
        and case.parts.threads is not None
        and case.parts.cpu is not None
        and case.kind in (*CORES, "cpu")
    ):
        cores = case.parts.cpu.cores * case.parts.sockets
        if case.parts.threads < cores:
            yield (
                f"-t {cores}",
                SETTING,
                "nothing else on the cores",
                case.changed(parts=dataclasses.replace(case.parts, threads=cores)),
            )
    yield from _files(case)
    yield from _hardware(case)


# --- settings --------------------------------------------------------------------------------------------------------------


def _settings(case: Case) -> Iterator[tuple[str, str, str, Case]]:
    words = _VARIABLES if load_engine(case.engine).whole_layers else _FLAGS
    if case.kind != "gpu":
        yield from _placements(case, case, "")
    smaller_cache = case.changed(kv_types=("q8_0", "q8_0"))
    if case.kv_types == ("f16", "f16"):
        yield from _placements(case, smaller_cache, f"{words.cache} ", "keys and values at 8 bits, ")
    context = case.context or 0
    if context >= 8 * KIB and context // 2 >= case.depth + case.prompt + case.reply:
        yield from _placements(
            case, case.changed(context=context // 2), f"{words.context}{context // 2} ", "half the context, "
        )
    if load_engine(case.engine).whole_layers and case.kind == "layers" and case.parts is not None:
        yield from _experts_alone(case)
    if case.kind in CORES:
        for ubatch in (1024, 2048, 4096):
            if case.ubatch < ubatch and ubatch // 2 < case.prompt:
                more = f" -b {ubatch}" if ubatch > 2048 else ""
                yield from _placements(case, case.changed(ubatch=ubatch), f"-ub {ubatch}{more} ")
        if case.upload_tokens is not None:
            cost = "prompts computed on the cores"
            yield "--no-op-offload", SETTING, cost, case.changed(placement={**case.placement, "prefill_compute": "cpu"})
        elif case.placement.get("prefill_compute") == "cpu":
            freed = {key: value for key, value in case.placement.items() if key != "prefill_compute"}
            yield (
                "without --no-op-offload",
                SETTING,
                "experts copied to the card for prompts",
                case.changed(placement=freed),
            )


@dataclass(frozen=True, slots=True)
class _Words:
    """How an engine is told of its cache and its context."""

    cache: str
    context: str


_FLAGS = _Words("-ctk q8_0 -ctv q8_0", "-c ")
_VARIABLES = _Words("OLLAMA_KV_CACHE_TYPE=q8_0 OLLAMA_FLASH_ATTENTION=1", "OLLAMA_CONTEXT_LENGTH=")


def _experts_alone(case: Case) -> Iterator[tuple[str, str, str, Case]]:
    """Yield the same under the engine that leaves experts alone off the card, not whole layers."""
    other = case.changed(engine="llama.cpp", parts=case.parts)
    fewest = served.fewest_host_layers(other.memory(), other.concurrency, other.ubatch, served.FIT_MARGIN_BYTES)
    if fewest:
        flag = f"--n-cpu-moe {told_layers(case, fewest)}" if fewest < case.model.num_moe_layers else "--cpu-moe"
        yield (
            f"llama-server {flag}",
            SETTING,
            "llama.cpp in its place: attention stays on the card",
            with_host_layers(other, fewest),
        )


def _placements(case: Case, other: Case, flags: str, cost: str = "") -> Iterator[tuple[str, str, str, Case]]:
    """Yield `other` with as many layers on the card as it has room for, with no fewer layers on the cores than `other` needs."""
    memory = other.memory()
    fewest = served.fewest_host_layers(memory, other.concurrency, other.ubatch, served.FIT_MARGIN_BYTES)
    if fewest is None:
        return
    layers = case.model.num_moe_layers
    if fewest == case.host_layers and not flags:
        return
    placed = with_host_layers(other, fewest)
    free = memory.budget_bytes - device_bytes(memory, fewest, other)
    room = f"{cost}{free / GIB:.1f} GiB of the card left"
    what = f"{flags}{_layers_flag(case, fewest, layers)}".strip()
    if what and (fewest <= case.host_layers or flags):
        yield what, SETTING, room, placed


def _layers_flag(case: Case, count: int, layers: int) -> str:
    if count == case.host_layers or load_engine(case.engine).whole_layers:
        return ""
    if count == 0:
        return "-ngl 99, no --n-cpu-moe"
    return "--cpu-moe" if count >= layers else f"--n-cpu-moe {told_layers(case, count)}"


def told_layers(case: Case, count: int) -> int:
    """Return `--n-cpu-moe` for so many layers with experts: those without among the first ones count too."""
    return case.model.moe_layers[count - 1] + 1


def with_host_layers(case: Case, count: int) -> Case:
    """Return the case with the experts of `count` layers on the cores."""
    how = {key: value for key, value in case.placement.items() if key == "prefill_compute"}
    if count == 0:
        return case.changed(placement={"kind": "gpu"})
    if load_engine(case.engine).whole_layers:
        return case.changed(placement={"kind": "layers", "gpu_layers": max(1, case.model.num_layers - count)})
    if count >= case.model.num_moe_layers:
        return case.changed(placement={"kind": "cpu-moe", **how})
    return case.changed(placement={"kind": "n-cpu-moe", "cpu_layers": count, **how})


def device_bytes(memory: object, count: int, case: Case) -> int:
    """Return what a case with so many layers on the cores takes of the card."""
    simulation = case.memory()
    return setting_bytes(simulation, served.setting(simulation, count, case.concurrency, case.ubatch))


# --- files and hardware ------------------------------------------------------------------------------------------------------


def _files(case: Case) -> Iterator[tuple[str, str, str, Case]]:
    """Yield the next smaller published files."""
    if not load_engine(case.engine).gguf or case.quant is None or case.line is not None:
        return
    size = file_bytes(case)
    tried = 0
    for name in published_files(case.model):
        other = case.changed(quant=name)
        if file_bytes(other) > _SMALLER * size:
            continue
        lighter = other
        if case.kind in ("n-cpu-moe", "cpu-moe", "layers"):
            fewest = served.fewest_host_layers(other.memory(), other.concurrency, other.ubatch, served.FIT_MARGIN_BYTES)
            lighter = other if fewest is None else with_host_layers(other, min(fewest, case.host_layers))
        flag = _layers_flag(case, lighter.host_layers, case.model.num_moe_layers)
        layers = f" with {flag}" if flag else ""
        bits = 8 * file_bytes(lighter) / case.model.total_parameters
        yield (
            f"a {name} file{layers}",
            FILE,
            f"{bits:.2f} bits a weight in place of {8 * size / case.model.total_parameters:.2f}",
            lighter,
        )
        tried += 1
        if tried == 2:
            return


def file_bytes(case: Case) -> float:
    """Return the size of the model's file."""
    from ..specs.models import weight_format

    model, _, dense = case.formats()
    return model.dense_bytes(dense) + model.num_routed_experts * model.expert_bytes(weight_format(model.native_bits))


def _hardware(case: Case) -> Iterator[tuple[str, str, str, Case]]:
    """Yield machines that differ in one part."""
    parts = case.parts
    if parts is None:
        return
    memory, gpu = parts.memory, parts.gpu
    if memory is not None and not parts.unified_memory and case.kind in (*CORES, "layers", "cpu"):
        twice = dataclasses.replace(memory, channels=2 * memory.channels)
        yield (f"twice the memory channels ({twice.kind}-{twice.mt_per_s}x{twice.channels})", HARDWARE, "another board and processor",
               case.changed(parts=dataclasses.replace(parts, memory=twice)))  # fmt: skip
        quickest = None if parts.cpu is None or parts.cpu.memory != memory.kind else parts.cpu.max_mt_per_s
        if quickest is not None and quickest > 1.05 * memory.mt_per_s:
            faster = dataclasses.replace(memory, mt_per_s=quickest)
            yield (
                f"{memory.kind}-{quickest} memory",
                HARDWARE,
                "other modules",
                case.changed(parts=dataclasses.replace(parts, memory=faster)),
            )
    if gpu is not None and not gpu.unified_memory and case.kind in ("n-cpu-moe", "cpu-moe", "layers"):
        larger = case.changed(
            parts=dataclasses.replace(parts, gpu=dataclasses.replace(gpu, memory_bytes=2 * gpu.memory_bytes))
        )
        fewest = served.fewest_host_layers(larger.memory(), larger.concurrency, larger.ubatch, served.FIT_MARGIN_BYTES)
        if fewest is not None and fewest < case.host_layers:
            cost = f"another card; {fewest} layers on the cores in place of {case.host_layers}"
            yield (
                f"a card like this with {2 * gpu.memory_bytes / GIB:.0f} GiB",
                HARDWARE,
                cost,
                with_host_layers(larger, fewest),
            )
