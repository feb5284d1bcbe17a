"""What models' own code in transformers does with experts that no token chose: who fetches modules as they are called fetches those too.

Modelled: which families call every expert, as the code of their first releases has it: Mixtral's skips experts without tokens, Qwen's
does not. Ignored: later releases, which skip them in all families.
"""

from __future__ import annotations

CALLS_EVERY_EXPERT = ("switch_transformers", "nllb_moe", "qwen2_moe", "qwen3_moe")
"""Families by `model_type`."""
