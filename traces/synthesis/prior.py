"""Routing where nothing was recorded: a synthetic recording of a model's family, for requests of given lengths.

Modelled: the dials of the nearest published locality, in the shape of the model; a request is a prompt and a reply, or only
decoding steps or one part of a prompt at a given depth of context; and the same requests with as little and as much locality as
texts have, by which predictions without a recording are uncertain. Ignored: what a particular text would choose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from ...base.errors import InputError
from ...base.units import GIB
from ...specs.models import ModelSpec
from ..lengths import RequestLengths
from ..recording import RoutingTrace
from .dial import Dials, reshape_dials
from .presets import PRESETS
from .synthesise import RequestPlan, synth_trace

_FAMILIES: Mapping[str, str] = MappingProxyType({
    "mixtral": "mixtral-8x7b", "dbrx": "mixtral-8x7b", "gpt_oss": "gpt-oss-20b", "deepseek_v2": "deepseek-v2-lite",
    "deepseek_v3": "deepseek-r1", "deepseek_v32": "deepseek-r1", "deepseek_v4": "deepseek-r1", "kimi_k2": "deepseek-r1",
})  # fmt: skip
LOCALITY, FOREIGN_LOCALITY = (0.75, 1.5), (0.5, 2.0)
"""How much less and more than its prior routing may repeat itself: of the prior's own family, and of another. Hit rates of a cache of a
quarter of the experts over the 31 longer answers of gpt-oss-20b's recording run from 0.58 to 0.72, its prior's ends from 0.54 to 0.72.
For other families, whose nearest prior is another's, twice that distance is assumed."""
_REPEATING: Mapping[str, float] = MappingProxyType(
    dict.fromkeys(("qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen4_exp"), 1.8)
)
"""How many times more than their nearest prior families repeat their choices, by hits that caches of engines counted: Qwen3-30B's of 8,
24, 49 and 81 of 128 experts 37, 74, 89 and 96 % (github.com/kekzl/imp/pull/1374), Qwen3.8-Flash-Next's of 64, 88 and 128 of 512 experts
67, 74 and 81 % (github.com/ggml-org/llama.cpp/pull/27861, github.com/truespar/paddock/issues/20)."""
_FEW_EXPERTS, _SOME_EXPERTS = 16, 32
_MOST_BYTES = 4 * GIB


def prior_name(model: ModelSpec) -> str:
    """Return the published locality that stands for `model`: its family's, else that of models with about as many experts."""
    named = _FAMILIES.get(model.family)
    if named is not None:
        return named
    if model.num_experts <= _FEW_EXPERTS:
        return "mixtral-8x7b"
    return "gpt-oss-20b" if model.num_experts <= _SOME_EXPERTS else "deepseek-v2-lite"


def family_dials(model: ModelSpec) -> Dials | None:
    """Return the published locality of the model's own family; None where none is published."""
    named = _FAMILIES.get(model.family)
    return None if named is None else PRESETS[named]


def prior_dials(model: ModelSpec) -> Dials:
    """Return the dials of `prior_name(model)` in the shape of `model`."""
    dials = PRESETS[prior_name(model)]
    dials = reshape_dials(
        dials,
        num_layers=model.num_moe_layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        layer_ids=model.moe_layers,
    )
    return _with_locality(dials, _REPEATING[model.family]) if model.family in _REPEATING else dials


def spread_recordings(model: ModelSpec, lengths: RequestLengths, *, seed: int = 0) -> tuple[RoutingTrace, ...]:
    """Return the requests of `prior_recording` with as little and as much locality as routing of the family has, text by text."""
    dials = replace(prior_dials(model), guess_recall=())
    factors = LOCALITY if model.family in _FAMILIES or model.family in _REPEATING else FOREIGN_LOCALITY
    return tuple(
        _recording(_with_locality(dials, factor), model.name, prior_name(model), lengths, seed) for factor in factors
    )


def _with_locality(dials: Dials, factor: float) -> Dials:
    """Return dials whose choices repeat, and lean to a request's own experts, `factor` times as much."""
    strongest = max(1.0, *dials.layer_reuse)
    room = 1 / ((dials.reuse_short + dials.reuse_long) * strongest)
    return replace(
        dials, reuse_short=dials.reuse_short * min(factor, room), reuse_long=dials.reuse_long * min(factor, room),
        request_shift=min(5.0, dials.request_shift * factor), affinity=min(1.0, dials.affinity * factor),
    )  # fmt: skip


def prior_recording(model: ModelSpec, lengths: RequestLengths, *, seed: int = 0) -> RoutingTrace:
    """Return a recording of requests of such lengths; cached tokens of a prompt have a position but no row.

    Raises InputError for lengths that are out of range.
    """
    rows = int(lengths.total.sum())
    if rows * model.num_moe_layers * model.top_k > _MOST_BYTES:
        rule = f"{rows} tokens of {model.num_moe_layers} layers and {model.top_k} experts are more choices than memory is kept for"
        raise InputError("requests", lengths.words(), rule, "ask for fewer or shorter requests")
    dials = replace(prior_dials(model), guess_recall=())
    return _recording(dials, model.name, prior_name(model), lengths, seed)


@lru_cache(maxsize=64)
def _recording(dials: Dials, name: str, prior: str, lengths: RequestLengths, seed: int) -> RoutingTrace:
    plan = RequestPlan(prompt=lengths.computed, total=lengths.total, domain=np.zeros(len(lengths), np.int64))
    trace = synth_trace(dials, plan=plan, seed=seed, model=name)
    cached = np.array(lengths.cached, np.int32)
    position = trace.position + cached[trace.request] if cached.any() else trace.position
    source = f"{trace.source}; no recording was given: the locality of {prior} in this model's shape"
    return replace(trace, position=position, source=source)
