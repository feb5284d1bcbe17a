"""Qwen 3-Next, 3.5, 3.6 and 3.8-Next (Alibaba): delta nets in three layers of four, gated attention in the fourth.

3.8-Next (`qwen4_exp`) adds an index of averaged keys, four residual streams with learned mixing, and tables of n-grams whose
rows a few layers add. Sizes as transformers' Qwen4Exp has them. Ignored: draft layers, vision towers, hashes of n-grams.
"""

from __future__ import annotations

import dataclasses
import math

from ......base.units import GIGA
from .... import AttentionSpec
from ...family import Draft, Family
from ...keys import Keys

# More heads of n-grams than any model has; the search for prime numbers stays short.
_MOST_HEADS = 256
_EVERY_FOURTH = {"full_attention_interval": 4}


def _exp(keys: Keys, draft: Draft) -> None:
    hidden, streams, rank = draft.fields["hidden_size"], keys.need("hc_count"), keys.need("hc_lowrank")
    wide = streams * hidden
    each = 2 * wide * rank + wide * streams
    draft.vary(draft.all_layers, matrix_parameters=2 * each, vector_parameters=2 * wide)
    draft.fields |= {"other_parameters": 2 * wide * rank + wide, "num_final_norms": 0}
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
    """Count the tables of n-grams: each head's has as many rows as a prime number, the next ones from the base on."""
    hidden, layers = draft.fields["hidden_size"], keys.integers("ple_layer_ids") or []
    embed, taps = keys.size("ple_embed_dim") or hidden, keys.size("ple_conv_kernel_size") or 4
    longest, heads_each = keys.size("ngram_size") or 3, keys.size("heads_per_ngram") or 8
    base, multiple = (
        keys.size("ngram_vocab_size_base") or 20_000_000,
        keys.size("make_ngram_vocab_size_divisible_by") or 128,
    )
    keys.known("split_ngram_parts", "number_of_conv_states")
    heads = (longest - 1) * heads_each
    chosen = sorted({layer - 1 for layer in layers})
    if any(layer not in draft.all_layers for layer in chosen):
        raise keys.refusal("ple_layer_ids", layers, "not layers, counted from one")
    if not chosen:
        return
    if heads == 0 or len(chosen) * heads > _MOST_HEADS or embed % heads:
        raise keys.refusal(
            "heads_per_ngram", heads_each, f"{heads} heads of n-grams do not divide ple_embed_dim = {embed}"
        )
    primes, held = _primes_from(base, len(chosen) * heads), 0
    for number, layer in enumerate(chosen):
        rows = -(-sum(primes[number * heads : (number + 1) * heads]) // multiple) * multiple
        table = rows * (embed // heads)
        held += table
        draft.vary(
            (layer,),
            matrix_parameters=embed * (wide + hidden),
            vector_parameters=wide * (3 + taps),
            table_parameters=table,
        )
    draft.remarks.append(
        f"tables of n-grams ({held / GIGA:.1f} billion parameters) are counted; a token reads a few rows"
    )


def _primes_from(least: int, count: int) -> list[int]:
    """Return the first `count` primes that are not below `least`."""
    found: list[int] = []
    value = max(least, 2)
    while len(found) < count:
        if value == 2 or (value % 2 and all(value % divisor for divisor in range(3, math.isqrt(value) + 1, 2))):
            found.append(value)
        value += 1
    return found


FAMILIES = {
    "qwen3_next": Family(defaults=_EVERY_FOURTH, qk_norm="head", gate="query", shared_gate=True),
    "qwen3_5_moe": Family(defaults=_EVERY_FOURTH, qk_norm="head", gate="query", shared_gate=True),
    "qwen4_exp": Family(
        defaults=_EVERY_FOURTH | {"hc_count": 4, "hc_lowrank": 320}, qk_norm="head", gate="query", shared_gate=True, num_norms=0,
        finish=_exp,
    ),
}  # fmt: skip
