"""What can this machine run, and how: the function behind `moeplan fit`.

Modelled: every bundled decoder in the formats that its files are published in, placed as llama.cpp or ik_llama.cpp would be told: the
fewest layers' experts in host memory with which the card keeps a gigabyte free at the context asked for, with the micro-batch of two with
which a request takes less. Of one model alone all formats are looked at; of every model the largest that fits, the largest of about four
bits, the largest that is wholly on the card. Speeds are those of one request at a time, a prompt of 2,048 tokens and the reply after it.
Ignored: how good the answers are (bits are shown), files that publishers make by recipes of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..base.errors import DoesNotFit, InputError, UnknownName
from ..base.frames import Tabular, flat
from ..planner.emit.engines.llamacpp_commands import check_kv_type
from ..planner.emit.flags import command, one_line
from ..planner.served.llamacpp import (
    FIT_MARGIN_BYTES,
    IK_LLAMA_CPP,
    LLAMA_CPP,
    fewest_on_host,
    fewest_over_cards,
)
from ..planner.served.setting import Setting
from ..sim.offload.metrics import Interval, figures_of
from ..sim.offload.simulate import Simulation
from ..specs.machines.engines import load_engine
from ..specs.machines.profile import Profile
from ..specs.models import ModelSpec, WeightFormat, weight_format
from ..specs.models.load import list_models
from ..specs.models.mixes.published import published_files
from ..specs.schedules.offload import OffloadSchedule
from .load import as_machine, as_model
from .subject import open_subject

Progress = Callable[[int, int, str], None]
ENGINES = {one.name: one for one in (LLAMA_CPP, IK_LLAMA_CPP)}
DEFAULT_CONTEXT, PROMPT_TOKENS, REPLY_TOKENS = 32768, 2048, 32
UBATCHES = (512, 2048)
"""Micro-batches that are tried where experts lie in host memory: each copies or computes them anew."""
WHOLE_REPLY_TOKENS = 256
"""Generated tokens of the request by whose time a micro-batch is chosen; fewer are simulated, since they are alike."""
ABOUT_FOUR_BITS = 5.3
_SAME_BITS = 0.98
_NO_DECODERS = ("nllb_moe", "switch_transformers")
_LEAST_PARAMETERS = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """One model in one format that the machine can run, and how."""

    model: str
    quant: str
    total_parameters: int
    bits_per_weight: float
    """Mean over all weights."""
    context_tokens: int
    """What memory is kept for: as asked, or the model's own limit."""
    placement: str
    """What the engine is told."""
    host_layers: int
    device_bytes: int
    host_bytes: int
    prefill_tokens_per_s: float
    prefill_tokens_per_s_interval: Interval
    decode_tokens_per_s: float
    decode_tokens_per_s_interval: Interval
    bound: str
    """What binds decoding and prompt together."""
    command: str
    """Ready to run; MODEL.gguf stands for the file."""
    from_disk: bool
    """What the host's memory cannot hold, experts or tables, is read from the disk when it is needed."""

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult(Tabular):
    """Everything that fits, the largest models first, and what does not."""

    SHOWN: ClassVar[tuple[str, ...]] = (
        "model", "quant", "placement", "decode_tokens_per_s", "decode_tokens_per_s_low", "decode_tokens_per_s_high",
        "prefill_tokens_per_s", "bound",
    )  # fmt: skip
    machine: str
    engine: str
    context_tokens: int
    rows: tuple[Fit, ...]
    left_out: dict[str, str]
    """Model → why no format of it is among the rows."""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row for every model and format that fits."""
        return [flat(one.to_dict()) for one in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `moeplan fit --json` prints."""
        return {
            "machine": self.machine, "engine": self.engine, "context_tokens": self.context_tokens,
            "rows": [one.to_dict() for one in self.rows], "left_out": self.left_out,
        }  # fmt: skip


def fit(
    hardware: str | Profile,
    *,
    model: str | None = None,
    context: int = DEFAULT_CONTEXT,
    min_decode: float | None = None,
    engine: str = LLAMA_CPP.name,
    kv_type: str = "f16",
    progress: Progress | None = None,
) -> FitResult:
    """Return which models fit a machine in which formats, and how fast each is predicted to be.

    model: one model alone, by name or file; None: every bundled decoder. context: tokens that memory is kept for. min_decode: generated
    tokens per second below which a format is left out. engine: llama.cpp or ik_llama.cpp. progress: told (done, total, note).

    Raises InputError for names that are not known or a machine without an engine's constants.
    """
    if engine not in ENGINES:
        raise UnknownName("--engine", engine, ENGINES)
    profile = as_machine(hardware, engine)
    if profile.engine is None or profile.engine.name != engine:
        raise InputError("--hardware", hardware if isinstance(hardware, str) else hardware.name, f"not a machine under {engine}",
                         "name it by its parts: rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB")  # fmt: skip
    check_kv_type(engine, kv_type)
    names = [model] if model is not None else _decoders()
    specs = {name: as_model(name) for name in names}
    rows: list[Fit] = []
    left_out: dict[str, str] = {}
    for number, (name, spec) in enumerate(specs.items()):
        if progress is not None:
            progress(number, len(names), name)
        tokens = context if spec.longest_context is None else min(context, spec.longest_context)
        found, why = _formats(name, spec, profile, tokens, kv_type, min_decode, every=model is not None)
        rows += found
        if not found:
            left_out[name] = why
    rows.sort(key=lambda one: (-one.total_parameters, -one.bits_per_weight))
    return FitResult(
        machine=profile.description, engine=engine, context_tokens=context, rows=tuple(rows), left_out=left_out
    )


def _decoders() -> list[str]:
    """Return the bundled models that generate text and are more than an example."""
    specs = {name: as_model(name) for name in list_models()}
    return [
        name for name, spec in specs.items()
        if spec.family not in _NO_DECODERS and spec.total_parameters >= _LEAST_PARAMETERS
    ]  # fmt: skip


def _formats(
    name: str,
    spec: ModelSpec,
    profile: Profile,
    context: int,
    kv_type: str,
    min_decode: float | None,
    *,
    every: bool,
) -> tuple[list[Fit], str]:
    """Return the formats of a model that are shown, the largest first, and why others are not; every: show all that fit."""
    found: list[Fit] = []
    published: tuple[str | None, ...] = (None,) if spec.is_file else published_files(spec)
    why = "no format of it fits" if published else "llama.cpp does not run it, or no file of it is published"
    for quant in published:
        try:
            simulation = _opened(name, quant, profile, context, kv_type)
            first = _with_ubatch(simulation, UBATCHES[0])
            bits = _mean_bits(simulation, first)
            if found and not every and not _is_wanted(first, bits, found):
                continue
            if found and bits > found[-1].bits_per_weight * _SAME_BITS:
                continue  # where rows are no whole blocks, a name of fewer bits stores as many
            one = _row(simulation, _quicker(simulation, first), spec, quant, context, kv_type)
        except (DoesNotFit, InputError) as reason:
            why = str(reason)
            continue
        if min_decode is not None and one.decode_tokens_per_s < min_decode:
            why = (
                f"{one.quant} generates {one.decode_tokens_per_s:.3g} tokens/s, fewer than the {min_decode:g} asked for"
            )
            continue
        found.append(one)
        if not every and one.host_layers == 0:
            break
    return found, why


def _is_wanted(one: Setting, bits: float, found: list[Fit]) -> bool:
    """Return whether a format adds something to those found: the first of about four bits, or the first wholly on the card."""
    return one.host_layers == 0 or (bits <= ABOUT_FOUR_BITS < found[-1].bits_per_weight)


def _row(simulation: Simulation, one: Setting, spec: ModelSpec, quant: str | None, context: int, kv_type: str) -> Fit:
    """Return one format of one model as it is placed; raises DoesNotFit, or InputError for a format that its matrices cannot have."""
    simulation = simulation.divided(one.split)
    predicted = simulation.predict(one.schedule)
    metrics, memory = predicted.metrics, predicted.memory_breakdown
    ends = metrics.prefill_tokens_per_s_interval, metrics.decode_tokens_per_s_interval
    prefill, decode = metrics.prefill_tokens_per_s, metrics.decode_tokens_per_s
    if prefill is None or decode is None or ends[0] is None or ends[1] is None:
        raise InputError("context", context, "no prompt and reply fit into it", "ask for more")
    from_disk = predicted.schedule.copy.host_experts is not None or _is_paged(
        simulation, predicted.schedule, one.cached_experts
    )
    return Fit(
        model=spec.name, quant=quant or "the file's", total_parameters=spec.total_parameters,
        bits_per_weight=_mean_bits(simulation, one), context_tokens=context,
        placement=f"{one.words}{', partly paged from disk' if from_disk else ''}", host_layers=one.host_layers,
        device_bytes=memory.device_bytes, host_bytes=memory.host_bytes,
        prefill_tokens_per_s=prefill, prefill_tokens_per_s_interval=ends[0], decode_tokens_per_s=decode,
        decode_tokens_per_s_interval=ends[1], bound=metrics.bound, command=_command(one, context, kv_type), from_disk=from_disk,
    )  # fmt: skip


def _is_paged(simulation: Simulation, one: OffloadSchedule, cached_experts: int) -> bool:
    """Return whether what the host must hold beside experts exceeds it and lies on a disk; raises DoesNotFit without one."""
    left = simulation.host_bytes_left(one, cached_experts)
    if left >= 0:
        return False
    if simulation.profile.disk is None:
        unified = simulation.profile.device.unified_memory
        where = "the one memory there is" if unified else "the host's memory"
        raise DoesNotFit(f"{simulation.model.name} in {where}", -left)
    return True


def _opened(name: str, quant: str | None, profile: Profile, context: int, kv_type: str) -> Simulation:
    """Return a model in one format, asked a prompt; raises InputError for a format that its matrices cannot have."""
    return open_subject(
        model=name, hardware=profile, quant=quant, prompt_tokens=min(PROMPT_TOKENS, context - REPLY_TOKENS), reply_tokens=REPLY_TOKENS,
        context=context, kv_type=kv_type, engine=None,
    ).simulation  # fmt: skip


def _quicker(simulation: Simulation, first: Setting) -> Setting:
    """Return the setting with the micro-batch with which a request takes less; `first` has the smallest."""
    found = [first]
    if first.host_layers:
        for ubatch in UBATCHES[1:]:
            with contextlib.suppress(DoesNotFit):
                found.append(_with_ubatch(simulation, ubatch))
    return min(found, key=lambda one: _request_s(simulation, one)) if len(found) > 1 else first


def _request_s(simulation: Simulation, one: Setting) -> float:
    """Return the seconds of a request with the whole reply under a setting."""
    simulation = simulation.divided(one.split)
    schedule = simulation.resolve(one.schedule)
    told = figures_of(simulation.run(schedule).step_end, simulation.workload(schedule))
    return (told["ttft_s"] or 0.0) + WHOLE_REPLY_TOKENS * (told["step_s"] or 0.0)


def _with_ubatch(simulation: Simulation, ubatch: int) -> Setting:
    """Return the setting with the fewest layers' experts in host memory; raises DoesNotFit where not even all suffice."""
    layers = simulation.trace.num_layers
    if simulation.split is not None:
        keeping = tuple(budget - FIT_MARGIN_BYTES for budget in simulation.budgets)
        smaller = simulation.over(simulation.trace, card_budgets=keeping)
        one = fewest_over_cards(smaller, range(layers + 1), 1, ubatch)
        simulation.within_host(one.schedule, cached_experts=one.cached_experts)
        return one
    split = simulation.profile.device.kind != "cpu" and not simulation.profile.device.unified_memory
    counts, free = (range(layers + 1), FIT_MARGIN_BYTES) if split else (range(1), 0)
    one, missing = fewest_on_host(simulation, counts, 1, ubatch, free_bytes=free)
    if missing:
        where = "with all experts in host memory" if split else "in the one memory there is"
        raise DoesNotFit(f"{simulation.model.name} {where}", missing)
    simulation.within_host(one.schedule, cached_experts=one.cached_experts)
    return one


def _mean_bits(simulation: Simulation, one: Setting) -> float:
    model, dense = simulation.model, simulation.dense_format or weight_format("16")
    experts: WeightFormat = simulation.expert_format(one.schedule)
    total = model.dense_bytes(dense) + model.num_routed_experts * model.expert_bytes(experts)
    return 8 * total / model.total_parameters


def _command(one: Setting, context: int, kv_type: str) -> str:
    flags: dict[str, Any] = {"--model": "MODEL.gguf", "--ctx-size": context}
    if one.card:
        flags["--n-gpu-layers"] = 999
    if one.told_layers:
        flags["--n-cpu-moe"] = one.told_layers
    if one.split is not None:
        shares = ",".join(f"{share:.15g}" for share in one.split.shares)
        flags |= {"--split-mode": "layer", "--tensor-split": shares}
    if one.ubatch != load_engine(LLAMA_CPP.name).prompt_chunk(0):
        flags["--ubatch-size"] = one.ubatch
    if kv_type != "f16":
        keys, _, values = kv_type.partition("/")
        flags |= {"--cache-type-k": keys, "--cache-type-v": values or keys}
    return one_line(command("llama-server", flags))
