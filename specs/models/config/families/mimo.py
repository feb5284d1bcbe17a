"""MiMo (Xiaomi): windows with more key–value heads and sinks in five layers of six.

Ignored: scales of values, draft layers.
"""

from __future__ import annotations

from ..family import Family
from ..keys import Keys


def _prepare(keys: Keys) -> None:
    layers = keys.number_of_layers("num_hidden_layers")
    pattern = keys.per_layer("hybrid_layer_pattern", num_layers=layers, what=int)
    keys.known("hybrid_block_size")
    if keys.has("layer_types"):
        return
    if pattern is None:
        pattern = [int(layer > 0 and (layer + 1) % 6 != 0) for layer in range(layers)]
    keys.put("layer_types", ["sliding_attention" if mark else "full_attention" for mark in pattern])


FAMILIES = {
    "mimo_v2_flash": Family(
        defaults={"swa_num_key_value_heads": 8, "add_swa_attention_sink_bias": True, "sliding_window": 128},
        prepare=_prepare,
    ),
}
