"""Encoder–decoders: Switch Transformers (T5) and NLLB-MoE.

Ignored: the capacity of an expert, routers' losses.
"""

from __future__ import annotations

from ..family import Family
from ..keys import Keys


def _t5(keys: Keys) -> None:
    """The decoder is as deep as the encoder unless it has a key of its own."""
    if not keys.has("num_decoder_layers") and keys.has("num_layers"):
        keys.put("num_decoder_layers", keys.value("num_layers"))


FAMILIES = {
    "switch_transformers": Family(
        defaults={"num_experts_per_tok": 1, "tie_word_embeddings": True, "relative_attention_num_buckets": 32},
        names={"num_layers": ("num_decoder_layers",)},
        harmless=("num_hidden_layers", "relative_attention_max_distance", "feed_forward_proj", "router_z_loss_coef", "n_positions"),
        gated=False, prepare=_t5,
    ),
    "nllb_moe": Family(
        defaults={"num_experts_per_tok": 2, "tie_word_embeddings": True, "attention_bias": True},
        names={"num_layers": ("decoder_layers",), "width": ("decoder_ffn_dim",)},
        harmless=("num_hidden_layers", "encoder_ffn_dim", "encoder_attention_heads"),
        gated=False, expert_bias=True, dense_bias=True, norm_width=2,
    ),
}  # fmt: skip
