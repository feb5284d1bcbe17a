"""Gemma 4 (Google): windows in most layers, wide heads in the others, experts beside a dense MLP, embeddings for each layer.

Ignored: vision and audio towers, soft caps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ... import AttentionSpec
from ..family import Draft, Family
from ..keys import Keys

_PERIOD = 6
# Around experts: norms before them, after them, and after the dense MLP beside them.
_NORMS, _EXPERT_NORMS = 4, 3


def _prepare(keys: Keys) -> None:
    layers = keys.number_of_layers("num_hidden_layers")
    if not keys.has("layer_types"):
        kinds = [
            "full_attention" if (layer + 1) % _PERIOD == 0 or layer == layers - 1 else "sliding_attention"
            for layer in range(layers)
        ]
        keys.put("layer_types", kinds)
    kinds = keys.per_layer("layer_types", num_layers=layers, what=str) or []
    wide, kv_heads = keys.size("global_head_dim") or 512, keys.size("num_global_key_value_heads")
    if not keys.has("per_layer_config"):
        table: dict[str, Any] = {"head_dim": wide}
        if kv_heads is not None and keys.flag("attention_k_eq_v"):
            table["num_key_value_heads"] = kv_heads
        keys.put(
            "per_layer_config", {str(layer): table for layer, kind in enumerate(kinds) if kind == "full_attention"}
        )


def _finish(keys: Keys, draft: Draft) -> None:
    hidden, layers = draft.fields["hidden_size"], draft.fields["num_layers"]
    if not keys.flag("enable_moe_block"):
        raise keys.refusal("enable_moe_block", False, "no layer has routed experts", "give a Mixture-of-Experts model")
    width = keys.need("intermediate_size")
    draft.fields["dense_intermediate_size"] = width
    draft.vary(
        draft.all_layers, num_dense_mlps=1, vector_parameters=hidden + draft.fields["num_experts"]
    )  # the router's scales
    shared = keys.count("num_kv_shared_layers") or 0
    wider = keys.flag("use_double_wide_mlp")
    for layer in draft.all_layers:
        attention: AttentionSpec = draft.differ[layer].get("attention", draft.fields["attention"])
        keys_own = hidden * attention.num_kv_heads * attention.head_dim
        if layer >= layers - shared:  # reads the keys and values of an earlier layer of its kind
            own = dataclasses.replace(
                attention, projections=attention.matrix_parameters(hidden) - 2 * keys_own,
                vector_parameters=attention.vector_parameters - attention.head_dim,
            )  # fmt: skip
            draft.vary((layer,), attention=own, keeps_cache=False)
            if wider:
                draft.vary((layer,), dense_intermediate_size=2 * width)
        elif keys.flag("attention_k_eq_v") and layer not in draft.fields["sliding_layers"]:
            own = dataclasses.replace(attention, projections=attention.matrix_parameters(hidden) - keys_own)
            draft.vary((layer,), attention=own)
    _per_layer_embeddings(keys, draft)


def _per_layer_embeddings(keys: Keys, draft: Draft) -> None:
    hidden, narrow = draft.fields["hidden_size"], keys.count("hidden_size_per_layer_input")
    rows = keys.size("vocab_size_per_layer_input") or draft.fields["vocab_size"]
    narrow = 256 if narrow is None else narrow
    if narrow:
        draft.vary(
            draft.all_layers,
            matrix_parameters=2 * hidden * narrow,
            vector_parameters=hidden,
            table_parameters=rows * narrow,
        )
        draft.fields["other_parameters"] = draft.fields["num_layers"] * narrow * hidden + narrow


FAMILIES = {
    "gemma4": Family(
        defaults={"tie_word_embeddings": True, "sliding_window": 512},
        names={"num_experts": ("num_experts", "num_local_experts")}, qk_norm="head", num_norms=_NORMS + _EXPERT_NORMS,
        prepare=_prepare, finish=_finish,
    ),
}  # fmt: skip
