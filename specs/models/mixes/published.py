"""Which files of a model people find published for llama.cpp, by the names of their weight formats.

Modelled: families that llama.cpp has an architecture for (ggml-org/llama.cpp: src/llama-arch.cpp, September 2026); names that quantisers
publish of nearly every model; that nothing is stored at more bits than the checkpoint has; that models whose rows are no whole blocks of
256 have no dynamic mixes of an average size, and gpt-oss, trained in MXFP4, has only that. Ignored: files that one person made.
"""

from __future__ import annotations

from ..model import ModelSpec
from ..weights import weight_format
from .names import mix
from .stored import TRAINED_SMALL

FAMILIES = frozenset({
    "afmoe", "bailing_moe", "bailing_moe_v2", "cohere2_moe", "dbrx", "deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32",
    "deepseek_v4", "dots1", "ernie4_5_moe", "exaone_moe", "gemma4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss",
    "granitemoe", "hunyuan_v1_moe", "kimi_k2", "kimi_linear", "lfm2_moe", "llama4", "mimo_v2_flash", "minimax_m2", "mixtral",
    "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe", "qwen3_5_moe", "qwen4_exp", "step3p5",
})  # fmt: skip
"""Families of models, by `model_type`, that llama.cpp runs."""
NAMES = (
    "Q8_0", "Q6_K", "Q5_K_M", "UD-Q4_K_XL", "Q4_K_M", "IQ4_XS", "UD-Q3_K_XL", "Q3_K_M", "UD-IQ3_XXS", "UD-Q2_K_XL", "Q2_K", "UD-IQ2_M",
    "UD-IQ1_S",
)  # fmt: skip
"""The largest first."""
_BLOCK = 256
_ONLY_AS_TRAINED = ("gpt_oss",)
_BEFORE_DYNAMIC = ("dbrx", "deepseek", "deepseek_v2", "mixtral", "olmoe", "phimoe", "qwen2_moe")
"""Families older than dynamic mixes (February 2025)."""
_ABOVE = 1.1
"""A file of a checkpoint of four bits is not published at more than a tenth above that."""


def file_as_trained(model: ModelSpec) -> str | None:
    """Return the name of the file that keeps experts as a checkpoint that was trained in few bits has them; None for other checkpoints."""
    return TRAINED_SMALL.get(model.native_bits)


def published_files(model: ModelSpec) -> tuple[str, ...]:
    """Return the names of the files that are published of `model`, the largest first; none where llama.cpp does not run it."""
    if model.family not in FAMILIES:
        return ()
    as_trained = file_as_trained(model)
    if model.family in _ONLY_AS_TRAINED and as_trained is not None:
        return (as_trained,)
    most = float(weight_format(model.native_bits).bits_per_weight) * _ABOVE
    whole = model.expert_hidden % _BLOCK == 0 and model.expert_intermediate_size % _BLOCK == 0
    dynamic = whole and model.family not in _BEFORE_DYNAMIC
    found = [] if as_trained is None else [as_trained]
    for name in NAMES:
        recipe = mix(name)
        if recipe is not None and (dynamic or recipe.exact) and float(recipe.experts) <= most:
            found.append(name)
    return tuple(found)
