"""Inkling: short convolutions around attention, positions from a learned table, shared experts in the router's choice.

Ignored: states of its convolutions, vision and audio towers.
"""

from __future__ import annotations

from ... import AttentionSpec
from ..family import Draft, Family
from ..keys import Keys


def _finish(keys: Keys, draft: Draft) -> None:
    hidden, taps = draft.fields["hidden_size"], keys.size("conv_kernel_size") or 4
    wide, reach = keys.need("d_rel"), keys.need("rel_extent")
    keys.known("local_layer_ids", "number_of_conv_states", "unpadded_vocab_size", "n_layers_per_attn_res_block")
    for layer in draft.all_layers:
        attention: AttentionSpec = draft.differ.get(layer, {}).get("attention", draft.fields["attention"])
        window = draft.fields["sliding_window"] if layer in draft.fields["sliding_layers"] else reach
        convolved = taps * (attention.num_kv_heads * (attention.head_dim + attention.v_head_dim) + 2 * hidden)
        draft.vary(
            (layer,),
            matrix_parameters=hidden * attention.num_heads * wide,
            vector_parameters=convolved + wide * (window or reach),
        )
    sink = draft.fields["num_shared_experts"] * hidden + 1
    draft.vary(draft.fields["moe_layers"], vector_parameters=sink)
    draft.fields["other_parameters"] = hidden


def _second(keys: Keys, draft: Draft) -> None:
    """Besides: gates and sinks from the hidden state."""
    _finish(keys, draft)
    hidden, heads = draft.fields["hidden_size"], draft.fields["attention"].num_heads
    draft.vary(draft.all_layers, matrix_parameters=hidden * heads, vector_parameters=2 * hidden)


FAMILIES = {
    "inkling": Family(qk_norm="head", finish=_finish),
    "inkling_mm_model": Family(qk_norm="head", finish=_finish),
    "inkling2": Family(gate="full", finish=_second),
}
