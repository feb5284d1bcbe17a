"""Tiny models with random weights of the families that a model run must get right, as checkpoints in a folder.

Weights are large enough for experts to count: with those that transformers draws, an expert changes a logit by less than the
tolerance, and a run that answered nothing would pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_SHAPE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_MLA: dict[str, Any] = {
    "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
_ROUTED: dict[str, Any] = {
    "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_routed_experts": 8,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "intermediate_size": 96, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 64, "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16,
        "mlp_only_layers": [0],
    },
    "olmoe": {"intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {
        "intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": {**_ROUTED, **_MLA, "q_lora_rank": None, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_ROUTED, **_MLA, "q_lora_rank": 24, "n_group": 4, "topk_group": 2},
    "glm4_moe": {**_ROUTED, "head_dim": 16, "n_group": 1, "topk_group": 1},
}  # fmt: skip
"""The eight, by transformers' names, with groups and biases of routers where the family has them."""


def build(family: str, **changes: Any) -> Any:
    """A model of `family` with random weights, biases of its routers and experts included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **_SHAPE | FAMILIES[family] | changes)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("bias", "e_score_correction_bias")):
                tensor.copy_(0.1 * torch.randn(tensor.shape))
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Write a checkpoint as transformers publishes it, and return its folder."""
    model.save_pretrained(folder, **options)
    return folder
