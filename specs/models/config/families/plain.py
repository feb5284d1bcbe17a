"""Families that a table describes whole: no function of their own.

Ignored: clipping of queries, keys and values (DBRX, OLMoE), jitter of routers and how far positions stretch (Phi), the vision tower and
temperatures of attention (Llama 4), clamps of activations (gpt-oss), the capacity of an expert and draft layers (ERNIE), multipliers of
residuals and logits (Granite); norms inside Mamba are counted with its states.
"""

from ..family import Family

FAMILIES = {
    # DBRX (Databricks): fine-grained experts, sizes in nested tables
    "dbrx": Family(
        # Its `ffn_config` repeats hidden_size with a default that is not the model's (transformers DbrxFFNConfig).
        names={"hidden": ("d_model",), "expert_width": ("ffn_hidden_size",), "width": ("intermediate_size",)},
        harmless=("hidden_size", "max_seq_len"),
    ),
    # ERNIE 4.5 (Baidu)
    "ernie4_5_moe": Family(
        defaults={"tie_word_embeddings": True, "moe_layer_start_index": 1, "moe_num_shared_experts": 2},
        harmless=("moe_norm_min", "compression_ratio", "moe_capacity"), router_bias=True,
    ),
    # gpt-oss (OpenAI): windows in every other layer, sinks, biases everywhere
    "gpt_oss": Family(
        defaults={"attention_bias": True}, harmless=("initial_context_length", "experts_per_token"),
        expert_bias=True, router_bias=True, sinks=True,
    ),
    # Granite (IBM): experts, shared experts, Mamba-2 layers, windows
    "granitemoe": Family(),
    "granitemoeshared": Family(defaults={"num_shared_experts": 1}),
    "granitemoehybrid": Family(defaults={"num_shared_experts": 1}, linear="mamba2"),
    "granitemoe_swa": Family(defaults={"num_shared_experts": 1}, sinks=True),
    # Jamba (AI21): Mamba layers, attention in every eighth, experts in every other
    "jamba": Family(
        defaults={"expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 8, "attn_layer_offset": 4},
        linear="mamba",
    ),
    # Llama 4 (Meta): chunked attention in three layers of four, one shared expert
    "llama4": Family(
        defaults={"interleave_moe_layer_step": 1, "num_shared_experts": 1, "no_rope_layer_interval": 4},
        harmless=("floor_scale", "attn_scale", "no_rope_layers"),
    ),
    # OLMoE and FlexOlmo (Ai2)
    "olmoe": Family(qk_norm="full"), "flex_olmo": Family(qk_norm="full"),
    # Phi-3.5-MoE (Microsoft)
    "phimoe": Family(norm_width=2, window_everywhere=True),
}  # fmt: skip
