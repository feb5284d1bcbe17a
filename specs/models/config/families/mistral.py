"""Mistral: Mixtral, Mistral 4 (latent attention), Large 4 (indexes; layers that share keys and values).

Ignored: vision towers, scaling of attention with length.
"""

from __future__ import annotations

import dataclasses

from ... import AttentionSpec
from ..family import Draft, Family
from ..keys import Keys


def _large(keys: Keys, draft: Draft) -> None:
    """Layers that read another layer's keys and values keep none."""
    hidden, layers = draft.fields["hidden_size"], draft.fields["num_layers"]
    sources = keys.per_layer("kv_source_layers", num_layers=layers, what=int)
    index_heads = keys.size("index_n_heads") or 0
    extra = 2 * hidden + 2 * index_heads + 2 * draft.fields["attention"].num_heads
    draft.vary(draft.all_layers, vector_parameters=extra)
    rotated = keys.per_layer("no_rope_layers", num_layers=layers, what=int)
    for layer in [layer for layer, mark in enumerate(rotated or ()) if not mark]:  # all of a head is without positions
        attention: AttentionSpec = draft.differ.get(layer, {}).get("attention", draft.fields["attention"])
        plain = dataclasses.replace(attention, qk_rope_head_dim=0, qk_nope_head_dim=attention.head_dim)
        draft.vary((layer,), attention=plain)
    draft.vary([layer for layer, source in enumerate(sources or ()) if source != layer], keeps_cache=False)


FAMILIES = {"mixtral": Family(window_everywhere=True), "mistral4": Family(), "mistral_large4": Family(finish=_large)}
