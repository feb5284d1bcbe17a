"""LFM2 (Liquid AI): short convolutions in most layers.

Ignored: biases that steer experts.
"""

from __future__ import annotations

from ...family import Draft, Family
from ...keys import Keys


def _prepare(keys: Keys) -> None:
    layers, full = keys.number_of_layers("num_hidden_layers"), keys.integers("full_attn_idxs")
    if full is not None and not keys.has("layer_types"):
        keys.put("layer_types", ["full_attention" if layer in full else "conv" for layer in range(layers)])
    if keys.has("tie_embedding"):
        keys.put("tie_word_embeddings", keys.flag("tie_embedding"))


def _finish(keys: Keys, draft: Draft) -> None:
    if not keys.has("layer_types"):
        raise keys.refusal("layer_types", "(absent)", "the key is needed", "add the key")


FAMILIES = {
    "lfm2_moe": Family(
        defaults={"tie_word_embeddings": True, "conv_L_cache": 3, "num_dense_layers": 2},
        qk_norm="head", linear="conv", prepare=_prepare, finish=_finish,
    ),
}  # fmt: skip
