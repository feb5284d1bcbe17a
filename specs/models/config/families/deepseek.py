"""DeepSeek V2, V3, V3.2, V4 and those that took over their layers (Kimi-K2, A.X-K1, Unlimited-OCR …): latent attention, indexes,
compression.

V4: each layer sees a window, and beyond it entries that stand for 4 tokens (chosen by an index) or for 128 (all read); residual
streams are mixed by small matrices. Sizes as transformers' DeepseekV4 has them. Ignored: draft layers, hash tables of V4's first routers.
"""

from __future__ import annotations

import dataclasses

from ... import AttentionSpec
from ..family import Draft, Family
from ..keys import Keys

_SLIDING, _SPARSE, _HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
_BY_RATIO = {0: _SLIDING, 4: _SPARSE, 128: _HEAVY}


def add_hyper_connections(keys: Keys, draft: Draft, *, rows: int, head: bool) -> None:
    """Count the matrices that mix residual streams (`hc_mult`): two a layer, `rows` values a stream, and one at the end."""
    streams, hidden = keys.need("hc_mult"), draft.fields["hidden_size"]
    scales = 3 if rows > 2 * streams else 2
    draft.vary(draft.all_layers, vector_parameters=2 * (rows * streams * hidden + rows + scales))
    if head:
        draft.fields["other_parameters"] = streams * streams * hidden + streams + 1


# What the reference code beside the published weights calls things (inference/config.json).
_REFERENCE_NAMES = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "moe_inter_dim": "moe_intermediate_size",
    "n_activated_experts": "num_experts_per_tok", "rope_head_dim": "qk_rope_head_dim", "window_size": "sliding_window",
    "n_hash_layers": "num_hash_layers",
}  # fmt: skip


def _kinds(keys: Keys, num_layers: int) -> list[str]:
    """Return what each layer's attention is, from any of the published spellings."""
    words = keys.per_layer("layer_types", num_layers=num_layers, what=str)
    ratios = keys.per_layer("compress_ratios", num_layers=num_layers, what=int)
    if words is None and ratios is not None:
        unknown = set(ratios) - set(_BY_RATIO)
        if unknown:
            raise keys.refusal("compress_ratios", sorted(unknown), "ratios that are not known", "use 0, 4 and 128")
        words = [_BY_RATIO[ratio] for ratio in ratios]
    if words is None:  # transformers' default
        words = [_SPARSE if layer >= 2 and layer % 2 else _HEAVY for layer in range(num_layers)]
    if unknown_words := set(words) - {_SLIDING, _SPARSE, _HEAVY}:
        raise keys.refusal(
            "layer_types", sorted(unknown_words), "kinds of layers that are not known", "choose another model"
        )
    return words


def _v4_prepare(keys: Keys) -> None:
    """All layers have a window: the usual reader must not take kinds of compression for kinds of attention."""
    for own, usual in _REFERENCE_NAMES.items():
        if keys.has(own) and not keys.has(usual):
            keys.put(usual, keys.value(own))
    layers = keys.number_of_layers("num_hidden_layers")
    keys.put("_kinds", _kinds(keys, layers))
    keys.put("layer_types", [_SLIDING] * layers)


def _v4(keys: Keys, draft: Draft) -> None:
    hidden, heads, wide = draft.fields["hidden_size"], keys.need("num_attention_heads"), keys.need("head_dim")
    rank, groups, out = keys.need("q_lora_rank"), keys.need("o_groups"), keys.need("o_lora_rank")
    index_heads, index_wide, most = keys.need("index_n_heads"), keys.need("index_head_dim"), keys.need("index_topk")
    rates = keys.table("compress_rates")
    keys.known(
        "num_hash_layers", "qk_rope_head_dim", "attention_bias", "mlp_bias", "window_size", "compress_rope_theta"
    )
    few = keys.size("compress_rate_csa") or rates.get(_SPARSE, 4)
    many = keys.size("compress_rate_hca") or rates.get(_HEAVY, 128)
    for name, rate in ((_SPARSE, few), (_HEAVY, many)):
        if not isinstance(rate, int) or isinstance(rate, bool) or rate < 1:
            raise keys.refusal("compress_rates", rate, f"{name} is not a number above zero")
    base = AttentionSpec(
        kind="gqa", num_heads=heads, num_kv_heads=1, head_dim=wide, v_head_dim=wide, key_is_value=True,
        projections=rank * (hidden + heads * wide) + hidden * wide + out * heads * wide + groups * out * hidden,
        vector_parameters=heads + rank + wide,
    )  # fmt: skip
    index = 4 * hidden * index_wide + index_heads * (index_wide * rank + hidden)
    sparse = dataclasses.replace(
        base, compressed=True, tokens_per_entry=few, tokens_per_index=few, index_values=index_wide, selected=most,
        extra_matrix_parameters=4 * hidden * wide + index,
        vector_parameters=base.vector_parameters + few * 2 * wide + wide + few * 2 * index_wide + index_wide,
    )  # fmt: skip
    heavy = dataclasses.replace(
        base, compressed=True, tokens_per_entry=many, extra_matrix_parameters=2 * hidden * wide,
        vector_parameters=base.vector_parameters + many * wide + wide,
    )  # fmt: skip
    draft.fields["attention"] = base
    for layer, kind in enumerate(keys.words("_kinds") or ()):
        if kind != _SLIDING:
            draft.vary((layer,), attention=sparse if kind == _SPARSE else heavy)
    streams = keys.need("hc_mult")
    add_hyper_connections(keys, draft, rows=2 * streams + streams * streams, head=True)


def _ax_k1(keys: Keys, draft: Draft) -> None:
    draft.vary(draft.fields["moe_layers"], vector_parameters=draft.fields["hidden_size"])  # a norm after the experts


def _ax_k2(keys: Keys, draft: Draft) -> None:
    """Queries yield a gate; norms before experts pass through a narrow layer."""
    hidden, rank = draft.fields["hidden_size"], keys.need("gated_norm_rank")
    attention: AttentionSpec = draft.fields["attention"]
    gate = attention.num_heads * attention.v_head_dim * (attention.q_lora_rank or hidden)
    # Through the doubled rank (q_gate_proj reads the latent twice as wide): both halves.
    query = (attention.q_lora_rank or hidden) * attention.num_heads * attention.head_dim
    draft.vary(draft.all_layers, matrix_parameters=2 * gate + query, vector_parameters=2 * hidden * rank)
    draft.vary(draft.fields["moe_layers"], vector_parameters=2 * hidden * rank)


_REFERENCE = "reference_sliding_attention"


def _unlimited_ocr_prepare(keys: Keys) -> None:
    """Layers whose window slides over what was generated only: the whole prompt stays in reach, so they count as full attention."""
    layers = keys.number_of_layers("num_hidden_layers")
    words = keys.per_layer("layer_types", num_layers=layers, what=str) or [_REFERENCE] * layers
    if unknown := set(words) - {_REFERENCE, "full_attention"}:
        raise keys.refusal("layer_types", sorted(unknown), "kinds of layers that are not known", "choose another model")
    keys.put("layer_types", ["full_attention"] * layers)
    keys.known("sliding_window")


def _unlimited_ocr(keys: Keys, draft: Draft) -> None:
    window = keys.size("sliding_window")
    draft.remarks.append(
        f"keys and values of all tokens are counted; the model drops those of replies beyond the last {window} tokens"
    )


_V2 = {"num_experts_per_tok": 6, "first_k_dense_replace": 0}
_V3 = {"first_k_dense_replace": 3}
FAMILIES = {
    "deepseek": Family(),
    "deepseek_v2": Family(defaults=_V2),
    "deepseek_vl_v2": Family(defaults=_V2),
    "deepseek_v3": Family(),
    "deepseek_v32": Family(),
    "kimi_k2": Family(),
    "kimi_k25": Family(),
    "deepseek_v4": Family(
        defaults={
            "hc_mult": 4, "o_groups": 8, "o_lora_rank": 1024, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512,
            "sliding_window": 128, "num_key_value_heads": 1,
        },
        harmless=("dspark_block_size", "dspark_target_layer_ids", "dspark_markov_rank", "n_mtp_layers"),
        prepare=_v4_prepare, finish=_v4,
    ),
    "unlimited_ocr": Family(defaults={"first_k_dense_replace": 1, "sliding_window": 128}, prepare=_unlimited_ocr_prepare,
                            finish=_unlimited_ocr),
    "axk1": Family(finish=_ax_k1),
    "axk2": Family(finish=_ax_k2),
}  # fmt: skip
