"""Families of models: one file for each line of descent, which holds a table of its members; this is the register.

A new family is an entry in `plain`, or a file with `FAMILIES = {model_type: Family(...)}` and its name in `_FILES`; families with
recurrent or convolved layers are in `hybrid`.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..family import Family
from . import (
    deepseek,
    encoder_decoders,
    gemma,
    glm,
    hunyuan,
    hybrid,
    inkling,
    jetmoe,
    longcat,
    mimo,
    mistral,
    muse_spark,
    others,
    plain,
    qwen,
    smallthinker,
    step,
)

_FILES = (
    deepseek, encoder_decoders, gemma, glm, hunyuan, hybrid, inkling, jetmoe, longcat, mimo, mistral, muse_spark,
    others, plain, qwen, smallthinker, step,
)  # fmt: skip

FAMILIES: Mapping[str, Family] = {name: family for file in _FILES for name, family in file.FAMILIES.items()}
"""Every family whose sizes are known, by `model_type`. Others are read by the usual keys, like mixtral."""

REFUSED: Mapping[str, str] = {
    "arctic": "a dense stack runs beside its experts, which no key describes",
    "doge": "its experts are pairs of vectors picked by product keys",
    "zamba": "its attention layers share weights with each other",
    "zamba2": "its attention layers share weights with each other",
    "ernie4_5_vl_moe": "experts for text and for images differ in size (moe_intermediate_size has two values)",
    "qwen3_omni_moe_talker": "it speaks rather than writes",
}
"""Families whose layers no `ModelSpec` describes, and why."""
