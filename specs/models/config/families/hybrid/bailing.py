"""Ling and Ring (inclusionAI): grouped attention (`bailing_moe*`), and hybrids with linear attention in most layers.

Ignored: grouped norms of linear layers, draft layers.
"""

from __future__ import annotations

from ...family import Draft, Family
from ...keys import Keys


def _groups(keys: Keys) -> None:
    """Every last layer of a group has full attention, the others linear; so have the layers after the last whole group."""
    size, layers = keys.size("layer_group_size"), keys.number_of_layers("num_hidden_layers")
    if size is not None and not keys.has("layer_types"):
        whole = layers // size * size
        kinds = ["full_attention" if (n + 1) % size == 0 or n >= whole else "linear_attention" for n in range(layers)]
        keys.put("layer_types", kinds)
    if not keys.has("linear_head_dim") and keys.has("head_dim"):
        keys.put("linear_head_dim", keys.size("head_dim"))
    if not keys.has("linear_num_heads"):
        keys.put("linear_num_heads", keys.need("num_attention_heads"))


def _linear(keys: Keys, draft: Draft) -> None:
    keys.known(
        "group_norm_size", "linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim", "short_conv_kernel_size"
    )


FAMILIES = {
    "bailing_moe": Family(bias="qkv", qk_norm="option"),
    "bailing_moe_v2": Family(bias="qkv", qk_norm="option"),
    "bailing_moe_linear": Family(bias="qkv", qk_norm="option", linear="lightning", prepare=_groups, finish=_linear),
    "bailing_moe_linear_v2": Family(bias="qkv", qk_norm="option", linear="lightning", prepare=_groups, finish=_linear),
    "bailing_hybrid": Family(
        defaults={"layer_group_size": 6, "first_k_dense_replace": 2},
        gate="head",
        linear="kda-full",
        prepare=_groups,
        finish=_linear,
    ),
}
