"""Jamba (AI21): Mamba layers, attention in every eighth, experts in every other.

Ignored: norms inside Mamba are counted with its states, losses are not.
"""

from ..family import Family

FAMILIES = {
    "jamba": Family(
        defaults={"expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 8, "attn_layer_offset": 4},
        linear="mamba",
    ),
}
