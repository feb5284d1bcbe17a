"""SmallThinker: experts chosen before attention, keys with names of their own.

Ignored: which layers rotate positions.
"""

from __future__ import annotations

from ..family import Family
from ..keys import Keys


def _prepare(keys: Keys) -> None:
    layers = keys.number_of_layers("num_hidden_layers")
    windows = keys.per_layer("sliding_window_layout", num_layers=layers, what=int)
    experts = keys.per_layer("moe_layer_layout", num_layers=layers, what=int)
    if windows is not None:
        keys.put("layer_types", ["sliding_attention" if mark else "full_attention" for mark in windows])
    if experts is not None:
        keys.put("mlp_layer_types", ["sparse" if mark else "dense" for mark in experts])


FAMILIES = {
    "smallthinker": Family(
        names={
            "num_experts": ("moe_num_primary_experts",), "top_k": ("moe_num_active_primary_experts",),
            "expert_width": ("moe_ffn_hidden_size",), "width": ("dense_ffn_hidden_size", "intermediate_size"),
        },
        prepare=_prepare,
    ),
}  # fmt: skip
