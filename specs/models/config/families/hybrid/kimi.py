"""Kimi-Linear (Moonshot AI): delta attention in most layers, latent attention in the others.

Ignored: bounds of gates, which layers rotate positions.
"""

from __future__ import annotations

from ...family import Draft, Family
from ...keys import Keys

_TABLE_KEYS = {
    "head_dim",
    "num_heads",
    "short_conv_kernel_size",
    "full_attn_layers",
    "kda_layers",
    "gate_lower_bound",
    "use_full_rank_gate",
}


def _prepare(keys: Keys) -> None:
    """Sizes and lists of layers (counted from one) stand in a table of their own."""
    layers, table = keys.number_of_layers("num_hidden_layers"), keys.table("linear_attn_config")
    for own, usual in (
        ("head_dim", "linear_head_dim"), ("num_heads", "linear_num_heads"), ("short_conv_kernel_size", "linear_conv_kernel_dim")
    ):  # fmt: skip
        if own in table:
            keys.put(usual, table[own])
    unknown = set(table) - _TABLE_KEYS
    if unknown or table.get("use_full_rank_gate"):
        named = sorted(unknown) or "use_full_rank_gate"
        raise keys.refusal(
            "linear_attn_config",
            named,
            "not known of these layers, and it may change their size",
            "choose another model",
        )
    if keys.flag("mla_use_output_gate"):
        raise keys.refusal("mla_use_output_gate", True, "a gate whose size is not known", "choose another model")
    full, linear = table.get("full_attn_layers"), table.get("kda_layers")
    if keys.has("layer_types"):
        return
    if full is None or linear is None:
        keys.put("layer_types", ["full_attention" if n and n % 4 == 0 else "linear_attention" for n in range(layers)])
        return
    if (
        not isinstance(full, list)
        or not isinstance(linear, list)
        or sorted([*full, *linear], key=str) != sorted(range(1, layers + 1), key=str)
    ):
        raise keys.refusal("linear_attn_config", full, f"full_attn_layers and kda_layers are not layers 1 to {layers}")
    keys.put("layer_types", ["full_attention" if n + 1 in full else "linear_attention" for n in range(layers)])


def _finish(keys: Keys, draft: Draft) -> None:
    keys.known("head_dim")


FAMILIES = {
    "kimi_linear": Family(
        defaults={"linear_head_dim": 128, "linear_num_heads": 32, "linear_conv_kernel_dim": 4},
        linear="kda", prepare=_prepare, finish=_finish,
    ),
}  # fmt: skip
