"""What engines go by beside a model's sizes: the class its configuration names, and whether its checkpoints bring draft layers.

Modelled: families of the published checkpoints. Ignored: fine-tunes that name another class; whether a checkpoint at hand had its
draft layers removed.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...specs.models import ModelSpec

ARCHITECTURES: Mapping[str, str] = {
    "deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v32": "DeepseekV32ForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM", "glm4_moe": "Glm4MoeForCausalLM", "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "mimo_v2_flash": "MiMoV2FlashForCausalLM", "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM", "nemotron_h": "NemotronHForCausalLM", "lfm2_moe": "Lfm2MoeForCausalLM",
}  # fmt: skip
# Families whose published checkpoints have multi-token-prediction layers after the last one.
DRAFTED = frozenset(
    {"deepseek_v3", "deepseek_v32", "deepseek_v4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "mimo_v2_flash", "minimax_m2",
     "qwen3_next", "qwen3_5_moe", "qwen4_exp", "nemotron_h", "exaone_moe", "ernie4_5_moe", "longcat_flash", "step3p5"}
)  # fmt: skip


def has_drafts(model: ModelSpec) -> bool:
    """Return whether checkpoints of the model's family have draft layers, which a plan does not know."""
    return model.family in DRAFTED
