"""Muse Spark (Meta): experts work on a vector half as wide.

Ignored: vision and audio towers, temperatures of gates.
"""

from __future__ import annotations

from ..family import Draft, Family
from ..keys import Keys


def _finish(keys: Keys, draft: Draft) -> None:
    hidden, narrow = draft.fields["hidden_size"], keys.need("moe_hidden_size")
    draft.fields["expert_hidden_size"] = narrow
    draft.vary(draft.fields["moe_layers"], matrix_parameters=2 * hidden * narrow, vector_parameters=2 * narrow)


FAMILIES = {"muse_spark": Family(num_norms=5, gate="full", harmless=("out_hidden_size",), finish=_finish)}
