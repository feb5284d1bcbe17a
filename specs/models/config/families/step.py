"""Step 3.5 and 3.7 (StepFun): a gate for each head, more heads in layers with a window.

Ignored: draft layers, clamps of activations, the vision tower.
"""

from __future__ import annotations

from ..family import Family
from ..keys import Keys

_OTHER_HEADS = {
    "num_attention_heads": "swa_num_attention_heads",
    "num_attention_groups": "swa_num_key_value_heads",
    "head_dim": "swa_head_dim",
}


def _prepare(keys: Keys) -> None:
    """Layers with experts come as text, heads of windows in a table of their own."""
    chosen, other = keys.value("moe_layers_enum"), keys.table("attention_other_setting")
    if isinstance(chosen, str):
        parts = [part.strip() for part in chosen.split(",")]
        if not all(part.isdigit() and len(part) < 6 for part in parts):
            raise keys.refusal("moe_layers_enum", chosen, "not layers with commas between them")
        keys.put("moe_layers", [int(part) for part in parts])
    for own, usual in _OTHER_HEADS.items():
        if own in other:
            keys.put(usual, other[own])


FAMILIES = {
    "step3p5": Family(
        qk_norm="head", gate="head", harmless=("swiglu_limits", "swiglu_limits_shared"), prepare=_prepare
    ),
}
