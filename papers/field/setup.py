"""A report becomes what a prediction needs: machine and engine, model and formats, schedule and recording.

Modelled: only the stated facts; what is not stated takes a documented default, named in the row. Decoding is predicted
over a few steps at the stated context, a prompt over one or two micro-batches at its mean depth: both are rates, and costs
grow evenly with context. Several cards are divided as stated or as the engine does (`split`). Ignored: drafting (a reason is given).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ...base.errors import InputError
from ...base.units import GIB
from ...specs.card_split import CardSplit
from ...specs.machines.catalogue import find_cpu, find_gpu
from ...specs.machines.compose import compose, host_bytes_per_s
from ...specs.machines.engines import Engine, engines, load_engine
from ...specs.machines.notation import MOST_CARDS
from ...specs.machines.parts import GpuPart, MemoryPart, Parts, Slot
from ...specs.machines.profile import Profile
from ...specs.memory import kv_bytes_of
from ...specs.models import BITS_PER_BYTE, ModelSpec, WeightFormat, quantised_as, weight_format
from ...specs.models.load import load_model
from ...specs.models.mixes.names import mix
from ...specs.schedules.offload import OffloadSchedule
from ...specs.schedules.presets import load_preset
from ...traces.lengths import RequestLengths
from ...traces.recording import RoutingTrace
from ...traces.synthesis.prior import prior_recording
from ..model_code import CALLS_EVERY_EXPERT
from .rows import Report, cards_of
from .split import first_layers_on_cards, split_of

DECODE_STEPS = 8
CACHE_STEPS = 256
"""A cache's hits settle over many steps: so many are run where experts are cached, or as many as were generated."""
UNLIMITED_BYTES = float(1 << 50)
_CONTEXT, _PROMPT, _UBATCH = 512, 512, 512
_ASSUMED_MEMORY_GIB = 64.0
_OF_MEMORY = 0.75
"""Share of a memory that an engine fills with experts where its sizes are not stated."""
_MOST_BATCH, _MOST_TOKENS, _MOST_PASS = 1024, 1 << 24, 1 << 15
_MOST_SOCKETS = 8
_AGREES = 0.01
_MAKERS = ("cuda", "rocm", "metal")
"""Backends that only one maker's devices have."""
_FORMATS = {
    "BF16": "16", "FP16": "16", "F16": "16", "FP32": "32", "FP8": "8", "INT8": "8", "AWQ": "int4-g128-zero", "GPTQ": "int4-g128",
    "INT4": "int4-g64", "NVFP4": "nvfp4", "MLX-4bit": "mlx4-g64", "MLX-8bit": "mlx8-g64", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M",
}  # fmt: skip
_EXL = re.compile(r"EXL[23]-([0-9.]+)bpw", re.IGNORECASE)
_USED = re.compile(r"\b([0-9]{1,3}) (?:threads|cores)\b", re.IGNORECASE)


_MONTH = re.compile(r"20[0-9]{2}(?:-[01][0-9])?(?![0-9])")


class NotExpressible(Exception):
    """A report that cannot be predicted, and why."""


@dataclass(slots=True, kw_only=True)
class Setup:
    """Everything a prediction of one report needs."""

    report: Report
    profile: Profile
    model: ModelSpec
    schedule: OffloadSchedule
    trace: RoutingTrace
    dense_format: WeightFormat
    kv_bytes_per_value: float
    batch: int
    prompt_tokens: int
    host_bytes_per_s: float | None
    """Theoretical bandwidth of the host's memory."""
    split: CardSplit | None = None
    """How the model lies on several cards."""
    assumed: list[str] = field(default_factory=list)


def set_up(report: Report, table: Mapping[str, Any] | None = None) -> Setup:
    """Return what predicting `report` needs, with engines' constants from `table` (the bundled ones for None).

    Raises NotExpressible with the reason.
    """
    if report.reason is not None:
        raise NotExpressible(report.reason)
    assumed: list[str] = []
    try:
        model = model_of(report)
        expert_format, dense_format, model = formats_of(report, model, assumed)
        profile, parts = _machine(report, table, assumed)
        return set_up_on(
            report, model, profile, (expert_format, dense_format), assumed, host_bytes_per_s=host_bytes_per_s(parts)
        )
    except InputError as error:
        raise NotExpressible(str(error)) from None


def set_up_on(report: Report, model: ModelSpec, profile: Profile, formats: tuple[WeightFormat, WeightFormat], assumed: list[str], *,
              host_bytes_per_s: float | None = None) -> Setup:  # fmt: skip
    """Return what predicting `report` needs on a machine that is known; `formats` are those of experts and of everything else.

    Raises NotExpressible with the reason, InputError for an unknown name.
    """
    batch = _count(report, "batch", 1, _MOST_BATCH)
    split = split_of(report, model, profile, assumed)
    trace, prompt = _recording(report, model, batch, assumed)
    schedule = _schedule(report, model, profile, trace, formats[0], assumed)
    if report.part("placement").get("whole_layers") is True:
        profile = _streaming(profile, model, formats[1])
    kv_type = str(report.part("workload").get("kv_type") or "f16")
    return Setup(
        report=report, profile=profile, model=model, schedule=schedule.with_options(workload__concurrency=batch),
        trace=trace, dense_format=formats[1], kv_bytes_per_value=kv_bytes_of(kv_type, model),
        batch=batch, prompt_tokens=prompt, assumed=assumed, host_bytes_per_s=host_bytes_per_s, split=split,
    )  # fmt: skip


def remade(setup: Setup, table: Mapping[str, Any]) -> Setup:
    """Return the same under other constants of engines."""
    profile = _machine(setup.report, table, [])[0]
    if setup.report.part("placement").get("whole_layers") is True:
        profile = _streaming(profile, setup.model, setup.dense_format)
    return dataclasses.replace(setup, profile=profile)


# --- the model -----------------------------------------------------------------------------------------------------------


def model_of(report: Report) -> ModelSpec:
    """Return the model of a report; raises NotExpressible."""
    name = report.row.get("model")
    if not isinstance(name, str) or not name:
        raise NotExpressible("no model is named")
    if name.startswith("configs/"):
        path = report.folder / name
        if ".." in name or not path.is_file():
            raise NotExpressible(f"its configuration {name[:60]} is not beside the reports")
        return _loaded(str(path))
    return _loaded(name)


@lru_cache(maxsize=256)
def _loaded(name: str) -> ModelSpec:
    return load_model(name)


def formats_of(report: Report, model: ModelSpec, assumed: list[str]) -> tuple[WeightFormat, WeightFormat, ModelSpec]:
    """Return how experts and the rest are stored, and the model (its own format made the experts')."""
    quant = report.part("quant")
    expert_name, dense_name = quant.get("experts"), quant.get("dense")
    if not isinstance(expert_name, str):
        expert_name = None
        assumed.append("quant.experts: as the checkpoint")
    experts, dense = stored_by_name(model, expert_name, dense_name if isinstance(dense_name, str) else None)
    experts = _as_the_file(report, model, experts, dense, is_open=expert_name is not None and _open(expert_name))
    return experts, dense, dataclasses.replace(model, native_bits=experts.name)


def _as_the_file(
    report: Report, model: ModelSpec, experts: WeightFormat, dense: WeightFormat, *, is_open: bool
) -> WeightFormat:
    """Return how experts are stored so that the file has its stated size; the name's way where that agrees or no size is stated."""
    total, mean = report.number("quant", "file_bytes"), report.number("quant", "bits_per_weight")
    if total is None and is_open and mean is not None:  # a name that leaves open how they are stored
        total = mean * model.total_parameters / BITS_PER_BYTE
    if total is None:
        return experts
    rest = total - model.dense_bytes(dense)
    if abs(rest / (model.num_routed_experts * model.expert_bytes(experts)) - 1) <= _AGREES:
        return experts
    bits = rest * BITS_PER_BYTE / (model.num_routed_experts * model.expert_parameters)
    return _stated(bits) if 1 <= bits <= 16 else experts


def stored_by_name(model: ModelSpec, experts: str | None, dense: str | None) -> tuple[WeightFormat, WeightFormat]:
    """Return the formats of experts and of everything else, by the names that reports give them; a checkpoint's rest is at 16 bits."""
    of_dense = _name(dense or experts or "BF16")
    try:
        return quantised_as(model.native_bits if experts is None else _name(experts), of_dense, model)
    except InputError:
        raise NotExpressible(f"weight format {(experts or of_dense)[:40]} or {of_dense[:40]} is not known") from None


def _name(name: str) -> str:
    found = _EXL.fullmatch(name)
    return f"{float(found[1]):.4g}bpw" if found is not None else _FORMATS.get(name, name)


def _stated(bits_per_weight: float) -> WeightFormat:
    return weight_format(f"{bits_per_weight:.4g}bpw")


def _open(name: str) -> bool:
    recipe = mix(name)
    return recipe is not None and not recipe.exact


# --- machine and engine --------------------------------------------------------------------------------------------------


def _machine(report: Report, table: Mapping[str, Any] | None, assumed: list[str]) -> tuple[Profile, Parts]:
    """Return the machine under its engine, and the parts that it is made of."""
    engine = _engine(report, assumed)
    parts = _parts(report, assumed)
    backend = _backend(report, parts, assumed)
    profile = compose(parts, _with_backend(engine, backend), backend, table=table, built=_built(report))
    return _with_host_memory(report, profile, assumed), parts


def _engine(report: Report, assumed: list[str]) -> Engine:
    name = str(report.part("engine").get("name") or "generic").lower()
    if name not in engines():
        assumed.append(f"engine {name[:40]}: what engines of its backend have in common")
        return load_engine("generic")
    return load_engine(name)


def _backend(report: Report, parts: Parts, assumed: list[str]) -> str | None:
    """Return the backend that a report names, the card's own where its maker's cards cannot have run that one."""
    stated = str(report.part("engine").get("backend") or "") or None
    if parts.gpu is None:
        return "cpu"
    own = parts.gpu.backend
    if stated in _MAKERS and own in _MAKERS and stated != own:
        assumed.append(f"engine.backend: {own}, no card of this maker runs {stated}")
        return own
    return stated


def _built(report: Report) -> str | None:
    """Return the month that a report's engine was built, or measured, in: "2025-03", or "2023" of a year; None where nothing says so."""
    for text in (report.row.get("date"), report.part("engine").get("version")):
        found = _MONTH.match(text) if isinstance(text, str) else None
        if found is not None:
            return found[0]
    return None


def _with_backend(engine: Engine, backend: str | None) -> Engine:
    """Return the engine as one that has the reported backend: reports may know more than the catalogue."""
    if backend is None or backend in engine.backends:
        return engine
    return dataclasses.replace(engine, backends=(*engine.backends, backend))


def _parts(report: Report, assumed: list[str]) -> Parts:
    cards = report.cards
    if report.num_gpus > MOST_CARDS:
        raise NotExpressible(f"more than {MOST_CARDS} cards")
    slots = [slot for card in cards for slot in _slots(card)]
    gpu, pcie = (slots[0].gpu, slots[0].pcie) if slots else (None, None)
    host = report.part("host")
    sockets = min(int(report.number("host", "sockets") or 1), _MOST_SOCKETS)
    cpu, threads = None, None
    if isinstance(host.get("cpu"), str):
        try:
            cpu = find_cpu(host["cpu"])
        except InputError:
            assumed.append(f"host.cpu {host['cpu'][:40]}: an average one with its cores")
        used = _USED.search(f"{host['cpu']}; {report.row.get('note') or ''}")
        threads = int(used[1]) if used and int(used[1]) else None
    elif gpu is None:
        raise NotExpressible("neither a card nor a processor is stated")
    elif report.kind.startswith("cpu") and not gpu.unified_memory:
        assumed.append("host.cpu: a desktop processor")
    cores = report.number("host", "cores")
    if cpu is not None and cores is not None and threads is None:
        threads = int(cores)
    memory = _memory(report, assumed)
    rate = report.number("disk", "read_bytes_per_s")
    return Parts(
        gpu=gpu, cpu=cpu, sockets=sockets, memory=memory, pcie=pcie, disk_bytes_per_s=rate, threads=threads, more=tuple(slots[1:]),
    )  # fmt: skip


def _slots(card: Mapping[str, Any]) -> list[Slot]:
    """Return the cards of one line of a report, each in its slot."""
    gpu, pcie = _card(card)
    return [Slot(gpu=gpu, pcie=pcie)] * cards_of(card)


def _card(card: Mapping[str, Any]) -> tuple[GpuPart, str | None]:
    name = card.get("name")
    try:
        gpu = find_gpu(str(name))
    except InputError:
        raise NotExpressible(f"the card {str(name)[:60]} is not in the catalogue") from None
    gib = card.get("memory_gib")
    if isinstance(gib, (int, float)) and not isinstance(gib, bool) and 0 < gib < 4096:
        gpu = dataclasses.replace(gpu, memory_bytes=int(gib * GIB))
    link = card.get("pcie")
    if isinstance(link, str) and not gpu.unified_memory:
        return gpu, link.replace(" ", "")
    return gpu, None


def _with_host_memory(report: Report, profile: Profile, assumed: list[str]) -> Profile:
    """Return the machine with its host memory as stated, else with enough for the model: whoever reports a speed had it."""
    if profile.device.unified_memory:
        return profile
    stated = report.number("host", "memory_gib")
    if stated is None and not report.kind.startswith("gpu"):
        assumed.append("host.memory_gib: enough for the model")
    room = dataclasses.replace(profile.host.memory_bytes, value=UNLIMITED_BYTES if stated is None else stated * GIB)
    device = profile.device
    if device.kind == "cpu":
        device = dataclasses.replace(device, memory_bytes=room)
    return dataclasses.replace(profile, host=dataclasses.replace(profile.host, memory_bytes=room), device=device)


def _streaming(profile: Profile, model: ModelSpec, fmt: WeightFormat) -> Profile:
    """Return the machine where whole layers are fetched: what surrounds the experts moves too, in every layer's time."""
    if profile.engine is None or profile.device.kind == "cpu":
        return profile
    each = sum(model.dense_layer_bytes(layer, fmt) for layer in range(model.num_layers)) / model.num_layers
    layer = profile.engine.layer_s
    moved = layer.value + each / profile.host_to_device.pinned_bytes_per_s.value
    return dataclasses.replace(
        profile, engine=dataclasses.replace(profile.engine, layer_s=dataclasses.replace(layer, value=moved))
    )


def _memory(report: Report, assumed: list[str]) -> MemoryPart | None:
    host = report.part("host")
    kind, channels, gib = host.get("memory"), report.number("host", "channels"), report.number("host", "memory_gib")
    match = re.fullmatch(r"(L?P?DDR[345]X?)-([0-9]{3,5})", kind, re.IGNORECASE) if isinstance(kind, str) else None
    capacity = None if gib is None else int(gib * GIB)
    if match is not None and channels is not None:
        return MemoryPart(
            kind=match[1].lower(), mt_per_s=int(match[2]), channels=int(channels), capacity_bytes=capacity
        )
    if report.kind.startswith("cpu"):
        assumed.append("host.memory: what the processor is sold for")
    return None


# --- schedule and recording ----------------------------------------------------------------------------------------------


def _recording(report: Report, model: ModelSpec, batch: int, assumed: list[str]) -> tuple[RoutingTrace, int]:
    context = _count(report, "context_tokens", _CONTEXT, _MOST_TOKENS)
    if report.number("workload", "context_tokens") is None:
        assumed.append(f"workload.context_tokens: {_CONTEXT}")
    if report.decodes:
        steps = DECODE_STEPS
        if report.kind.startswith("cache"):
            steps = min(_count(report, "generated_tokens", CACHE_STEPS, _MOST_TOKENS), CACHE_STEPS)
        before = max(0, context - steps // 2)
        return prior_recording(
            model, RequestLengths.alike(prompt_tokens=before, reply_tokens=steps, requests=batch, cached_tokens=before)
        ), 0
    prompt = report.number("workload", "prompt_tokens")
    usual = max(_PROMPT, _count(report, "ubatch", _UBATCH, _MOST_TOKENS))  # whoever asks for larger passes fills them
    if prompt is None:
        assumed.append(f"workload.prompt_tokens: {usual}")
    prompt_tokens = _count(report, "prompt_tokens", usual, _MOST_TOKENS)
    size = min(_count(report, "ubatch", _UBATCH, _MOST_TOKENS), prompt_tokens, _MOST_PASS)
    # One micro-batch at the mean depth stands for all: costs are linear in context.
    before = max(0, context - size // 2)
    lengths = RequestLengths.alike(prompt_tokens=before + size, reply_tokens=0, cached_tokens=before)
    return prior_recording(model, lengths), int(prompt or usual)


def _count(report: Report, key: str, default: int, most: int) -> int:
    """Return a count of the workload, or its default; raises NotExpressible for one beyond what is predicted."""
    stated = report.number("workload", key)
    if stated is not None and stated > most:
        raise NotExpressible(f"workload.{key} above {most}")
    return max(1, int(stated or default))


def _schedule(report: Report, model: ModelSpec, profile: Profile, trace: RoutingTrace, fmt: WeightFormat,
              assumed: list[str]) -> OffloadSchedule:  # fmt: skip
    placement = report.part("placement")
    kind = str(placement.get("kind"))
    on_disk = placement.get("tier") == "disk"
    if kind in ("gpu", "tensor-split") or (profile.device.kind == "cpu" and not on_disk):
        schedule = load_preset("resident")
    elif kind == "cpu-moe":
        schedule = load_preset("cpu-moe")
    elif kind in ("n-cpu-moe", "layers"):
        schedule = _some_layers(placement, model, profile, fmt, assumed, front=first_layers_on_cards(report, model))
    elif kind == "gpu-experts":
        schedule = _some_experts(placement, model, profile, fmt, assumed)
    elif kind == "expert-cache":
        schedule = _cache(report, model, profile, fmt, assumed)
    elif kind == "fetch":
        schedule = load_preset("on-demand").with_options(kernel__grouping="grouped")
        if placement.get("whole_layers") is True and model.family in CALLS_EVERY_EXPERT:
            schedule = load_preset("naive").with_options(kernel__grouping="grouped", copy__overlap=True)
    else:
        raise NotExpressible(f"placement {kind[:40]} is not known")
    if schedule.kernel.miss == "cpu" and not report.decodes and _uploads(report, model, profile, trace):
        schedule = schedule.with_options(kernel__miss="fetch")
    return schedule


def _some_layers(
    placement: Any, model: ModelSpec, profile: Profile, fmt: WeightFormat, assumed: list[str], *, front: bool
) -> OffloadSchedule:
    """Return the schedule where the experts of some layers are on the cores: as many as stated, else what the card has no room for.

    Of layers that are on the cores as a whole, what surrounds the experts stays on the card here: it is a small part.
    """
    layers, count, held = model.num_moe_layers, placement.get("cpu_layers"), placement.get("gpu_layers")
    if not isinstance(count, int) and isinstance(held, int):
        count = max(0, model.num_layers - held)
    if not isinstance(count, int):
        count = layers - min(layers, _experts_that_fit(model, profile, fmt) * layers // model.num_experts)
        assumed.append(f"placement.cpu_layers: {count}, what does not fit")
    if count <= 0:
        return load_preset("resident")
    schedule = load_preset("cpu-moe" if count >= layers else f"n-cpu-moe={count}")
    return schedule.with_options(cache__placement="front") if front and count < layers else schedule


def _some_experts(
    placement: Any, model: ModelSpec, profile: Profile, fmt: WeightFormat, assumed: list[str]
) -> OffloadSchedule:
    count = placement.get("gpu_experts_per_layer")
    if not isinstance(count, int):
        count = _experts_that_fit(model, profile, fmt)
        assumed.append(f"placement.gpu_experts_per_layer: {count}, what fits")
    count = min(count, model.num_experts)
    if count == 0:
        return load_preset("cpu-moe")
    return load_preset("kt-uniform").with_options(cache__experts_per_layer=count)


def _experts_that_fit(model: ModelSpec, profile: Profile, fmt: WeightFormat) -> int:
    room = profile.memory_bytes * 0.85 - model.dense_bytes(weight_format("16")) - GIB
    return max(0, int(room / (model.num_moe_layers * model.expert_bytes(fmt))))


def _cache(
    report: Report, model: ModelSpec, profile: Profile, fmt: WeightFormat, assumed: list[str]
) -> OffloadSchedule:
    placement = report.part("placement")
    share, slots, ratio = placement.get("cache_fraction"), placement.get("slots"), placement.get("device_memory_ratio")
    on_device = profile.device.kind != "cpu"
    if isinstance(share, (int, float)) and 0 < share <= 1:
        each = max(1, round(share * model.num_experts))
    elif isinstance(slots, int) and slots > 0:
        each = slots
    else:
        memory = float(profile.memory_bytes) if on_device else _host_gib(report, assumed) * GIB
        room = memory * (ratio if isinstance(ratio, (int, float)) and 0 < ratio <= 1 else _OF_MEMORY)
        each = max(1, int(room / (model.num_moe_layers * model.expert_bytes(fmt))))
        assumed.append(f"placement.slots: {each} of each layer, what fits")
    each = min(each, model.num_experts)
    on_cores = "cores" in str(placement.get("cold")) and on_device
    static = "static" in str(placement.get("policy"))
    # Chosen by other texts' counts: of models trained to use experts evenly, hardly better than any. What cores compute is not brought to
    # the card in time either, and a prompt finds a cache that earlier ones left.
    if static or on_cores or not report.decodes:
        schedule = load_preset("kt-uniform").with_options(cache__experts_per_layer=each)
    else:
        schedule = load_preset("mixtral-offloading-code").with_options(
            cache__experts_per_layer=each, copy__write_back=False, copy__overlap=True, kernel__grouping="grouped"
        )
    if not on_cores:
        schedule = schedule.with_options(kernel__miss="fetch")
    if placement.get("tier") == "disk":
        if profile.disk is None:
            raise NotExpressible("experts on disk, and the disk's rate is not stated")
        held = 1
        if on_device:
            held = int(_host_gib(report, assumed) * GIB * _OF_MEMORY / model.expert_bytes(fmt))
        held = min(max(1, held), model.num_routed_experts)
        schedule = schedule.with_options(kernel__miss="fetch", copy__host_experts=held)
    return schedule


def _host_gib(report: Report, assumed: list[str]) -> float:
    """Return the host's memory as stated, or as assumed where a disk lies below it."""
    stated = report.number("host", "memory_gib")
    if stated is None:
        assumed.append(f"host.memory_gib: {_ASSUMED_MEMORY_GIB:.0f}, as a disk holds the rest")
    return _ASSUMED_MEMORY_GIB if stated is None else stated


def _uploads(report: Report, model: ModelSpec, profile: Profile, trace: RoutingTrace) -> bool:
    """Return whether experts in host memory are copied to the card for this pass: as stated, else as the engine does."""
    stated = str(report.part("placement").get("prefill_compute") or "")
    if "upload" in stated:
        return True
    if stated == "cpu":
        return False
    if "_R4" in str(report.part("quant").get("experts")) or "-rtr" in stated:
        return False  # rows interleaved for the cores cannot be used by the card
    if profile.engine is None:
        return False
    start = load_engine(profile.engine.name).upload_from(model.num_experts, model.top_k)
    return start is not None and trace.num_tokens >= start
