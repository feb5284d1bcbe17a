"""Options that several commands share, and the nouns they name.

Modelled: one declaration per option, so that it reads alike everywhere, and opening what it names. Ignored: what a command
does with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from .bounds import CONTEXT_TOKENS as TOKENS
from .bounds import PASSES, REQUESTS_TOGETHER, between

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def _beginning(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return a completion for the shell: those of `names()` that begin as what was typed."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def _models() -> Iterable[str]:
    from ...specs.models.load import list_models

    return list_models()


def _machines() -> Iterable[str]:
    from ...specs.machines.profile_file import list_hardware

    return list_hardware()


def _engines() -> Iterable[str]:
    from ...specs.machines.engines import engines

    return engines()


def _presets() -> Iterable[str]:
    from ...specs.schedules.presets import PRESETS

    return PRESETS


complete_model, complete_hardware = _beginning(_models), _beginning(_machines)
complete_engine, complete_schedule = _beginning(_engines), _beginning(_presets)

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        help="Bundled model name, a Hugging Face config.json or a checkpoint's folder, or a .gguf file.",
        autocompletion=complete_model,
    ),
]
HardwareOption = Annotated[
    str,
    typer.Option(
        "--hardware",
        help="Bundled machine name (moeplan hardware list), a profile.json, or parts: rtx-4090 + ryzen-9-7950x + ddr5-6000x2:64GiB.",
        autocompletion=complete_hardware,
    ),
]
OptionalTraceOption = Annotated[
    str | None,
    typer.Option(
        "--trace",
        help="Recording (.safetensors), or 'bundled' for the project's own; without one, routing is like that of the model's family.",
    ),
]
ConcurrencyOption = Annotated[
    int | None,
    typer.Option(
        "--concurrency",
        help="Requests decoded together; default: 1.",
        callback=between(1, REQUESTS_TOGETHER, "requests"),
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Whole device budget in bytes, e.g. 6GiB or 6GB, of several cards 22GiB,10GiB; default: the device's memory.",
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        "--window",
        help="Replay only the first so many forward passes; default: all.",
        callback=between(1, PASSES, "forward passes"),
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change one thing, key=value: an option of the schedule (cache.policy=lfu), or, with a prefix and in its own units, of "
        "the machine (machine.host.memory_bytes=96GiB), the model (model.top_k=4) or the request (request.concurrency=8). Repeatable.",
    ),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        help="A Python file with rules of your own (scores of victims and guesses, what misses do); it is run, and followed.",
    ),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="Serving engine that runs a machine made of parts, or a bundled card (moeplan engine list); default: llama.cpp, of a bundled "
        "card where neither a recording nor a schedule is given.",
        autocompletion=complete_engine,
    ),
]
PlanEngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="Serving engine that runs a machine made of parts (moeplan engine list); default: llama.cpp. ep: whose kernels, measured "
        "on this card, count; default: tensorrt-llm.",
        autocompletion=complete_engine,
    ),
]
ForOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="Engine that the plan is for (llama.cpp, ik_llama.cpp, ktransformers): only what it can be told is searched, beside what "
        "it does of itself; implies --engine. ep: sglang, vllm, trtllm …: the figure is that of what is emitted.",
    ),
]
QuantOption = Annotated[
    str | None,
    typer.Option(
        "--quant",
        help="Weight format as files are named, for experts and the rest: Q4_K_M, UD-Q2_K_XL, MXFP4_MOE, AWQ … (in place of --dense-bits).",
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        help="Tokens of context that memory is kept for; default: the longest request (expert parallel: 4096 a request).",
        callback=between(1, TOKENS, "tokens"),
    ),
]
UbatchOption = Annotated[
    int | None,
    typer.Option(
        "--ubatch",
        "--prefill-chunk",
        help="Prompt tokens per forward pass; default: as the engine does of itself, without one all.",
        callback=between(1, TOKENS, "tokens"),
    ),
]
ReserveOption = Annotated[
    str | None,
    typer.Option(
        "--reserve",
        help="Device memory that something else uses (a display, another model), e.g. 1GiB, of several cards 1GiB,0GiB; default: none.",
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        "--split",
        help="How the model lies on several cards: layer, row or tensor; layer:3,1 with shares (-ts); 24,12: layers of each card. "
        "Default: what the engine does of itself.",
    ),
]
DraftOption = Annotated[
    str | None,
    typer.Option("--draft", help="What drafts: n-gram (default), mtp, or a model of the same vocabulary."),
]
SpeculativeOption = Annotated[
    bool,
    typer.Option(
        "--speculative",
        help="Choose how many tokens to draft, none included, at most --draft-tokens; beside --acceptance.",
    ),
]
KvOption = Annotated[
    str,
    typer.Option(
        "--kv-type",
        help="How keys and values are kept: f16, q8_0, q5_1, q4_0, fp8 …; q8_0/q4_0: keys and values apart.",
    ),
]
KvTypesOption = Annotated[
    str,
    typer.Option(
        "--kv-type",
        help="How keys and values are kept: f16, q8_0, q5_1, q4_0, fp8 …; q8_0/q4_0: keys and values apart. offload: several with commas "
        "are searched, the preferred one first: a later one is taken only where it gains something.",
    ),
]
OptionalDenseBitsOption = Annotated[
    str | None,
    typer.Option(
        "--dense-bits",
        help="Weight format of everything but routed experts: 32, 16, 8, 4, mxfp4, 3, 2 or native (as the checkpoint stores attention); "
        "default: native, 16 at most.",
    ),
]


def model_file(name_or_path: str) -> str:
    """Return the file that a --model stands for: a folder's is its config.json."""
    return os.path.join(name_or_path, "config.json") if os.path.isdir(name_or_path) else name_or_path
