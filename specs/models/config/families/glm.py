"""GLM (Z.ai): grouped attention with biases (4.5 to 4.7), latent attention (4.7-Flash), indexes (5), linear layers (5-Next).

Ignored: draft layers, groups of experts, vision towers.
"""

from __future__ import annotations

import dataclasses

from ..family import Draft, Family
from ..keys import Keys
from .deepseek import add_hyper_connections


def _next(keys: Keys, draft: Draft) -> None:
    """Residual streams; an index whose keys are pooled."""
    pool, wide = keys.need("index_kpool"), keys.need("index_head_dim")
    streams = keys.need("hc_mult")
    add_hyper_connections(keys, draft, rows=2 * streams + streams * streams, head=False)
    indexed = [layer for layer in draft.all_layers if layer not in draft.fields["recurrent_layers"]]
    draft.vary(indexed, matrix_parameters=draft.fields["hidden_size"] * wide, vector_parameters=pool * wide)
    for layer in indexed:
        attention = draft.differ[layer].get("attention", draft.fields["attention"])
        draft.vary((layer,), attention=dataclasses.replace(attention, tokens_per_index=pool))


FAMILIES = {
    "glm4_moe": Family(bias="qkv", qk_norm="option"),
    "glm4v_moe": Family(bias="qkv"),
    "glm4_moe_lite": Family(),
    "glm_moe_dsa": Family(harmless=("index_topk_freq", "index_topk_pattern")),
    "glm5_next": Family(linear="kda", finish=_next),
}
