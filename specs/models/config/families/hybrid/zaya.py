"""ZAYA (Zyphra): convolved attention in a narrow space, a router with layers of its own, one choice that does nothing.

Ignored: the state its router carries between layers.
"""

from __future__ import annotations

import dataclasses

from .... import AttentionSpec
from ...family import Draft, Family
from ...keys import Keys


def _finish(keys: Keys, draft: Draft) -> None:
    hidden, narrow, experts = draft.fields["hidden_size"], keys.need("router_hidden_size"), draft.fields["num_experts"]
    taps, grouped = keys.size("cca_time0") or 2, keys.size("cca_time1") or 2
    attention: AttentionSpec = draft.fields["attention"]
    wide = (attention.num_heads + attention.num_kv_heads) * attention.head_dim
    convolved = wide * (taps + 1) + wide * (attention.head_dim * grouped + 1) + attention.num_kv_heads
    kept = hidden * attention.num_kv_heads * attention.head_dim
    draft.fields["attention"] = dataclasses.replace(
        attention, vector_parameters=attention.vector_parameters + convolved,
        projections=2 * hidden * attention.num_heads * attention.head_dim + 2 * kept,
    )  # fmt: skip
    router = narrow * hidden + 2 * narrow * narrow + 5 * narrow + (experts + 1) * narrow - experts * hidden
    draft.vary(draft.all_layers, vector_parameters=router + 8 * hidden)
    draft.vary((0,), vector_parameters=-narrow)  # nothing of an earlier router to scale
    draft.fields["other_parameters"] = 2 * hidden
    draft.remarks.append("one further choice of the router does nothing")


FAMILIES = {"zaya": Family(finish=_finish)}
