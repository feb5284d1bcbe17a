"""What a report needs of an expert-parallel plan document, checked before anything is drawn.

Modelled: presence and type of the keys that the page reads, and that maps and matrices have the shape of the placement, so
that a damaged plan.json is one clear complaint. Ignored: keys it does not read, and whether the figures make sense.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from ...base.errors import InputError
from ...planner.parallel.case import plain_schedule
from ...planner.parallel.maps import placement_from_dict
from ...planner.placement.placement import Placement
from ...specs.schedules.parallel import ExpertParallelSchedule, ep_schedule_from_dict

Document = Mapping[str, Any]
FloatArray = npt.NDArray[np.float64]

# The version of plan documents that this report reads.
SCHEMA_VERSION = 1
BEFORE, AFTER = "before", "after"
# How plans call plain expert parallelism among their baselines.
PLAIN = "ep"
_AGAIN = "make the plan again with moeplan plan --mode ep"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
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
class _Best(_Result):
    schedule: dict[str, Any]
    engine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placement:
    physical_to_logical: list[list[int]]
    num_logical: int
    num_ranks: int
    num_nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counts:
    before: list[list[int]]
    after: list[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Balance:
    before: list[float]
    after: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ablation:
    kind: str
    ingredient: str
    step_s: float
    change_fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Migration:
    num_bytes: int
    num_experts: int
    stall_s: float
    saved_s_per_step: float
    steps_to_pay_back: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ageing:
    recording: str
    plain_step_s: float
    plan_step_s: float
    replanned_eplb_step_s: float
    plan_max_over_mean_load: float
    replanned_eplb_max_over_mean_load: float
    change_fraction: float
    replan: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trace:
    source: str
    num_tokens: int | None
    num_layers: int
    num_experts: int
    layer_ids: list[int]
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Provenance:
    produced_by: str
    model: str
    hardware: str
    trace: _Trace
    num_evaluated: int
    step_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    num_nodes: int
    ranks_per_node: int
    num_redundant: int
    prefill: bool
    context_tokens: int
    bits: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    schema_version: int
    kind: str
    provenance: _Provenance
    request: _Request
    best: _Best
    placement: _Placement
    placement_before: _Placement
    slot_rows: _Counts
    max_over_mean_by_layer: _Balance
    links: _Counts
    baselines: list[_Result]
    references: list[_Result]
    baselines_left_out: dict[str, str]
    ablation: list[_Ablation]
    migration: _Migration
    ageing: list[_Ageing]
    overfit_fraction: float
    num_candidates: int
    lower_bound_step_s: float
    optimality_gap: float
    verdict: str
    assumptions: list[str]


def check_parallel_document(document: Document) -> None:
    """Return nothing; raises InputError naming the first key of an expert-parallel plan that is absent or wrong."""
    for key, wanted in (("kind", "expert-parallel"), ("schema_version", SCHEMA_VERSION)):
        if document.get(key) != wanted:
            raise InputError(f"plan: {key}", document.get(key), f"this report reads {wanted!r}", _AGAIN)
    try:
        _adapter().validate_json(json.dumps(document))  # as JSON: lists stand for tuples
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        missing = first["type"] in ("missing", "missing_keyword_only_argument")
        value = "(absent)" if missing else first.get("input")
        raise InputError(
            f"plan: {field}", value, "a field is absent" if missing else first["msg"].lower(), _AGAIN
        ) from None
    if not any(one["name"] == PLAIN for one in document["baselines"]):
        raise InputError("plan: baselines", "(absent)", f"none is called {PLAIN!r}", _AGAIN)
    for state in (BEFORE, AFTER):
        placement = placement_of(document, state)
        ranks = placement.num_ranks
        shapes = {
            f"slot_rows.{state}": (document["slot_rows"][state], (placement.num_layers, placement.num_slots)),
            f"links.{state}": (document["links"][state], (ranks, ranks)),
            f"max_over_mean_by_layer.{state}": (document["max_over_mean_by_layer"][state], (placement.num_layers,)),
        }
        for name, (values, shape) in shapes.items():
            if _shape(values) != shape:
                raise InputError(f"plan: {name}", f"shape {_shape(values)}", f"the placement wants {shape}", _AGAIN)


def placement_of(document: Document, state: str) -> Placement:
    """Return the placement before or after; raises InputError where the document's is none."""
    return placement_from_dict(document["placement_before" if state == BEFORE else "placement"])


def plain_of(document: Document) -> Document:
    """Return the baseline that is plain expert parallelism."""
    found: Document = next(one for one in document["baselines"] if one["name"] == PLAIN)
    return found


def rank_rows(document: Document, state: str) -> FloatArray:
    """Return [layers, ranks]: rows each rank computes in the first reported step."""
    placement = placement_of(document, state)
    rows = np.array(document["slot_rows"][state], np.float64)
    return np.asarray(rows.reshape(placement.num_layers, placement.num_ranks, -1).sum(axis=2))


def schedule_of(document: Document, state: str) -> ExpertParallelSchedule:
    """Return plain expert parallelism (before) or the plan's schedule (after)."""
    best = ep_schedule_from_dict(document["best"]["schedule"])
    return plain_schedule(best.kernel.bits) if state == BEFORE else best


def link_bytes(document: Document, state: str) -> FloatArray:
    """Return [from rank, to rank]: bytes sent in a mean step, all layers, dispatch there and combine back together."""
    exchange = schedule_of(document, state).exchange
    dispatched = np.array(document["links"][state], np.float64)
    back = exchange.combine_bytes_per_value / exchange.dispatch_bytes_per_value
    return np.asarray(dispatched + dispatched.T * back)


def same_node(placement: Placement) -> npt.NDArray[np.bool_]:
    """Return [ranks, ranks]: whether two ranks sit in one node."""
    node = np.arange(placement.num_ranks) // placement.ranks_per_node
    return np.asarray(node[:, None] == node[None, :])


def _shape(values: list[Any]) -> tuple[int, ...]:
    """Return the shape of nested lists; (rows, -1) where rows differ in length."""
    if not values or not isinstance(values[0], list):
        return (len(values),)
    lengths = {len(row) for row in values}
    return (len(values), lengths.pop() if len(lengths) == 1 else -1)


@cache
def _adapter() -> TypeAdapter[_Plan]:
    """Return the validator: only what is declared above is looked at, further keys are left alone."""
    return TypeAdapter(with_config(ConfigDict(extra="ignore", strict=True))(_Plan))
