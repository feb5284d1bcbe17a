"""Where a case comes from: an engine's command line, or a line of a benchmark.

Modelled: model, machine and weight format by name, held against what command or line says; where the engine places layers itself, where it
puts them. Ignored: what is predicted of a case.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..base.errors import InputError
from ..base.units import GIB, MIB
from ..calibrate.imports.bench_line import BenchLine
from ..papers.field.machine import NotExpressible
from ..papers.field.own.placement import placement_of
from ..planner.served import llamacpp as served
from ..specs.machines.engines import choose_backend, load_engine
from ..specs.machines.load import load_machine
from ..specs.machines.notation import is_parts, parse_parts
from ..specs.machines.parts import Parts
from ..specs.machines.profile import Profile
from ..specs.models import ModelSpec
from ..specs.models.load import load_model, named_in
from ..specs.models.mixes.published import file_as_trained
from .calls import ollama
from .calls.call import MOST_TOKENS, Call
from .case import Case, machine_of

DEFAULT_PROMPT, DEFAULT_REPLY = 512, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is said of a run besides its command."""

    model: str | None
    """None: the one that the command names."""
    hardware: str
    quant: str | None = None
    prompt: int | None = None
    reply: int | None = None
    concurrency: int = 1
    built: str | None = None


def case_of_call(call: Call, asked: Asked) -> Case:
    """Return the case of a command line; raises InputError where command and options contradict each other or say too little."""
    name, named = _model_name(call, asked)
    model = load_model(name)
    parts, profile, backend = _machine(call, asked)
    quant, stored = _quant(call, model, asked)
    assumed = [*named, *stored]
    prompt, reply = _lengths(call, asked)
    if prompt is None or reply is None:
        said = f"{DEFAULT_PROMPT if prompt is None else prompt} + {DEFAULT_REPLY if reply is None else reply}"
        assumed.append(f"workload: requests of {said} tokens")
    if call.engine == ollama.ENGINE and call.context is None:
        tokens = min(ollama.usual_context(profile.memory_bytes), model.longest_context or MOST_TOKENS)
        call = dataclasses.replace(call, context=tokens)
        assumed.append(
            f"context: {tokens:,} tokens, as ollama keeps on {profile.memory_bytes / GIB:.0f} GiB (OLLAMA_CONTEXT_LENGTH)"
        )
    prompt, reply = (DEFAULT_PROMPT if prompt is None else prompt), (DEFAULT_REPLY if reply is None else reply)
    if call.context is not None and call.depth + prompt + reply > call.context:
        raise InputError("--command: context", call.context, f"less than the {call.depth + prompt + reply} tokens of a request",
                         "give --prompt-tokens and --reply-tokens as measured")  # fmt: skip
    most = model.longest_context
    if call.context is not None and most is not None and call.context // call.slots > most:
        raise InputError(
            "--command: context",
            call.context,
            f"{model.name} was made for {most} tokens",
            "give at most that, for each slot",
        )
    case = Case(
        model=model, model_name=name, quant=quant, parts=parts, profile=profile, engine=call.engine, backend=backend,
        placement={"kind": "gpu"}, ubatch=call.ubatch or load_engine(call.engine).prompt_chunk(profile.device.memory_bytes.value),
        kv_types=call.kv_types, prompt=prompt, reply=reply, depth=call.depth,
        concurrency=asked.concurrency, context=call.context, built=asked.built, threads=call.threads,
        parallel=call.parallel, card_shares=call.card_shares, assumed=(*assumed, *call.remarks),
    )  # fmt: skip
    return case.changed(placement=_placed(call, case))


def _model_name(call: Call, asked: Asked) -> tuple[str, list[str]]:
    """Return the name of the model, and what was assumed of it; raises InputError where neither options nor command name one."""
    if asked.model is not None:
        return asked.model, []
    found = None if call.model is None else named_in(call.model)
    if found is None:
        said = (
            "the command names no model"
            if call.model is None
            else f"{call.model} is no bundled model's name for certain"
        )
        raise InputError("--model", "(absent)", said, "name the model (moeplan model list), or give its file")
    return found, [f"model: {found}, as the command names it"]


def _machine(call: Call, asked: Asked) -> tuple[Parts | None, Profile, str]:
    """Return (parts where the machine is made of them, the machine, its back end)."""
    engine, told = call.engine, call.backend
    if not is_parts(asked.hardware):
        profile = load_machine(asked.hardware, engine)
        own = profile.engine
        _check_cards(call, max(1, profile.num_cards), asked)
        return None, profile, "cuda" if own is None else own.backend
    parts = parse_parts(asked.hardware)
    if call.threads is not None and parts.cpu is not None:
        parts = dataclasses.replace(parts, threads=min(call.threads, parts.cpu.cores * parts.sockets))
    _check_cards(call, max(1, len(parts.slots)), asked)
    if call.cards is not None and parts.gpu is not None:
        first, *others = (parts.slots[card] for card in call.cards)
        parts = dataclasses.replace(parts, gpu=first.gpu, pcie=first.pcie, more=tuple(others))
    if told == "cpu":
        if parts.unified_memory or parts.cpu is None:
            raise InputError(
                "--hardware",
                asked.hardware,
                "the command uses no card, and no processor is named",
                "name the processor",
            )
        parts = dataclasses.replace(parts, gpu=None, more=(), pcie=None)
    backend = choose_backend(load_engine(engine), told, "cpu" if parts.gpu is None else parts.gpu.backend)
    return parts, machine_of(parts, engine, backend, asked.built), backend


def _check_cards(call: Call, cards: int, asked: Asked) -> None:
    """Return nothing; raises InputError where the command uses cards, or divides the model over more, than the machine has."""
    used = max(call.cards or (0,)) + 1
    if used > cards or len(call.card_shares) > (len(call.cards) if call.cards else cards):
        rule = f"the command uses {max(used, len(call.card_shares))} cards, it has {cards}"
        raise InputError(
            "--hardware", asked.hardware, rule, "write the machine with all of them, e.g. 2 x rtx-3090 + …"
        )


def _quant(call: Call, model: ModelSpec, asked: Asked) -> tuple[str | None, list[str]]:
    """Return the weight format, and what was assumed of it."""
    if model.is_file:
        return asked.quant, []
    said = asked.quant or call.quant
    if said is not None or not load_engine(call.engine).gguf:
        return said, []
    usual = file_as_trained(model)
    if usual is None and call.engine == ollama.ENGINE:
        return ollama.USUAL_QUANT, [f"quant: {ollama.USUAL_QUANT}, as most of ollama's library is"]
    if usual is None:
        raise InputError("--quant", "(absent)", f"neither the command nor --model says how {model.name} is stored",
                         "write it as files are named, e.g. --quant Q4_K_M")  # fmt: skip
    return usual, [f"quant: {usual}, as {model.name} is published"]


def _lengths(call: Call, asked: Asked) -> tuple[int | None, int | None]:
    """Return prompt and reply of what was measured, as command or options say."""
    for option, said, told in (
        ("--prompt-tokens", asked.prompt, call.prompt),
        ("--reply-tokens", asked.reply, call.reply),
    ):
        if said is not None and told is not None and said != told:
            raise InputError(option, said, f"the command runs {told}", "leave it out")
    return asked.prompt if call.prompt is None else call.prompt, asked.reply if call.reply is None else call.reply


def _placed(call: Call, case: Case) -> Mapping[str, Any]:
    """Return where experts are, as field reports have it."""
    model, on_cores = case.model, case.profile.device.kind == "cpu"
    if on_cores:
        return {"kind": "cpu"}
    if call.gpu_experts is not None:
        if call.gpu_experts > model.num_experts:
            raise InputError(
                "--kt-num-gpu-experts", call.gpu_experts, f"{model.name} has {model.num_experts}", "give at most that"
            )
        return (
            {"kind": "gpu-experts", "gpu_experts_per_layer": call.gpu_experts}
            if call.gpu_experts
            else {"kind": "cpu-moe"}
        )
    if not call.placed:
        return _whole_layers(case) if call.engine == ollama.ENGINE else _fitted(case, call)
    how = {"prefill_compute": "-rtr"} if call.repacked else {} if call.uploads else {"prefill_compute": "cpu"}
    if call.gpu_layers is not None and call.gpu_layers < model.num_layers:
        if call.gpu_layers == 0:
            raise InputError("--command: -ngl", 0, "with a card beside it, prompts are copied to it layer by layer: not predicted",
                             "add -dev none where the card takes no part, or say how many layers it holds")  # fmt: skip
        return {"kind": "layers", "gpu_layers": call.gpu_layers, **how}
    line = BenchLine(where="the command", test="", prompt_tokens=1, generated_tokens=0, tokens_per_s=1.0,
                     cpu_moe_layers=call.cpu_moe_layers, overrides=call.overrides, uploads=call.uploads)  # fmt: skip
    try:
        placed = dict(placement_of(line, model, case.profile))
    except NotExpressible as reason:
        raise InputError("--command: -ot", call.overrides, str(reason), "describe whole layers' experts") from None
    return placed | how if placed["kind"] != "gpu" else placed


def _whole_layers(case: Case) -> Mapping[str, Any]:
    """Return as many whole layers on the card as there is room for, as ollama has them; raises InputError where there is for none."""
    fewest = served.fewest_host_layers(case.memory(), case.concurrency, case.ubatch, served.FIT_MARGIN_BYTES)
    if fewest == 0:
        return {"kind": "gpu"}
    layers = 0 if fewest is None else case.model.num_layers - fewest
    if layers == 0:
        raise InputError(
            "--hardware", case.profile.name, "the card has no room for a layer", "name the processor alone"
        )
    return {"kind": "layers", "gpu_layers": layers}


def _fitted(case: Case, call: Call) -> Mapping[str, Any]:
    """Return what the engine makes of itself (`--fit`); raises DoesNotFit where layers would leave the card."""
    free_bytes = served.FIT_MARGIN_BYTES if call.fit_free_mib is None else call.fit_free_mib * MIB
    chosen = served.fitted(case.memory(), case.concurrency, case.ubatch, free_bytes)
    layers = case.model.num_moe_layers
    if chosen.host_layers == 0:
        return {"kind": "gpu"}
    return (
        {"kind": "cpu-moe"} if chosen.host_layers >= layers else {"kind": "n-cpu-moe", "cpu_layers": chosen.host_layers}
    )
