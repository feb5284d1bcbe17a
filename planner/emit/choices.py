"""What a plan document says, as far as an engine can be told: a placement or a cache, the schedule, and what stays unsaid.

A plan document is plan.json, read back. Keys that are read here; others are ignored:

    {"kind": "expert-parallel", "schema_version": 1,
     "placement": {"physical_to_logical": [[expert, …], …],   one row per MoE layer, one column per slot
                   "num_ranks": 8, "num_nodes": 2,            rank r owns slots [r·P/ranks, (r+1)·P/ranks)
                   "num_logical": 64,                         optional: experts of a layer
                   "layer_ids": [1, 2, …]},                   absolute layer of every row; else provenance.trace.layer_ids
     "schedule": {…},                                         nested options of `ep_schedule`; else best.schedule
     "request": {"prefill": false},                           optional: what kind of steps the plan is for
     "provenance": {"model": "…", "trace": {"layer_ids": […]}}}

    {"kind": "offload", "schema_version": 1,
     "best": {"schedule": {…}, "memory_breakdown": {"items": [{"name", "place", "bytes"}, …]}},
     "provenance": {"model": "…", "memory_bytes": …, "trace": {"num_layers": …, "num_experts": …}}}

Modelled: one choice per plan, checked against the model it is emitted for. Ignored: predictions, baselines, verdicts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...base.errors import InputError, UnknownName
from ...specs.models import ModelSpec, weight_format
from ...specs.schedules.offload import OffloadSchedule, schedule_from_dict
from ...specs.schedules.parallel import ExpertParallelSchedule, ep_schedule_from_dict

# The one place of this room that knows where the noun lives.
from ..placement.placement import Placement as Placement
from ..placement.placement import contiguous as contiguous
from ..placement.placement import round_robin as round_robin
from .drafting import DraftChoice, read_drafts, read_ep_drafts
from .served import ServedChoice, read_served

_PLACEMENT_KEYS = ("physical_to_logical", "num_ranks", "num_nodes", "num_logical", "layer_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Emission:
    """What one engine is given."""

    engine: str
    """Name and version whose loader the files are written for."""
    files: Mapping[str, str]
    """File name to text."""
    usage: tuple[str, ...]
    """How to use the files, and what the user must add."""
    notes: tuple[str, ...]
    """What the plan says and the engine cannot express."""
    facts: tuple[str, ...] = ()
    """What the engine does with the files for this model."""
    runs: ExpertParallelSchedule | OffloadSchedule | None = None
    """The schedule that the files make the engine run; None where no schedule says what it does."""
    unlike: str = ""
    """Why no schedule says what the engine does."""
    predicted: tuple[str, ...] = ()
    """What is predicted for the files, where their engine's module says it; else it is looked up by `runs`."""
    measure: tuple[str, ...] = ()
    """Measurements that would settle the choice, and what each is predicted to show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpChoice:
    """The expert-parallel plan to express."""

    name: str
    placement: Placement
    """Rows are the model's MoE layers, ascending."""
    schedule: ExpertParallelSchedule
    decode: bool = False
    """The plan is for decode steps."""
    draft: DraftChoice | None = None
    """How tokens are drafted; None: they are not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadChoice:
    """The offload plan to express."""

    name: str
    schedule: OffloadSchedule
    cached_experts: int
    """Experts on the device over all layers; 0 where nothing is cached."""
    expert_bytes: int
    native_format: bool
    """Experts are stored as in the model's own checkpoint."""
    memory_bytes: int
    """The whole device budget."""
    device_bytes: Mapping[str, int]
    """Items of the device's memory breakdown by name."""
    served: ServedChoice | None = None
    """What the plan says of the engine it was made for."""
    draft: DraftChoice | None = None
    """How tokens are drafted; None: they are not."""
    tensor_split: tuple[float, ...] = ()
    """Shares of several cards, whole layers on each; empty for one."""


# --- reading a document --------------------------------------------------------------------------------------------------


def read_ep_choice(document: Mapping[str, Any], model: ModelSpec) -> EpChoice:
    """Return the placement and schedule of an expert-parallel plan for `model`.

    Raises InputError where keys are absent or unknown, layers or experts are not the model's, an expert has no slot, slots
    and ranks form no rectangle, or the schedule slices experts.
    """
    table = _table(document, "placement")
    for key in table:
        if key not in _PLACEMENT_KEYS:
            raise UnknownName("plan: placement key", key, _PLACEMENT_KEYS)
    layer_ids = table.get("layer_ids")
    if layer_ids is None:
        layer_ids = _table(_table(document, "provenance"), "trace").get("layer_ids")
    if layer_ids != list(model.moe_layers):
        raise InputError("plan: layer_ids", layer_ids, f"the MoE layers of {model.name} are {list(model.moe_layers)}",
                         "emit for the model that was planned, from a recording of all its layers")  # fmt: skip
    num_logical = table.get("num_logical", model.num_experts)
    if num_logical != model.num_experts:
        raise InputError("plan: placement.num_logical", num_logical, f"{model.name} has {model.num_experts} experts a layer",
                         "emit for the model that was planned")  # fmt: skip
    rows = int_rows(table.get("physical_to_logical"), "plan: placement.physical_to_logical")
    if len(rows) != model.num_moe_layers:
        raise InputError("plan: placement.physical_to_logical", len(rows), f"{model.name} has {model.num_moe_layers} MoE layers",
                         "give one row per MoE layer")  # fmt: skip
    counts = {key: _count(table.get(key), f"plan: placement.{key}", 1) for key in ("num_ranks", "num_nodes")}
    options = document["schedule"] if "schedule" in document else _table(document, "best").get("schedule")
    schedule = ep_schedule_from_dict(_mapping(options, "plan: schedule"))
    if schedule.parallel.experts != "expert":
        raise InputError("plan: parallel.experts", schedule.parallel.experts, "no placement over all ranks can express it",
                         "start the engine with tensor parallelism, without expert parallelism")  # fmt: skip
    return EpChoice(
        name=schedule.name,
        placement=Placement(
            physical_to_logical=np.array(rows, dtype=np.int32), num_logical=model.num_experts, **counts
        ),
        schedule=schedule,
        decode=_is_decode(document),
        draft=read_ep_drafts(document),
    )


def _is_decode(document: Mapping[str, Any]) -> bool:
    """Return whether a plan was searched on decode steps: what its request says."""
    request = document.get("request")
    return isinstance(request, Mapping) and request.get("prefill") is False


def read_offload_choice(document: Mapping[str, Any], model: ModelSpec) -> OffloadChoice:
    """Return the cache and schedule of an offload plan for `model`.

    Raises InputError where keys are absent, layers or experts are not the model's, or the cache has no size.
    """
    best, provenance = _table(document, "best"), _table(document, "provenance")
    trace = _table(provenance, "trace")
    for key, own in (("num_layers", model.num_moe_layers), ("num_experts", model.num_experts)):
        if trace.get(key) != own:
            raise InputError(f"plan: provenance.trace.{key}", trace.get(key), f"{model.name} has {own}",
                             "emit for the model that was planned")  # fmt: skip
    schedule = schedule_from_dict(_mapping(best.get("schedule"), "plan: best.schedule"))
    bits = model.native_bits if schedule.experts.bits == "native" else schedule.experts.bits
    cache, cached, total = schedule.cache, 0, model.num_moe_layers * model.num_experts
    if cache.policy != "none":
        cached = cache.slots(model.num_moe_layers)
        if cache.experts_per_layer is None and cache.pooled_experts is None:
            raise InputError("plan: best.schedule.cache", cache.policy, "a cache without a size", "plan again")
    if cached > total:
        raise InputError("plan: best.schedule.cache", cached, f"{model.name} has {total} experts", "plan again")
    items = _table(best, "memory_breakdown").get("items")
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise InputError("plan: best.memory_breakdown.items", items, "not a list of items", "plan again")
    return OffloadChoice(
        name=schedule.name,
        schedule=schedule,
        cached_experts=cached,
        expert_bytes=model.expert_bytes(weight_format(bits)),
        native_format=bits == model.native_bits,
        memory_bytes=_count(provenance.get("memory_bytes"), "plan: provenance.memory_bytes", 1),
        served=read_served(document), draft=read_drafts(document), tensor_split=_shares_of(provenance),
        device_bytes={str(item.get("name")): _count(item.get("bytes"), f"plan: memory breakdown {item.get('name')}", 0)
                      for item in items if item.get("place") == "device"},
    )  # fmt: skip


def int_rows(value: object, field: str) -> list[list[int]]:
    """Return `value` as rows of whole numbers, all equally long; raises InputError for anything else."""
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
        raise InputError(field, value, "not a list of rows", "give one row of expert ids per layer")
    for index, row in enumerate(value):
        if len(row) != len(value[0]):
            raise InputError(
                f"{field}[{index}]", len(row), f"the first row has {len(value[0])} slots", "give rows of one length"
            )
        for expert in row:
            if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < 2**31:
                raise InputError(f"{field}[{index}]", expert, "not an expert id", "give whole numbers from 0")
    return value


def _count(value: object, field: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(field, value, f"not a whole number from {least}", "plan again")
    return value


def _mapping(value: object, field: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(field, value, "not a table", "check that it is a plan of this kind")
    return value


def _table(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if key not in document:
        raise InputError(f"plan: {key}", "(absent)", "a key is absent", "check that it is a plan of this kind")
    return _mapping(document[key], f"plan: {key}")


def _shares_of(provenance: Mapping[str, Any]) -> tuple[float, ...]:
    split = provenance.get("split")
    if not isinstance(split, Mapping) or split.get("mode") != "layer":
        return ()
    shares = split.get("shares")
    if not isinstance(shares, list) or not all(isinstance(one, int | float) and 0 <= one < 1e15 for one in shares):
        raise InputError("plan: provenance.split", split, "not shares of layers over cards", "plan again")
    return tuple(float(one) for one in shares)


# --- what stays unsaid -----------------------------------------------------------------------------------------------------

# Options that say nothing about what an engine does once it serves the model and load of the plan.
NEUTRAL = (
    "experts.bits", "kernel.bits", "all_to_all.dispatch_bytes_per_value", "all_to_all.combine_bytes_per_value", "pipeline.shortcut",
    "workload", "host", "cache.reset", "placement.policy",
)  # fmt: skip
_WHY = {
    "experts.bits": "the checkpoint decides: load one whose experts are stored so",
    "kernel.bits": "the checkpoint decides: load one whose experts are stored so",
    "all_to_all.dispatch_bytes_per_value": "the checkpoint's precision decides",
    "all_to_all.combine_bytes_per_value": "the engine decides",
    "pipeline.shortcut": "a property of the trained model",
    "workload.concurrency": "a property of the load: the prediction holds at this many requests at once",
    "cache.reset": "the prediction holds for such a cache",
    "host.per_step_s": "an assumption of the prediction, not a setting",
    "host.per_layer_s": "an assumption of the prediction, not a setting",
    "host.per_kernel_s": "an assumption of the prediction, not a setting",
    "host.per_transfer_s": "an assumption of the prediction, not a setting",
}


def left_out(
    schedule: OffloadSchedule | ExpertParallelSchedule, expressed: Collection[str], why: Mapping[str, str] | None = None
) -> list[str]:
    """Return a line for every option that differs from its default and is not `expressed`, with the reason where known.

    expressed: dotted keys, or sections whose every key counts, that the caller has mapped or explained itself.
    """
    usual, reasons = type(schedule)().to_dict(), _WHY | dict(why or {})
    lines = []
    for section, options in schedule.to_dict().items():
        if not isinstance(options, dict) or section in expressed:
            continue
        for option, value in options.items():
            key = f"{section}.{option}"
            if key not in expressed and value != usual[section][option]:
                lines.append(f"{key}={value}: {reasons.get(key, 'the engine has no such setting')}")
    return lines


def as_run(schedule: Any, kept: Collection[str], **changes: Any) -> Any:
    """Return the schedule that an engine runs: `schedule` with every option that the engine cannot express at its default.

    kept: dotted keys, or sections, that it expresses; changes: what it does instead, with `__` for the dot.
    """
    usual, own = type(schedule)().to_dict(), schedule.to_dict()
    back = {}
    for section, options in own.items():
        if not isinstance(options, dict) or section in kept or section in NEUTRAL:
            continue
        for option, value in options.items():
            key = f"{section}.{option}"
            if key not in kept and key not in NEUTRAL and value != usual[section][option]:
                back[f"{section}__{option}"] = usual[section][option]
    return schedule.with_options(**(back | changes))
