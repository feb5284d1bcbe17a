"""Families whose layers are the usual ones, but for norms, gates and biases.

Ignored: how positions rotate, groups of experts, vision towers.
"""

from __future__ import annotations

from ..family import Draft, Family
from ..keys import Keys


def _beam(keys: Keys, draft: Draft) -> None:
    draft.vary(draft.all_layers, vector_parameters=draft.fields["attention"].num_heads)  # the gate's bias


def _dots3(keys: Keys, draft: Draft) -> None:
    draft.vary(draft.all_layers, vector_parameters=draft.fields["attention"].qk_rope_head_dim)  # a norm of rotated keys


FAMILIES = {
    "afmoe": Family(
        qk_norm="head", num_norms=4, gate="full", router_bias=True, harmless=("global_attn_every_n_layers",)
    ),
    "aria": Family(),
    "beam": Family(qk_norm="head", num_norms=4, gate="full", finish=_beam),
    "cohere2_moe": Family(num_norms=1, harmless=("sliding_window_pattern", "prefix_dense_sliding_window_pattern")),
    "dots1": Family(qk_norm="head"),
    "dots3_note": Family(gate="head", finish=_dots3),
    "exaone_moe": Family(qk_norm="head", harmless=("sliding_window_pattern",)),
    "flint": Family(qk_norm="head", sinks=True),
    "kolibri1": Family(qk_norm="head", num_norms=4),
    "laguna": Family(qk_norm="head", gate="head", router_bias=True),
    "mellum": Family(qk_norm="head"),
    "solar_open": Family(),
}
