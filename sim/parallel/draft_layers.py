"""What a model's draft layer computes in a step: the load of each of its passes, made from that of the last layer that was recorded.

A step that checks k drafted tokens of every sequence computes k + 1 tokens of it. Afterwards the draft layer (multi-token prediction: one
layer of the model's make behind a projection of two hidden states to one, with the model's own output head) runs k times: first over the
step's tokens, then over one token of every sequence (DeepSeek-V3, arXiv 2412.19437, section 2.2; SGLang and vLLM run one such layer
again and again for k above one).

Modelled: drafts are routed as the last MoE layer's tokens are. Ignored: that consecutive tokens of a sequence share experts where only
counts are known (with recorded tokens a step's union is counted); what a draft layer's own experts are chosen by, which nobody records.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ...specs.schedules.parallel import ExpertParallelSchedule
from ..policies.state import Array
from .active_experts import most_over_mean
from .traffic import Expectation, FloatArray, StepLoad, by_unit


def with_draft_layers(load: StepLoad, schedule: ExpertParallelSchedule, draft_tokens: int) -> StepLoad:
    """Return a step's load with a layer for each pass of the draft layer behind its own layers."""
    if not draft_tokens:
        return load
    each = draft_tokens + 1
    counts = {
        "slot_rows": _with(load.slot_rows, _spread(load.slot_rows[-1:], each), draft_tokens),
        "sent": _with(load.sent, -(-load.sent[-1:] // each), draft_tokens),
        "received": _with(load.received, -(-load.received[-1:] // each), draft_tokens),
    }
    return replace(load, expected=_expected(load, schedule, draft_tokens), **counts)


def _expected(load: StepLoad, schedule: ExpertParallelSchedule, draft_tokens: int) -> Expectation | None:
    found, each = load.expected, draft_tokens + 1
    if found is None:
        return None
    active = -np.expm1(np.log1p(-np.minimum(found.active[-1:], 1 - 1e-16)) / each)
    slowest = most_over_mean(by_unit(active, load.topology, schedule.parallel.experts))
    return Expectation(
        rows=_with(found.rows, found.rows[-1:] / each, draft_tokens), active=_with(found.active, active, draft_tokens),
        slowest=_with(found.slowest, slowest, draft_tokens), sent=_with(found.sent, found.sent[-1:] / each, draft_tokens),
        received=_with(found.received, found.received[-1:] / each, draft_tokens),
    )  # fmt: skip


def _with(layers: Any, later: Array | FloatArray, passes: int) -> Any:
    """Return `layers: [layers, …]`, then its last layer again for the first pass, then `later: [1, …]` for every further one."""
    return np.concatenate([layers, layers[-1:], *[later] * (passes - 1)])


def _spread(rows: Array, parts: int) -> Array:
    """Return a part of `rows: [layers, parts, slots]` in whole rows that add up to the part of them all."""
    return np.asarray(np.diff(np.cumsum(rows, axis=-1) // parts, axis=-1, prepend=0), np.int64)
