"""gpt-oss (OpenAI): windows in every other layer, sinks, biases everywhere.

Ignored: how far positions stretch, clamps of activations.
"""

from ..family import Family

FAMILIES = {
    "gpt_oss": Family(
        defaults={"attention_bias": True}, harmless=("initial_context_length", "experts_per_token"),
        expert_bias=True, router_bias=True, sinks=True,
    ),
}  # fmt: skip
