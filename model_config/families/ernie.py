"""ERNIE 4.5 (Baidu).

Ignored: the capacity of an expert, draft layers.
"""

from ..family import Family

FAMILIES = {
    "ernie4_5_moe": Family(
        defaults={"tie_word_embeddings": True, "moe_layer_start_index": 1, "moe_num_shared_experts": 2},
        harmless=("moe_norm_min", "compression_ratio", "moe_capacity"), router_bias=True,
    ),
}  # fmt: skip
