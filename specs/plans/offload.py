"""What plan.json holds of a plan for one device: the keys that pages, emitted files and validations read.

Modelled: presence and type of keys. Ignored: keys nobody reads, and whether figures make sense.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The recording a plan was made from."""

    source: str
    num_tokens: int
    num_layers: int
    num_experts: int
    top_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a plan was made of and with."""

    produced_by: str
    model: str
    hardware: str
    memory_bytes: int
    window_steps: int | None
    trace: Recording


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for."""

    bits: list[str]
    objective: str
    floor_tokens_per_s: float | None
    concurrency: int
    prefill_chunk_tokens: int | None
    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Percentiles of the time of a forward pass, in seconds."""

    p50: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeShare:
    """Shares of the window, adding up to one."""

    dense: float
    expert: float
    head: float
    launch: float
    copy: float
    host: float
    cpu: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryItem:
    """One item of the memory breakdown, in bytes."""

    name: str
    place: str
    bytes: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBreakdown:
    """What lies where."""

    device_bytes: int
    items: list[MemoryItem]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A schedule and what was predicted for it."""

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
    step_s: StepTimes
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
    time_share: TimeShare
    memory_breakdown: MemoryBreakdown
    assumptions: list[str]
    engine: str
    needs: str | None = None
    family: str | None = None
    requests_per_s: float | None = None
    requests_per_s_interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPoint:
    """The best schedule of one amount of memory."""

    level: int
    device_bytes: int
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    window_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadPlan:
    """plan.json of a plan for one device: the keys that others read."""

    schema_version: int
    kind: str
    provenance: Provenance
    request: Request
    best: Result
    baselines: list[Result]
    baselines_that_do_not_fit: dict[str, str]
    references: dict[str, Result]
    front: list[FrontPoint]
    num_candidates: int
    num_evaluated: int
    num_abandoned: int
    num_pruned: int
    lower_bound_step_s: float
    optimality_gap: float | None
    verdict: str
    baselines_that_need_more: list[Result] = field(default_factory=list)
