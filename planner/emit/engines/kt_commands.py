"""KTransformers, plans made for it: the ready command line of its fork of SGLang, and which measurements would settle the choice.

Modelled: experts of each layer on the card, the chunk of a prompt, from which length on a prompt is computed on the card, requests
together and context. Ignored: weights' paths and formats, threads, NUMA nodes: they are the machine's and its files'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ....base.errors import InputError
from ....specs.models import ModelSpec
from ..choices import Emission, OffloadChoice, as_run
from ..drafting import SGLANG, facts_of, sglang_flags
from ..flags import TEXT, WHOLE, FlagValue, command, flag_lines, program_and_flags
from ..served import ServedChoice, ServedSetting
from ..speeds import difference_words, figures_words
from ..table import EngineTable, flags_of, names, row

SERVER_FILE = "sglang-kt.sh"
_PROGRAM = "python -m sglang.launch_server"
_KV = {"f16": None, "fp8": "fp8_e4m3", "fp8_e4m3": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2"}
SERVER = EngineTable(
    engine=_PROGRAM, checked="2026-11-29",
    how="kt's flags compared with the documentation inside the released kt-kernel wheel, the others with SGLang 0.5.23's own definitions",
    source="kt-kernel 0.7.2: README; sglang 0.5.23: srt/server_args.py",
    flags={
        "--model-path": row(TEXT, "the checkpoint"), "--kt-weight-path": row(TEXT, "the cores' weights"),
        "--kt-num-gpu-experts": row(WHOLE, "experts of each layer on the card", least=0),
        "--kt-expert-placement-strategy": row(names("uniform", "frequency", "front-loading", "random"), "which experts"),
        "--kt-gpu-prefill-token-threshold": row(WHOLE, "length from which a pass is computed on the card, layer by layer", least=1),
        "--chunked-prefill-size": row(WHOLE, "prompt tokens of a pass", least=1),
        "--max-running-requests": row(WHOLE, "requests decoded together", least=1),
        "--context-length": row(WHOLE, "tokens of context", least=1),
        "--kv-cache-dtype": row(names("fp8_e4m3", "fp8_e5m2"), "type of cached keys and values"), **SGLANG,
    },
)  # fmt: skip


def render_served(choice: OffloadChoice, served: ServedChoice, model: ModelSpec) -> Emission:
    """Return the command line of a plan made for KTransformers, what is predicted for it, and what would settle the choice."""
    if served.kv_type not in _KV:
        raise InputError("--kv-type", served.kv_type, f"SGLang has {', '.join(_KV)}", "plan again with one of these")
    count = served.chosen.experts_per_layer
    if count is None or count > model.num_experts:
        raise InputError(
            "plan: for.setting.experts_per_layer", count, f"a layer has {model.num_experts}", "plan again with --for"
        )
    predicted = [f"{served.chosen.name}: {figures_words(served.figures)}"]
    measure = [f"one request of the plan's lengths against the server: {figures_words(served.figures)} predicted"]
    if served.default is not None and not served.is_default and served.default_figures is not None:
        predicted.append(f"{served.default.name}: {figures_words(served.default_figures)}")
        own = _flags(served, served.chosen)
        told = {name: value for name, value in _flags(served, served.default).items() if own.get(name) != value}
        left = [name for name in own if name not in _flags(served, served.default)]
        changed = " ".join([*flag_lines(told).splitlines(), *(f"(without {name})" for name in left)])
        rate = figures_words(served.default_figures)
        measure.append(f"the same with {changed}: {rate} predicted; where it is the faster one, take that")
    if served.difference is not None:
        predicted.append(difference_words(served.difference))
    usage = (
        f"sh {SERVER_FILE} starts the server; MODEL and WEIGHTS stand for your files",
        "add --kt-method (the format of the cores' weights), --kt-cpuinfer (physical cores) and --kt-threadpool-count (NUMA nodes)",
    )
    facts = (
        "--kt-gpu-prefill-token-threshold and --kt-expert-placement-strategy: only the fork has them (pip install sglang-kt)",
        *facts_of(choice.draft, model.name, gguf=False),
    )
    return Emission(
        engine="KTransformers",
        files={SERVER_FILE: command(_PROGRAM, _flags(served, served.chosen) | sglang_flags(choice.draft))},
        usage=usage, notes=(), facts=facts, runs=as_run(choice.schedule, ("cache", "kernel", "copy")), predicted=tuple(predicted),
        measure=tuple(measure),
    )  # fmt: skip


def check_served(files: Mapping[str, str], model: ModelSpec) -> None:
    """Return nothing; raises for a flag that the engine does not have, and for more experts than a layer has."""
    program, told = program_and_flags(files[SERVER_FILE])
    if program != _PROGRAM:
        raise InputError(SERVER_FILE, program, f"not {_PROGRAM}", "emit again")
    flags = flags_of(told, SERVER, SERVER_FILE)
    if flags.get("--kt-num-gpu-experts", math.inf) > model.num_experts:
        raise InputError(f"{SERVER_FILE}: --kt-num-gpu-experts", flags.get("--kt-num-gpu-experts"),
                         f"a layer has {model.num_experts}", "emit again")  # fmt: skip


def _flags(served: ServedChoice, one: ServedSetting) -> dict[str, FlagValue]:
    found: dict[str, FlagValue] = {
        "--model-path": "MODEL", "--kt-weight-path": "WEIGHTS", "--kt-num-gpu-experts": one.experts_per_layer or 0,
        "--kt-expert-placement-strategy": "uniform", "--chunked-prefill-size": one.ubatch, "--max-running-requests": served.concurrency,
    }  # fmt: skip
    if one.upload_tokens is not None:
        found["--kt-gpu-prefill-token-threshold"] = one.upload_tokens
    if served.context_tokens:
        found["--context-length"] = served.context_tokens
    dtype = _KV[served.kv_type]
    return found if dtype is None else found | {"--kv-cache-dtype": dtype}
