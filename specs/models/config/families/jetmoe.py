"""JetMoE: the queries and outputs of attention are experts too, chosen by a router of their own.

Experts of attention stay on the device: a plan moves those of MLPs only. Ignored: routers' losses.
"""

from __future__ import annotations

from ... import AttentionSpec
from ..family import Draft, Family
from ..keys import Keys


def _prepare(keys: Keys) -> None:
    kv_heads, chosen = keys.need("num_key_value_heads"), keys.uniform("num_experts_per_tok", "moe_top_k")
    keys.put("num_attention_heads", kv_heads * (chosen or 1))


def _finish(keys: Keys, draft: Draft) -> None:
    hidden, experts, chosen = draft.fields["hidden_size"], draft.fields["num_experts"], draft.fields["top_k"]
    kv_heads, wide = keys.need("num_key_value_heads"), keys.need("kv_channels")
    each = 2 * hidden * kv_heads * wide
    keys.known("num_layers", "head_dim")
    draft.fields["attention"] = AttentionSpec(
        kind="mha", num_heads=kv_heads * chosen, num_kv_heads=kv_heads, head_dim=wide, v_head_dim=wide,
        projections=experts * each + hidden * 2 * kv_heads * wide, idle_parameters=max(0, experts - chosen) * each,
        vector_parameters=experts * hidden + 2 * hidden,
    )  # fmt: skip
    draft.remarks.append("experts of attention are counted with attention, which stays on the device")


FAMILIES = {
    "jetmoe": Family(
        defaults={"kv_channels": 128, "num_key_value_heads": 16, "tie_word_embeddings": True, "num_experts_per_tok": 2},
        prepare=_prepare, finish=_finish,
    ),
}  # fmt: skip
