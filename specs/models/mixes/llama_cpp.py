"""Which type llama.cpp's quantiser gives each matrix: the rules of its `llama_tensor_get_type`, as tables.

Modelled: values and keys that are shared by heads, matrices that lead out of an MLP (finer in the first and last eighth of the layers and
every third between, or in the first layers), models of 8 experts, output matrix and token embedding, rows that are no whole
blocks. Mixes of IQ types and Q2_K_S are those made with an importance matrix, as published ones are; others those made without one.
Ignored: rules for single architectures without experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .tensors import EMBEDDING, HEAD, Matrix, Shape

SOURCE = "ggml-org/llama.cpp, src/llama-quant.cpp (llama_tensor_get_type), read at 007dbbf"
DEFAULTS: Mapping[str, str] = MappingProxyType({
    **{name: name for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "Q2_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ3_XXS",
                               "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "NVFP4")},
    "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S", "MXFP4_MOE": "MXFP4",
})  # fmt: skip
"""Every mix, and the type of what no rule treats apart."""
# Mixes whose publishers raise the outer matrices to Q8_0: the mix they are otherwise.
RAISED: Mapping[str, str] = MappingProxyType(
    {"Q2_K_L": "Q2_K", "Q3_K_XL": "Q3_K_L", "Q4_K_L": "Q4_K_M", "Q5_K_L": "Q5_K_M", "Q6_K_L": "Q6_K"}
)
_LOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
_EIGHT = 8
_SHARED = 4
"""Heads that share keys and values, from which on values get a finer type."""
_HEADS = dict.fromkeys((*_LOW, "IQ3_XXS"), "Q5_K")
_EMBEDDINGS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), "Q2_K"), **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "IQ3_S"),
    **dict.fromkeys(("TQ1_0", "TQ2_0"), "Q4_K"),
}  # fmt: skip
# What llama.cpp stores a matrix in where a row is not a whole number of blocks of 256.
FALLBACKS: Mapping[str, str] = MappingProxyType({
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"), "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
})  # fmt: skip
_VALUES = ("attn_v", "attn_qkv", "attn_kv_b")


def finer(layer: int, num_layers: int) -> bool:
    """Return whether a layer is one of those that mixes of two types store in the finer one."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


@dataclass(slots=True)
class _Counts:
    """How many tensors of a kind came before."""

    values: int = 0
    down: int = 0


def types(mix: str, shape: Shape, matrices: Iterable[Matrix]) -> Iterator[tuple[Matrix, str]]:
    """Yield each matrix with the type that the mix called `mix` gives it."""
    raised, name = mix in RAISED, RAISED.get(mix, mix)
    found = list(matrices)
    num_values = sum(one.name in _VALUES for one in found)
    counts = _Counts()
    for one in found:
        if raised and one.name in (EMBEDDING, HEAD):
            yield one, "Q8_0"
        else:
            yield one, _type(name, shape, one, counts, num_values)


def _type(mix: str, shape: Shape, one: Matrix, counts: _Counts, num_values: int) -> str:
    default = DEFAULTS[mix]
    if one.name == HEAD or (shape.tied and one.name == EMBEDDING):
        return _head(mix, default, one.row)
    if mix == "MXFP4_MOE":
        return "MXFP4" if one.stacked else "Q8_0"
    if one.name == EMBEDDING:
        return _EMBEDDINGS.get(mix, default)
    if mix in _LOW:
        return _low(mix, default, shape, one, counts)
    if one.name in _VALUES:
        at, counts.values = counts.values, counts.values + 1
        return _value(mix, default, shape, at, num_values)
    if one.name in ("attn_k", "attn_q"):
        if one.name == "attn_k" and shape.num_experts == _EIGHT:
            return "Q8_0"
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(mix, default)
    if one.name.startswith("ffn_down"):
        return _down(mix, default, shape, one.layer or 0)
    if one.name == "attn_output":
        return _output(mix, default, shape)
    if one.name.startswith(("ffn_gate", "ffn_up")) and mix == "IQ3_XS":
        n = shape.num_layers
        return "IQ3_XXS" if n // 8 <= (one.layer or 0) < 7 * n // 8 else default
    return default


def _head(mix: str, default: str, row: int) -> str:
    """Return the type of the output matrix."""
    if mix == "MXFP4_MOE" or (default in FALLBACKS and row % 256):
        return "Q8_0"
    return _HEADS.get(mix, default if default == "Q8_0" else "Q6_K")


def _low(mix: str, default: str, shape: Shape, one: Matrix, counts: _Counts) -> str:
    """Return the type in mixes of about two bits and less."""
    finest = mix in ("IQ2_S", "IQ2_M")
    if one.name in _VALUES:
        shared = shape.heads_per_kv >= _SHARED or shape.num_experts >= _SHARED
        return "Q4_K" if shared else "IQ3_S" if finest else "Q2_K"
    if one.name == "attn_k" and shape.num_experts == _EIGHT:
        return "Q4_K"
    if one.name.startswith("ffn_down"):
        at, counts.down = counts.down, counts.down + 1
        return ("IQ3_S" if finest else "Q2_K") if at < shape.num_layers // 8 else default
    if one.name == "attn_output":
        if shape.num_experts == _EIGHT:
            return "Q5_K"
        return "IQ2_XXS" if mix in ("IQ1_S", "IQ1_M") else "IQ3_S" if finest else default
    return default


def _value(mix: str, default: str, shape: Shape, at: int, count: int) -> str:
    """Return the type of a matrix that yields values; `at` of `count`."""
    if shape.num_experts == _EIGHT:
        return "Q8_0"
    shared = shape.heads_per_kv >= _SHARED
    found = {
        "Q2_K": "Q4_K" if shared else "Q3_K", "IQ3_M": "Q4_K", "Q3_K_M": "Q5_K" if at < 2 else "Q4_K", "Q3_K_L": "Q5_K",
    }.get(mix)  # fmt: skip
    if found is not None:
        return found
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if finer(at, count) else default
    if mix == "Q4_K_S":
        return "Q5_K" if at < 4 else default
    if shared:
        return {
            **dict.fromkeys(("Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S"), "Q4_K"), **dict.fromkeys(("IQ4_NL", "IQ4_XS"), "Q5_K"),
        }.get(mix, default)  # fmt: skip
    return default


def _down(mix: str, default: str, shape: Shape, layer: int) -> str:
    """Return the type of a matrix that leads out of an MLP."""
    n = shape.num_layers
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if finer(layer, n) else default
    if mix == "Q3_K_M":
        return "Q5_K" if layer < n // 16 else "Q4_K"
    if mix == "IQ3_M":
        return "Q4_K" if layer < n // 8 or (shape.num_experts == _EIGHT and finer(layer, n)) else default
    if layer < n // 8:
        return {"Q2_K": "Q3_K", "Q2_K_S": "Q4_K", "Q3_K_L": "Q5_K", "Q4_K_S": "Q5_K"}.get(mix, default)
    return {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}.get(mix, default)


def _output(mix: str, default: str, shape: Shape) -> str:
    """Return the type of the matrix that leads out of attention."""
    if shape.num_experts != _EIGHT:
        found = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
        return found.get(mix, default)
    raised = ("Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS")
    return "Q5_K" if mix in raised else default
