"""Which type ik_llama.cpp's quantiser gives each matrix of a model with experts, for mixes that only it has.

Modelled: keys and values at 8 bits, a finer matrix out of attention, the first layers of the mixes of two bits and less, rows that are
no whole blocks. Mixes are those made with an importance matrix. Ignored: models of fewer than 4 experts, patterns that a
person gives (most published files have some).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from .tensors import EMBEDDING, HEAD, Matrix, Shape

SOURCE = "ikawrakow/ik_llama.cpp, src/llama-quantize.cpp (llama_tensor_get_type), read at 8337e4c"
_PLAIN = ("IQ1_KT", "IQ2_K", "IQ2_KS", "IQ2_KL", "IQ2_KT", "IQ3_K", "IQ3_KS", "IQ3_KT", "IQ4_K", "IQ4_KS", "IQ4_KSS", "IQ4_KT", "IQ5_K",
          "IQ5_KS", "IQ6_K")  # fmt: skip
_ROWS = ("Q4_0_R8", "Q5_0_R4", "Q6_0_R4", "Q8_0_R8", "Q2_K_R4", "Q3_K_R4", "Q4_K_R4", "Q5_K_R4", "Q6_K_R4", "IQ1_S_R4", "IQ1_M_R4",
         "IQ2_XXS_R4", "IQ2_XS_R4", "IQ3_XXS_R4", "IQ3_S_R4", "IQ4_XS_R8", "IQ4_NL_R4", "IQ2_K_R4", "IQ3_K_R4", "IQ4_K_R4", "IQ5_K_R4",
         "IQ4_KS_R4", "IQ5_KS_R4")  # fmt: skip
DEFAULTS: Mapping[str, str] = MappingProxyType(
    {**{name: name for name in (*_PLAIN, *_ROWS)}, "IQ3_KL": "IQ3_K", "Q6_0": "Q6_0"}
)
"""Every mix, and the type of what no rule treats apart."""
_COARSE_HEAD = ("IQ2_K", "IQ3_K", "IQ2_KS", "IQ3_KS", "IQ2_KL", "IQ2_KT", "IQ3_KT", "IQ1_KT", "IQ3_K_R4", "IQ2_K_R4", "IQ3_XXS_R4",
                "IQ1_S_R4", "IQ1_M_R4", "IQ2_XXS_R4", "IQ2_XS_R4")  # fmt: skip
_MIDDLE = ("IQ3_KL", "IQ4_KS", "IQ4_KSS", "IQ4_KS_R4", "IQ3_S_R4")
_KEPT_HEAD = ("Q8_0_R8", "IQ6_K", "Q6_K_R4")
_EMBEDDINGS = {
    **dict.fromkeys(("IQ1_S_R4", "IQ1_M_R4", "IQ2_XXS_R4", "IQ2_XS_R4"), "Q2_K"),
    "IQ3_KT": "IQ3_S",
    "IQ3_XXS_R4": "IQ3_K",
}
_OUT = ("IQ4_K", "IQ4_KSS", "IQ4_KS", "IQ4_KS_R4", "IQ5_KS", "IQ5_KS_R4", "IQ2_K", "IQ3_K", "IQ3_KL", "Q4_K_R4", "IQ4_NL_R4", "IQ4_XS_R8",
        "Q3_K_R4", "IQ3_KT", "IQ3_KS", "Q2_K_R4", "IQ4_K_R4", "IQ3_K_R4", "IQ2_K_R4", "IQ3_XXS_R4", "IQ3_S_R4")  # fmt: skip
FALLBACKS: Mapping[str, str] = MappingProxyType({
    **dict.fromkeys(("IQ2_KS", "IQ2_K", "IQ2_KL", "IQ3_KS", "IQ3_K", "IQ4_KSS", "IQ4_KS"), "IQ4_NL"),
    **dict.fromkeys(("IQ1_KT", "IQ2_KT", "IQ3_KT", "IQ4_KT"), "IQ4_NL"),
    "IQ4_K": "Q5_0", "IQ5_KS": "Q5_0", "IQ5_K": "Q6_0", "IQ6_K": "Q8_0",
})  # fmt: skip
"""Beside those of llama.cpp; this fork's for Q5_K is Q6_0."""
_EIGHT = 8


def types(mix: str, shape: Shape, matrices: Iterable[Matrix]) -> Iterator[tuple[Matrix, str]]:
    """Yield each matrix with the type that the mix called `mix` gives it."""
    downs = 0
    for one in matrices:
        yield one, _type(mix, shape, one, downs)
        downs += one.name.startswith("ffn_down")


def _type(mix: str, shape: Shape, one: Matrix, downs: int) -> str:
    default = DEFAULTS[mix]
    if one.name == HEAD or (shape.tied and one.name == EMBEDDING):
        return _head(mix, default, one.row, shape.tied)
    if one.name == EMBEDDING:
        return _EMBEDDINGS.get(mix, default)
    if mix in ("IQ1_S_R4", "IQ1_M_R4", "IQ2_KT"):
        return _smallest(mix, default, shape, one)
    if mix in ("IQ2_KS", "IQ2_XXS_R4", "IQ2_XS_R4"):
        return _small(default, shape, one, downs)
    if one.name == "attn_v" or one.name.startswith("attn_k"):
        return "Q8_0"
    if one.name == "attn_output":
        return "Q5_K" if mix in _OUT else "IQ4_KS" if mix == "IQ2_KL" else default
    eighth, layer = shape.num_layers // 8, one.layer or 0
    if one.name.startswith("ffn"):
        if mix == "IQ3_KL":
            more = layer < eighth or layer >= 7 * shape.num_layers // 8 or (layer - eighth) % 3 == 2
            return "IQ4_KS" if more else default
        if one.name.startswith("ffn_down") and layer < eighth:
            return {"Q2_K_R4": "Q4_K_R4", "Q4_K_R4": "Q5_K", "Q4_0_R8": "IQ4_NL_R4"}.get(mix, default)
    return default


def _head(mix: str, default: str, row: int, tied: bool) -> str:
    """Return the type of the output matrix."""
    if row % 256:
        return "Q8_0"
    if mix in _COARSE_HEAD:
        return "IQ4_K" if tied else "Q5_K"
    if mix in _MIDDLE and tied:
        return "IQ5_K"
    return default if mix in _KEPT_HEAD else "Q6_K"


def _small(default: str, shape: Shape, one: Matrix, downs: int) -> str:
    """Return the type in mixes of two bits."""
    if one.name == "attn_v":
        return "IQ4_K"
    if shape.num_experts >= _EIGHT and one.name.startswith(("attn_k", "attn_q")):
        return "Q4_K"
    if one.name.startswith("ffn_down"):
        return "Q2_K" if downs < shape.num_layers // 8 else default
    return "Q5_K" if one.name == "attn_output" else default


def _smallest(mix: str, default: str, shape: Shape, one: Matrix) -> str:
    """Return the type in mixes of less, or of two bits by trellis."""
    trellis = mix == "IQ2_KT"
    if one.name == "attn_v" or one.name.endswith("_shexp"):
        first = one.layer == 0 and one.name.startswith("ffn") and shape.num_experts >= _EIGHT
        return "IQ3_K" if first else "IQ4_K"
    if shape.num_experts >= _EIGHT:
        if one.name.startswith(("attn_k", "attn_q")):
            return "Q4_K"
        if one.layer == 0 and one.name.startswith("ffn"):
            return "IQ3_K"
    if one.name.startswith("ffn_down") and (one.layer or 0) < shape.num_layers // 8:
        return "IQ3_K" if trellis else "Q2_K"
    return "Q5_K" if one.name == "attn_output" else default
