"""What a report needs of a plan document, checked before anything is drawn, so that a damaged plan.json is one clear complaint.

Modelled: presence and type of the keys that the page reads. Ignored: keys it does not read, and whether the figures make sense.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from ...base.errors import InputError
from .speed import Document

# The version of plan documents that this report reads.
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trace:
    source: str
    num_tokens: int
    num_layers: int
    num_experts: int
    top_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Provenance:
    produced_by: str
    model: str
    hardware: str
    memory_bytes: int
    window_steps: int | None
    trace: _Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    bits: list[str]
    objective: str
    floor_tokens_per_s: float | None
    concurrency: int
    prefill_chunk_tokens: int | None
    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    p50: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    dense: float
    expert: float
    head: float
    launch: float
    copy: float
    host: float
    cpu: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    name: str
    place: str
    bytes: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ledger:
    device_bytes: int
    items: list[_Item]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    name: str
    schedule: dict[str, Any]
    prefill_tokens_per_s: float | None
    prefill_tokens_per_s_interval: tuple[float, float] | None
    ttft_s: float | None
    ttft_s_interval: tuple[float, float] | None
    decode_tokens_per_s: float | None
    decode_tokens_per_s_interval: tuple[float, float] | None
    request_s: float | None
    request_s_interval: tuple[float, float] | None
    window_s: float
    window_s_interval: tuple[float, float]
    step_s: _Step
    makespan_ns: int
    num_steps: int
    num_tokens: int
    hit_rate: float
    prefetches: int
    prefetches_used: int
    guessed_hits: int
    ready_hits: int
    bytes_copied: int
    bound: str
    time_share: _Share
    ledger: _Ledger
    assumptions: list[str]
    engine: str
    needs: str | None = None
    family: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _FrontPoint:
    level: int
    device_bytes: int
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    window_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    schema_version: int
    kind: str
    provenance: _Provenance
    request: _Request
    best: _Result
    baselines: list[_Result]
    baselines_that_do_not_fit: dict[str, str]
    references: dict[str, _Result]
    front: list[_FrontPoint]
    num_candidates: int
    num_evaluated: int
    num_abandoned: int
    num_pruned: int
    lower_bound_step_s: float
    optimality_gap: float | None
    verdict: str
    baselines_that_need_more: list[_Result] = field(default_factory=list)


def check_plan_document(document: Document) -> None:
    """Return nothing; raises InputError naming the first key of an offload plan that is absent or of the wrong type."""
    for key, wanted in (("kind", "offload"), ("schema_version", SCHEMA_VERSION)):
        if document.get(key) != wanted:
            raise InputError(f"plan: {key}", document.get(key), f"this report reads {wanted!r}", "make the plan again")
    try:
        _adapter().validate_json(json.dumps(document))  # as JSON: lists stand for tuples
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        missing = first["type"] in ("missing", "missing_keyword_only_argument")
        value = "(absent)" if missing else first.get("input")
        rule = "a field is absent" if missing else first["msg"].lower()
        raise InputError(f"plan: {field}", value, rule, "give a plan.json as moeplan plan writes it") from None


@cache
def _adapter() -> TypeAdapter[_Plan]:
    """Return the validator: only what is declared above is looked at, further keys are left alone."""
    return TypeAdapter(with_config(ConfigDict(extra="ignore", strict=True))(_Plan))
