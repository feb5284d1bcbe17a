"""A report becomes what a prediction needs: machine and engine, model and formats, schedule and recording.

Modelled: only the stated facts; what is not stated takes a documented default, named in the row. Decoding is predicted
over a few steps at the stated context, a prompt over one or two micro-batches at its mean depth: both are rates, and costs
grow evenly with context. Several cards are divided as stated or as the engine does (`split`). Ignored: drafting (a reason is given).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ...base.errors import InputError
from ...base.units import GIB
from ...sim.offload.drafting.draft import Drafting
from ...specs.card_split import CardSplit
from ...specs.machines.compose import host_bytes_per_s
from ...specs.machines.engines import engines, load_engine, prompt_chunk_on
from ...specs.machines.profile import Profile
from ...specs.memory import kv_bytes_of
from ...specs.models import BITS_PER_BYTE, ModelSpec, WeightFormat, quantised_as, weight_format
from ...specs.models.load import is_bundled, load_model
from ...specs.models.mixes.known import known_name
from ...specs.models.mixes.names import mix
from ...specs.schedules.offload import OffloadSchedule
from ...specs.schedules.presets import load_preset
from ...traces.lengths import RequestLengths
from ...traces.recording import RoutingTrace
from ...traces.synthesis.prior import prior_recording, spread_recordings
from ..model_code import CALLS_EVERY_EXPERT
from .drafts import drafting_of
from .hits import stated_hits
from .machine import NotExpressible, machine_of, streaming
from .programs import engine_of
from .rows import Report
from .split import first_layers_on_cards, split_of

DECODE_STEPS = 8
CACHE_STEPS = 256
"""A cache's hits settle over many steps: so many are run where experts are cached, or as many as were generated."""
_CONTEXT, _PROMPT = 512, 512
_ASSUMED_MEMORY_GIB = 64.0
_OF_MEMORY = 0.75
"""Share of a memory that an engine fills with experts where its sizes are not stated."""
_MOST_BATCH, _MOST_TOKENS, _MOST_PASS = 1024, 1 << 24, 1 << 15
_AGREES = 0.01


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
    likewise: tuple[RoutingTrace, ...] = ()
    """The same steps with as little and as much locality as texts have, where hits follow from it."""
    split: CardSplit | None = None
    """How the model lies on several cards."""
    layers_off: int = 0
    """First layers that lie in host memory as a whole."""
    drafting: Drafting | None = None
    """How decode steps are drafted."""
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
        profile, parts = machine_of(report, table, assumed)
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
    chunk = _chunk(profile)
    trace, prompt, likewise = _recording(report, model, batch, chunk, assumed)
    schedule = _schedule(report, model, profile, trace, formats[0], assumed)
    if report.part("placement").get("whole_layers") is True:
        profile = streaming(profile, model, formats[1])
    kv_type = str(report.part("workload").get("kv_type") or "f16")
    return Setup(
        report=report, profile=profile, model=model, schedule=schedule.with_options(workload__concurrency=batch),
        trace=trace, dense_format=formats[1], kv_bytes_per_value=kv_bytes_of(kv_type, model),
        batch=batch, prompt_tokens=prompt, assumed=assumed, host_bytes_per_s=host_bytes_per_s, split=split, likewise=likewise,
        drafting=drafting_of(report, model, assumed), layers_off=_layers_off(report, model),
    )  # fmt: skip


def _layers_off(report: Report, model: ModelSpec) -> int:
    """Return how many first layers lie in host memory as a whole."""
    placement = report.part("placement")
    held = placement.get("gpu_layers")
    return max(0, model.num_layers - held) if placement.get("kind") == "layers" and isinstance(held, int) else 0


def remade(setup: Setup, table: Mapping[str, Any]) -> Setup:
    """Return the same under other constants of engines."""
    profile = machine_of(setup.report, table, [])[0]
    if setup.report.part("placement").get("whole_layers") is True:
        profile = streaming(profile, setup.model, setup.dense_format)
    return dataclasses.replace(setup, profile=profile)


# --- the model -----------------------------------------------------------------------------------------------------------


def model_of(report: Report) -> ModelSpec:
    """Return the model of a report; raises NotExpressible."""
    name = report.row.get("model")
    if not isinstance(name, str) or not name:
        raise NotExpressible("no model is named")
    if name.startswith("configs/"):
        path = report.folder / name
        if ".." not in name and not path.is_file() and is_bundled(path.stem):
            return _loaded(path.stem)
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
    dense_name = dense_name if isinstance(dense_name, str) else None
    if expert_name is not None and dense_name is None and _is_native(report, model, expert_name):
        dense_name = model.usual_dense_bits
        assumed.append("quant.dense: as the checkpoint")
    try:
        experts, dense = stored_by_name(model, expert_name, dense_name)
    except NotExpressible:
        bits = _mean_bits(report, model)
        if bits is None or expert_name is None:
            raise
        assumed.append(f"quant: {expert_name[:40]} by its stated size, alike in every matrix")
        experts = dense = _stated(bits)
    experts = _as_the_file(report, model, experts, dense, is_open=expert_name is not None and _open(expert_name))
    return experts, dense, dataclasses.replace(model, native_bits=experts.name)


def _is_native(report: Report, model: ModelSpec, name: str) -> bool:
    """Return whether experts have the format of a checkpoint of few bits, which an engine runs as it is: its rest keeps more bits."""
    engine = engines().get(engine_of(report) or "")
    return (
        known_name(name).lower() == model.native_bits
        and model.native_bits != model.usual_dense_bits
        and not (engine is not None and engine.gguf)
    )


def _mean_bits(report: Report, model: ModelSpec) -> float | None:
    """Return the bits a weight that a report states, or that its file has; None where it says neither, or what no format has."""
    total, mean = report.number("quant", "file_bytes"), report.number("quant", "bits_per_weight")
    bits = mean if mean is not None else None if total is None else total * BITS_PER_BYTE / model.total_parameters
    return bits if bits is not None and 1 <= bits <= 16 else None


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
    of_dense = known_name(dense or experts or "BF16")
    try:
        return quantised_as(model.native_bits if experts is None else known_name(experts), of_dense, model)
    except InputError:
        raise NotExpressible(f"weight format {(experts or of_dense)[:40]} or {of_dense[:40]} is not known") from None


def _stated(bits_per_weight: float) -> WeightFormat:
    return weight_format(f"{bits_per_weight:.4g}bpw")


def _open(name: str) -> bool:
    recipe = mix(name)
    return recipe is not None and not recipe.exact


# --- schedule and recording ----------------------------------------------------------------------------------------------


def _recording(
    report: Report, model: ModelSpec, batch: int, chunk: int, assumed: list[str]
) -> tuple[RoutingTrace, int, tuple[RoutingTrace, ...]]:
    """Return the recording, the prompt's tokens, and the same with other locality where what a cache holds follows from it."""
    context = _count(report, "context_tokens", _CONTEXT, _MOST_TOKENS)
    if report.number("workload", "context_tokens") is None:
        assumed.append(f"workload.context_tokens: {_CONTEXT}")
    if report.decodes:
        steps = DECODE_STEPS
        if report.kind.startswith("cache"):
            steps = min(_count(report, "generated_tokens", CACHE_STEPS, _MOST_TOKENS), CACHE_STEPS)
        before = max(0, context - steps // 2)
        alike = RequestLengths.alike(prompt_tokens=before, reply_tokens=steps, requests=batch, cached_tokens=before)
        follows = report.part("placement").get("kind") == "expert-cache" and stated_hits(report) is None
        return prior_recording(model, alike), 0, spread_recordings(model, alike) if follows else ()
    prompt = report.number("workload", "prompt_tokens")
    usual = max(_PROMPT, _count(report, "ubatch", chunk, _MOST_TOKENS))  # whoever asks for larger passes fills them
    if prompt is None:
        assumed.append(f"workload.prompt_tokens: {usual}")
    prompt_tokens = _count(report, "prompt_tokens", usual, _MOST_TOKENS)
    size = min(_count(report, "ubatch", chunk, _MOST_TOKENS), prompt_tokens, _MOST_PASS)
    # One micro-batch at the mean depth stands for all: costs are linear in context.
    before = max(0, context - size // 2)
    lengths = RequestLengths.alike(prompt_tokens=before + size, reply_tokens=0, cached_tokens=before)
    return prior_recording(model, lengths), int(prompt or usual), ()


def _chunk(profile: Profile) -> int:
    """Return how many tokens of a prompt pass at once where a report does not say: as many as the engine takes of itself."""
    return prompt_chunk_on(profile) or _PROMPT


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

    Of layers that are on the cores as a whole, so is what surrounds the experts (`layers_off`).
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
    hits = None if placement.get("tier") == "disk" and on_device else stated_hits(report)
    if hits is not None:
        each = max(1, round(hits * model.num_experts))
    on_cores = "cores" in str(placement.get("cold")) and on_device
    static = "static" in str(placement.get("policy"))
    # Chosen by other texts' counts: of models trained to use experts evenly, hardly better than any. What cores compute is not brought to
    # the card in time either, and a prompt finds a cache that earlier ones left.
    if static or on_cores or hits is not None or not report.decodes:
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
            if profile.device.unified_memory:  # one memory: what the device's cache holds is not held twice
                held -= each * model.num_moe_layers
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
