"""What plan.json holds of an expert-parallel plan: the keys that pages and emitted files read.

Modelled: presence and type of keys. Ignored: keys nobody reads, and whether figures make sense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A schedule and what was predicted for it; times in seconds."""

    name: str
    step_s: float
    relative_uncertainty: float
    layer_s: float
    compute_s: float
    expert_s: float
    exchange_s: float
    exposed_s: float
    max_over_mean_load: float
    inter_node_bytes: int
    intra_node_bytes: int
    tokens_per_s: float
    bound: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Best(Result):
    """The chosen schedule."""

    schedule: dict[str, Any]
    engine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementTable:
    """Which expert is in which slot of which rank."""

    physical_to_logical: list[list[int]]
    num_logical: int
    num_ranks: int
    num_nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeAndAfter:
    """Matrices under plain expert parallelism and under the plan."""

    before: list[list[int]]
    after: list[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceByLayer:
    """The busiest rank over the mean, layer by layer, before and after."""

    before: list[float]
    after: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """What one ingredient adds."""

    kind: str
    ingredient: str
    step_s: float
    change_fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """What moving to the plan costs."""

    num_bytes: int
    num_experts: int
    stall_s: float
    saved_s_per_step: float
    steps_to_pay_back: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Staleness:
    """The plan on another recording."""

    recording: str
    plain_step_s: float
    plan_step_s: float
    replanned_eplb_step_s: float
    plan_max_over_mean_load: float
    replanned_eplb_max_over_mean_load: float
    change_fraction: float
    replan: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The recording or load a plan was made from."""

    source: str
    num_tokens: int | None
    num_layers: int
    num_experts: int
    layer_ids: list[int]
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a plan was made of and with."""

    produced_by: str
    model: str
    hardware: str
    trace: Recording
    num_evaluated: int
    step_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for."""

    num_nodes: int
    ranks_per_node: int
    num_redundant: int
    prefill: bool
    context_tokens: int
    bits: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """plan.json of an expert-parallel plan: the keys that others read."""

    schema_version: int
    kind: str
    provenance: Provenance
    request: Request
    best: Best
    placement: PlacementTable
    placement_before: PlacementTable
    slot_rows: BeforeAndAfter
    max_over_mean_by_layer: BalanceByLayer
    links: BeforeAndAfter
    baselines: list[Result]
    references: list[Result]
    baselines_left_out: dict[str, str]
    ablation: list[Ablation]
    headline: dict[str, Any]
    factors: dict[str, Any]
    migration: Migration
    staleness: list[Staleness]
    overfit_fraction: float
    num_candidates: int
    lower_bound_step_s: float
    optimality_gap: float
    verdict: str
    assumptions: list[str]
