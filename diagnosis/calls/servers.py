"""Command lines of vLLM, SGLang and KTransformers.

Modelled: the model, how weights and cache are stored, context, prompt tokens of a pass; KTransformers' experts on the card and threads of
the cores; how many cards divide the model. Ignored: what serves many requests at once; flags of drafting, of weights in host memory and of
several replicas are refused, since nothing is predicted for them. The tables (`servers_flags`) hold what such commands use, not every flag
there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from ...base.errors import InputError
from . import servers_flags
from .call import ALL_LAYERS, MOST_CARDS, MOST_TOKENS, Call, kv_type, quant_in, refuse, served_quant_in
from .flags import FIELD, Flag, Told, read_flags, table

VLLM, SGLANG, KTRANSFORMERS = "vllm", "sglang", "ktransformers"
ENGINES: Mapping[str, tuple[str, ...]] = {
    "vllm serve": (VLLM,), "vllm.entrypoints.openai.api_server": (VLLM,), "sglang.launch_server": (SGLANG, KTRANSFORMERS),
    "local_chat": (KTRANSFORMERS,), "ktransformers": (KTRANSFORMERS,), "ktransformers.local_chat": (KTRANSFORMERS,),
}  # fmt: skip
PROGRAMS = tuple(ENGINES)
# What engines call weights, and what they are here; others are as the checkpoint says.
_WEIGHTS = {"fp8": "FP8", "awq": "AWQ", "awq_marlin": "AWQ", "gptq": "GPTQ", "gptq_marlin": "GPTQ", "mxfp4": "MXFP4",
"modelopt_fp4": "NVFP4",
            "w8a8_int8": "INT8", "w8a8_fp8": "FP8"}  # fmt: skip
_KT_WEIGHTS = {"AMXINT4": "INT4", "AMXINT8": "INT8", "FP8": "FP8", "FP8_PERCHANNEL": "FP8", "BF16": "BF16"}


def read(program: str, words: Sequence[str]) -> Call:
    """Return what a command line says; raises InputError for flags that there are not, or that contradict each other."""
    told = read_flags(words, _flags(program), program, equals=True)
    engine = ENGINES[program][0]
    if program == "sglang.launch_server" and any(
        told.given(role) for role in ("kt_experts", "kt_method", "kt_threads", "kt_path")
    ):
        engine = KTRANSFORMERS
    model = told.text("model") or (told.others[0] if program == "vllm serve" and told.others else None)
    _check(told, program, engine)
    if len(told.others) > (program == "vllm serve"):
        raise InputError(f"{FIELD}: word", told.others[-1], f"{program} takes flags only", "write the flag before it")
    quant, remarks = told.text("quantization"), []
    if quant is not None and quant not in _WEIGHTS:
        remarks.append(
            f"{told.names['quantization']} {quant}: weights are taken as the checkpoint has them (--quant says it)"
        )
    hybrid = engine == KTRANSFORMERS
    gguf = told.text("gguf")
    if gguf is not None and quant_in(gguf) is None:
        remarks.append(
            f"{told.names['gguf']} {gguf}: its name says no weight format, the checkpoint's is taken (--quant says another)"
        )
    gpu_experts = told.whole("kt_experts", 0, 4096) if hybrid else None
    cards, parallel = _divided(told)
    return Call(
        program=program, engine=engine, text=" ".join((program, *words)), model=model,
        quant=_KT_WEIGHTS.get(told.text("kt_method") or "") or _WEIGHTS.get(quant or "") or quant_in(gguf)
        or served_quant_in(model) or quant_in(model),
        cpu_moe_layers=ALL_LAYERS if hybrid and gpu_experts is None else 0, gpu_experts=gpu_experts,
        ubatch=_pass_tokens(told),
        context=told.whole("context", -1, MOST_TOKENS) or None, threads=told.whole("kt_threads", 1, 4096),
        kv_types=(_kv(told), _kv(told)), reply=told.whole("reply", 1, MOST_TOKENS), cards=cards, parallel=parallel,
        remarks=tuple(remarks),
    )  # fmt: skip


def _pass_tokens(told: Told) -> int | None:
    """Return the prompt tokens of a pass; None where nobody says, and for -1, which leaves them to the engine."""
    found = told.whole("pass_tokens", -1, MOST_TOKENS)
    return None if found is None or found < 1 else found


def _divided(told: Told) -> tuple[tuple[int, ...], str | None]:
    """Return (numbers of the cards that take part, how they divide the model); one card where nothing is said, as these servers have it."""
    tensor, stages = (told.whole(role, 1, MOST_CARDS) or 1 for role in ("tensor", "pipeline"))
    if tensor > 1 and stages > 1:
        raise refuse(
            told.names["pipeline"],
            stages,
            f"stages of {tensor} cards each are not predicted",
            "leave one of the two out",
        )
    return tuple(range(max(tensor, stages))), "tensor" if tensor > 1 else "layer" if stages > 1 else None


@cache
def _flags(program: str) -> Mapping[str, Flag]:
    name = "VLLM" if program.startswith("vllm") else "SGLANG" if program.startswith("sglang") else "KTRANSFORMERS"
    return table(getattr(servers_flags, name))


def _check(told: Told, program: str, engine: str) -> None:
    """Return nothing; raises InputError for replicas, weights in host memory, and what contradicts each other."""
    count = told.whole("data", 1, 4096)
    if count is not None and count > 1:
        raise refuse(told.names["data"], count, "several cards that each serve the whole model are not predicted",
                     "give the command of one of them")  # fmt: skip
    offloaded = told.text("offload")
    if offloaded not in (None, "0", "0.0"):
        raise refuse(told.names["offload"], offloaded, "whole weights in host memory are not predicted", "leave it out")
    if engine == KTRANSFORMERS and program == "sglang.launch_server" and not told.given("kt_experts"):
        raise refuse(
            "--kt-num-gpu-experts", "(absent)", "how many experts of each layer are on the card is not said", "add it"
        )


def _kv(told: Told) -> str:
    text = told.text("kv")
    return "f16" if text in (None, "auto", "bfloat16") else kv_type(text, told.names["kv"])
