"""Attention and states from keys: projections, biases, norms, gates and indexers of the layers, and of layers that differ.

Modelled: multi-head, grouped and latent attention; heads and widths that differ in layers with a window, by keys of their own or by
a table of layers; indexes of sparse attention; gated delta nets, Kimi's delta attention, lightning attention, state spaces, short
convolutions. Ignored: which of these a kernel fuses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from .. import AttentionSpec, RecurrentSpec
from .family import Draft, Family
from .keys import Keys
from .layers import INDEXED, LayerKinds

_KV_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "kv_n_heads",
    "n_kv_heads",
    "num_attention_groups",
    "num_query_groups",
)
_SWA = {
    "swa_num_attention_heads": "num_attention_heads", "num_sliding_attention_heads": "num_attention_heads",
    "swa_num_key_value_heads": "num_key_value_heads", "swa_head_dim": "head_dim", "swa_v_head_dim": "v_head_dim",
}  # fmt: skip


def draft_attention(keys: Keys, family: Family, draft: Draft, kinds: LayerKinds) -> None:
    """Set the model's attention, and that of layers whose heads or widths differ."""
    attention = _attention(keys, family, draft)
    draft.fields["attention"] = attention
    swa = {usual: keys.size(own) for own, usual in _SWA.items() if keys.has(own)}
    keys.known(*_SWA)
    sliding_sinks = keys.flag("add_swa_attention_sink_bias") and not keys.flag("add_full_attention_sink_bias")
    if swa or sliding_sinks:
        with keys.over(swa):
            other = _attention(keys, family, draft)
        if sliding_sinks:
            other = dataclasses.replace(other, vector_parameters=other.vector_parameters + other.num_heads)
        if other != attention:
            draft.vary(kinds.sliding, attention=other)
    _by_layer(keys, family, draft, attention)
    index = _index(keys, draft, attention)
    if index is not None:
        _add_index(keys, draft, kinds, attention, index)


def _by_layer(keys: Keys, family: Family, draft: Draft, attention: AttentionSpec) -> None:
    """Set the attention of layers for which a table or a list gives other heads and widths."""
    given = keys.table("per_layer_config")
    changes: dict[int, Mapping[str, Any]] = {}
    for layer, table in given.items():
        if not str(layer).isdigit() or not isinstance(table, Mapping) or int(layer) not in draft.all_layers:
            raise keys.refusal("per_layer_config", layer, "not a layer with its own keys")
        changes[int(layer)] = table
    heads = keys.per_layer("num_attention_heads_per_layer", num_layers=draft.fields["num_layers"], what=int)
    for at, count in enumerate(heads or ()):
        changes[at] = {**changes.get(at, {}), "num_attention_heads": count}
    for at, table in sorted(changes.items()):
        unknown = set(table) - {
            "num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank",
            "qk_nope_head_dim", "qk_rope_head_dim", "sliding_window", "rope_parameters", "attention_bias",
        }  # fmt: skip
        if unknown:
            raise keys.refusal("per_layer_config", sorted(unknown), "keys that are not known for single layers")
        with keys.over({key: value for key, value in table.items() if value is not None}):
            other = _attention(keys, family, draft)
        if other != attention:
            draft.vary((at,), attention=other)


def _attention(keys: Keys, family: Family, draft: Draft) -> AttentionSpec:
    """Return the attention that the keys describe."""
    hidden = draft.fields["hidden_size"]
    heads = keys.need("num_attention_heads", "n_heads", "num_heads", "decoder_attention_heads")
    kv_heads = keys.size(*_KV_HEADS) or heads
    if heads % kv_heads:
        raise keys.refusal("num_key_value_heads", kv_heads, f"does not divide the {heads} heads")
    biased = keys.flag("attention_bias") or keys.flag("qkv_bias", "use_qkv_bias") or keys.flag("use_bias")
    with_norms = keys.flag("use_qk_norm", "qk_layernorm")
    head_dim_given, v_given, rank = (
        keys.count("head_dim", "d_kv", "attention_head_dim"),
        keys.size("v_head_dim"),
        keys.size("kv_lora_rank"),
    )
    q_rank, rope, nope = keys.size("q_lora_rank"), keys.count("qk_rope_head_dim"), keys.count("qk_nope_head_dim")
    if rank is not None:
        return _latent(keys, family, hidden, heads, rank, q_rank, rope or 0, nope or 0, v_given or nope or 0)
    head_dim = head_dim_given or hidden // heads
    if head_dim == 0:
        raise keys.refusal("num_attention_heads", heads, f"more heads than the {hidden} hidden values")
    v_dim = v_given or head_dim
    widths = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * v_dim, "o": hidden}
    vectors = sum(widths[part] for part in family.bias) if biased else 0
    if family.qk_norm == "head" or (family.qk_norm == "option" and with_norms):
        vectors += 2 * head_dim
    elif family.qk_norm == "full":
        vectors += widths["q"] + widths["k"]
    return AttentionSpec(
        kind="mha" if kv_heads == heads else "gqa", num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, v_head_dim=v_dim,
        gated=family.gate == "query", vector_parameters=vectors + (heads if family.sinks else 0),
        extra_matrix_parameters=_gate(family, hidden, heads, v_dim),
    )  # fmt: skip


def _latent(
    keys: Keys, family: Family, hidden: int, heads: int, rank: int, q_rank: int | None, rope: int, nope: int, v_dim: int
) -> AttentionSpec:
    """Return latent attention (MLA)."""
    if rope + nope == 0 or v_dim == 0:
        rule = "latent attention without a head width"
        raise keys.refusal("qk_nope_head_dim", nope, rule, "add qk_nope_head_dim and qk_rope_head_dim")
    vectors = rank + (q_rank or 0)  # norms of the latents
    if keys.flag("attention_bias"):
        vectors += (q_rank or 0) + rank + rope + hidden
    return AttentionSpec(
        kind="mla", num_heads=heads, num_kv_heads=heads, head_dim=rope + nope, v_head_dim=v_dim, q_lora_rank=q_rank,
        kv_lora_rank=rank, qk_rope_head_dim=rope, qk_nope_head_dim=nope, vector_parameters=vectors + (heads if family.sinks else 0),
        extra_matrix_parameters=_gate(family, hidden, heads, v_dim),
    )  # fmt: skip


def _gate(family: Family, hidden: int, heads: int, v_dim: int) -> int:
    """Return the weights of an output gate that has a projection of its own."""
    return hidden * {"head": heads, "full": heads * v_dim}.get(family.gate, 0)


def _index(keys: Keys, draft: Draft, attention: AttentionSpec) -> Mapping[str, int] | None:
    """Return the sizes of the index of sparse attention over latents (DeepSeek-V3.2's); None where there is none."""
    most, width, heads = keys.size("index_topk"), keys.size("index_head_dim"), keys.size("index_n_heads")
    if most is None or width is None or heads is None or attention.kind != "mla":
        return None
    hidden = draft.fields["hidden_size"]
    query = (attention.q_lora_rank or hidden) * heads * width
    return {
        "matrices": query + hidden * width + hidden * heads,
        "vectors": 2 * width,
        "values": width,
        "selected": most,
    }


def _add_index(keys: Keys, draft: Draft, kinds: LayerKinds, attention: AttentionSpec, index: Mapping[str, int]) -> None:
    """Set the index of the layers that have one, and of those that read another layer's."""
    owners = keys.per_layer("indexer_types", num_layers=draft.fields["num_layers"], what=str)
    indexed = [
        layer
        for layer in draft.all_layers
        if layer not in kinds.sliding and layer not in kinds.recurrent
        and (not kinds.words or kinds.words[layer] in INDEXED)
    ]  # fmt: skip
    for layer in indexed:
        base = draft.differ.get(layer, {}).get("attention", attention)
        own = owners is None or owners[layer] == "full"
        other = dataclasses.replace(
            base, selected=index["selected"], index_values=index["values"] if own else 0,
            extra_matrix_parameters=base.extra_matrix_parameters + (index["matrices"] if own else 0),
            vector_parameters=base.vector_parameters + (index["vectors"] if own else 0),
        )  # fmt: skip
        draft.vary((layer,), attention=other)
    _promote(draft)


def _promote(draft: Draft) -> None:
    """Make an attention that every layer has the model's, so that no layer differs by it."""
    found = {draft.differ.get(layer, {}).get("attention") for layer in draft.all_layers}
    if len(found) == 1 and None not in found:
        draft.fields["attention"] = found.pop()
        for layer in draft.all_layers:
            draft.differ[layer].pop("attention")


def draft_recurrent(keys: Keys, family: Family, draft: Draft, kinds: LayerKinds) -> RecurrentSpec:
    """Return the mixer of layers that keep a fixed state; raises InputError where its sizes are not given."""
    hidden = draft.fields["hidden_size"]
    if keys.size("linear_num_key_heads") is not None:
        return _delta_net(keys, hidden)
    if family.linear in ("kda", "kda-full"):
        return _delta_attention(keys, hidden, low_rank=family.linear == "kda")
    if family.linear == "lightning":
        attention: AttentionSpec = draft.fields["attention"]
        wide = attention.num_heads * attention.head_dim
        return RecurrentSpec(
            kind="lightning_attention", matrix_parameters=5 * hidden * wide, vector_parameters=wide,
            state_values=wide * attention.head_dim,
        )  # fmt: skip
    if family.linear == "conv":
        taps, biased = keys.need("conv_L_cache"), keys.flag("conv_bias")
        return RecurrentSpec(
            kind="short_convolution", matrix_parameters=4 * hidden * hidden,
            vector_parameters=hidden * taps + (5 * hidden if biased else 0), state_values=hidden * taps,
        )  # fmt: skip
    return _state_space(keys, hidden, kinds)


def _delta_net(keys: Keys, hidden: int) -> RecurrentSpec:
    """Return a gated delta net (Qwen3-Next)."""
    key_heads, value_heads = keys.need("linear_num_key_heads"), keys.size("linear_num_value_heads") or 1
    key_dim, value_dim = keys.size("linear_key_head_dim") or 1, keys.size("linear_value_head_dim") or 1
    taps = keys.size("linear_conv_kernel_dim") or 4
    wide_keys, wide_values = key_heads * key_dim, value_heads * value_dim
    channels = 2 * wide_keys + wide_values
    return RecurrentSpec(
        kind="gated_delta_net",
        matrix_parameters=hidden * (2 * wide_keys + 2 * wide_values + 2 * value_heads) + wide_values * hidden,
        vector_parameters=channels * taps + 2 * value_heads + value_dim,
        state_values=value_heads * key_dim * value_dim + channels * (taps - 1),
        projections=(
            ("attn_gate", hidden, wide_values), ("attn_qkv", hidden, channels), ("ssm_ba", hidden, 2 * value_heads),
            ("ssm_out", wide_values, hidden),
        ),
    )  # fmt: skip


def _delta_attention(keys: Keys, hidden: int, *, low_rank: bool) -> RecurrentSpec:
    """Return Kimi's delta attention: gates for every key, through a narrow layer (low_rank) or in full."""
    heads, width = keys.need("linear_num_heads"), keys.need("linear_head_dim")
    taps = keys.size("linear_conv_kernel_dim", "short_conv_kernel_size") or 4
    wide = heads * width
    gate = width * (hidden + wide) if low_rank else hidden * wide
    return RecurrentSpec(
        kind="kimi_delta_attention", matrix_parameters=4 * hidden * wide + 2 * gate + hidden * heads,
        vector_parameters=3 * wide * taps + wide + heads + width, state_values=heads * width * width + 3 * wide * (taps - 1),
    )  # fmt: skip


def _state_space(keys: Keys, hidden: int, kinds: LayerKinds) -> RecurrentSpec:
    """Return a Mamba layer of either generation."""
    state, taps = keys.size("mamba_d_state", "ssm_state_size"), keys.size("mamba_d_conv", "conv_kernel") or 4
    heads, head_dim = keys.size("mamba_n_heads", "mamba_num_heads"), keys.value("mamba_d_head", "mamba_head_dim")
    groups, expand = keys.size("mamba_n_groups", "n_groups") or 1, keys.size("mamba_expand", "expand") or 2
    biased, in_bias = keys.flag("mamba_conv_bias", "use_conv_bias", default=True), keys.flag("mamba_proj_bias")
    rank = keys.value("mamba_dt_rank")
    if state is None:
        raise keys.refusal(
            "layer_types",
            kinds.words or "(absent)",
            "layers with a fixed state of an unknown kind",
            "choose another model",
        )
    if heads is not None:
        given = isinstance(head_dim, int) and not isinstance(head_dim, bool) and head_dim > 0
        wide = heads * head_dim if given else expand * hidden
        channels = wide + 2 * groups * state
        return RecurrentSpec(
            kind="mamba2", matrix_parameters=hidden * (wide + channels + heads) + wide * hidden,
            vector_parameters=channels * (taps + int(biased)) + 3 * heads + wide
            + (wide + channels + heads + hidden if in_bias else 0),
            state_values=wide * state + channels * (taps - 1),
            projections=(("ssm_in", hidden, wide + channels + heads), ("ssm_out", wide, hidden)),
        )  # fmt: skip
    wide = expand * hidden
    if (
        rank is not None
        and rank != "auto"
        and (not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= 2**31)
    ):
        raise keys.refusal("mamba_dt_rank", rank, "neither auto nor a number above zero")
    rank = math.ceil(hidden / 16) if rank in (None, "auto") else rank
    return RecurrentSpec(
        kind="mamba", matrix_parameters=hidden * 2 * wide + wide * (rank + 2 * state) + rank * wide + wide * hidden,
        vector_parameters=wide * (taps + int(biased)) + wide + wide * state + wide + rank + 2 * state,
        state_values=wide * state + wide * (taps - 1),
    )  # fmt: skip
