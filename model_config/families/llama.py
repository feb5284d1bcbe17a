"""Llama 4 (Meta): chunked attention in three layers of four, one shared expert.

Ignored: the vision tower, scaling of attention by temperature.
"""

from ..family import Family

FAMILIES = {
    "llama4": Family(
        defaults={"interleave_moe_layer_step": 1, "num_shared_experts": 1, "no_rope_layer_interval": 4},
        harmless=("floor_scale", "attn_scale", "no_rope_layers"),
    ),
}
