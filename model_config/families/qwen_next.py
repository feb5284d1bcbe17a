"""Qwen 3-Next, 3.5, 3.6 and 3.8-Next (Alibaba): delta nets in three layers of four, gated attention in the fourth.

3.8-Next (`qwen4_exp`) adds an index of averaged keys, four residual streams with learned mixing, and tables of n-grams whose
rows a few layers add. Sizes as transformers' Qwen4Exp has them.
"""

from __future__ import annotations

import dataclasses

from ...specs import AttentionSpec
from ..family import Draft, Family
from ..keys import Keys

_EVERY_FOURTH = {"full_attention_interval": 4}


def _exp(keys: Keys, draft: Draft) -> None:
    hidden, streams, rank = draft.fields["hidden_size"], keys.need("hc_count"), keys.need("hc_lowrank")
    wide = streams * hidden
    each = 2 * wide * rank + wide * streams
    draft.vary(draft.all_layers, matrix_parameters=2 * each, vector_parameters=2 * wide)
    draft.fields["other_parameters"] = 2 * wide * rank + wide
    heads, key_heads, dim = keys.size("indexer_n_heads"), keys.size("indexer_kv_heads"), keys.size("indexer_head_dim")
    budget, ratio = keys.size("indexer_budget"), keys.size("indexer_compress_ratio")
    if heads and key_heads and dim and budget and ratio:
        attention: AttentionSpec = draft.fields["attention"]
        draft.fields["attention"] = dataclasses.replace(
            attention, extra_matrix_parameters=hidden * dim * (heads + key_heads), selected=budget, index_values=key_heads * dim,
            tokens_per_index=ratio, vector_parameters=attention.vector_parameters + 2 * dim,
        )  # fmt: skip
    _tables(keys, draft, wide)


def _tables(keys: Keys, draft: Draft, wide: int) -> None:
    """Count the tables of n-grams: for each head a prime number of rows just above the base."""
    hidden, layers = draft.fields["hidden_size"], keys.integers("ple_layer_ids") or []
    embed, taps = keys.size("ple_embed_dim") or hidden, keys.size("ple_conv_kernel_size") or 4
    longest, heads_each = keys.size("ngram_size") or 3, keys.size("heads_per_ngram") or 8
    rows = keys.size("ngram_vocab_size_base") or 20_000_000
    keys.known("make_ngram_vocab_size_divisible_by", "split_ngram_parts", "number_of_conv_states")
    heads = (longest - 1) * heads_each
    chosen = [layer - 1 for layer in layers]
    if any(layer not in draft.all_layers for layer in chosen) or (chosen and (heads == 0 or embed % heads)):
        raise keys.refusal(
            "ple_layer_ids", layers, "not layers counted from one, or heads that do not divide ple_embed_dim"
        )
    draft.vary(
        chosen,
        matrix_parameters=embed * (wide + hidden),
        vector_parameters=wide * (3 + taps),
        table_parameters=rows * embed,
    )
    if chosen:
        draft.remarks.append(
            f"tables of n-grams ({len(chosen) * rows * embed / 1e9:.1f} billion parameters) are counted; a token reads a few rows"
        )


FAMILIES = {
    "qwen3_next": Family(defaults=_EVERY_FOURTH, qk_norm="head", gate="query", shared_gate=True),
    "qwen3_5_moe": Family(defaults=_EVERY_FOURTH, qk_norm="head", gate="query", shared_gate=True),
    "qwen4_exp": Family(
        defaults=_EVERY_FOURTH | {"hc_count": 4, "hc_lowrank": 320}, qk_norm="head", gate="query", shared_gate=True, num_norms=0,
        finish=_exp,
    ),
}  # fmt: skip
