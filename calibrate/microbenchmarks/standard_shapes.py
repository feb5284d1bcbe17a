"""Models whose shapes a calibration takes when none is named: two that span what a CPU can run quickly, two real ones
for a GPU.

A profile predicts shapes between those it was measured with; models far outside need a calibration with their own
shapes. Ignored: attention variants; only sizes are taken.
"""

from __future__ import annotations

from ...specs.models import AttentionSpec, ModelSpec


def made_up_model(
    name: str,
    *,
    hidden: int,
    intermediate: int,
    num_layers: int = 4,
    num_experts: int = 8,
    top_k: int = 2,
    vocab: int = 2048,
) -> ModelSpec:
    """Return a decoder of the usual kind (grouped-query attention, gated experts in every layer) with the given sizes."""
    return ModelSpec(
        name=name,
        family="made up",
        hidden_size=hidden,
        num_layers=num_layers,
        moe_layers=tuple(range(num_layers)),
        num_experts=num_experts,
        top_k=top_k,
        expert_intermediate_size=intermediate,
        gated=True,
        vocab_size=vocab,
        attention=AttentionSpec(
            kind="gqa", num_heads=hidden // 64, num_kv_heads=hidden // 256, head_dim=64, v_head_dim=64
        ),
    )


def cpu_models() -> list[ModelSpec]:
    """Return four shapes of 1.2 to 4.3 million weights an expert: some fit a core's caches, some do not."""
    sizes = ((512, 768), (512, 1280), (1024, 960), (1024, 1408))
    return [made_up_model(f"shape {hidden}x{inner}", hidden=hidden, intermediate=inner) for hidden, inner in sizes]


def gpu_models() -> list[ModelSpec]:
    """Return the shapes of one layer of Qwen3-30B-A3B and of Mixtral-8x7B (their configurations on Hugging Face)."""
    return [
        made_up_model(
            "shapes of Qwen3-30B-A3B",
            hidden=2048,
            intermediate=768,
            num_layers=2,
            num_experts=128,
            top_k=8,
            vocab=151_936,
        ),
        made_up_model(
            "shapes of Mixtral-8x7B",
            hidden=4096,
            intermediate=14_336,
            num_layers=2,
            num_experts=8,
            top_k=2,
            vocab=32_000,
        ),
    ]
