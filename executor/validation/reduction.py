"""What of a plan this machine can hold: all of it, or fewer places for experts, fewer layers, smaller matrices, in that order.

    experts in memory   experts of a store share places, as long as these are more than caches hold
    layers              whole MoE layers from the start; the recording is cut to them
    hidden size         and with it every other width but the vocabulary's and a head's, in the same ratio

Modelled: the bytes of the dense part (counted by making it without memory), of the largest arena, of all stores and host
caches, of the file below them. Caches of a layer keep their size; what is counted over all layers shrinks with them. What is
predicted and measured afterwards is the reduced model, and it says so. Ignored: the time that a run takes (`validate_plan`);
activations and the allocator's own losses, for which a share of the memory is left free.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...base.errors import DoesNotFit
from ...base.units import GIB, format_bytes
from ...devices.dense_part import DensePart
from ...devices.device import CpuDevice, Device, available_host_bytes
from ...devices.stores.slot_sizes import expert_layout
from ...sim.offload.forecast import stored_format
from ...sim.offload.run_input import RunInput
from ...sim.offload.simulators import fresh_state
from ...sim.policies.state import needs_prices
from ...specs.models import ModelSpec, weight_format
from ...specs.schedules.offload import OffloadSchedule
from ...traces.recording import RoutingTrace
from ..running.execute import largest_pass, walk_decisions
from ..running.host_tier import LEAST_SPARE, most_reads
from ..running.prediction import run_input
from .grid import Case

DISTINCT = 4
"""Experts that are drawn; the others repeat their bytes, which changes no timing."""
# Of the memory or disk that is free, this share may be planned with; activations, libraries and other programs get the rest.
_SHARE = 0.7
# A store of this size is read from memory, not from any cache: the largest caches of CPUs hold about a gibibyte.
_STORE_BYTES = GIB
_SCALES = ((3, 4), (1, 2), (3, 8), (1, 4), (3, 16), (1, 8), (1, 16))
# Widths stay multiples of this: quantised formats put 64 weights into a group.
_WIDTH = 64
_RATIO_LEEWAY = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory that a run may take."""

    device_bytes: int
    host_bytes: int
    disk_bytes: int
    shared: bool
    """Device and host are the same memory: both together may take `host_bytes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Memory that a run takes."""

    device_bytes: int
    store_bytes: int
    """Of one place in every store in memory."""
    host_bytes: int
    """Beside the stores: host caches."""
    file_bytes: int
    """Of one place in every file."""
    num_keys: int

    def places_in(self, room: Room) -> int:
        """Return how many places the stores may have in `room`; below one where not even one fits."""
        left = room.host_bytes - self.host_bytes - (self.device_bytes if room.shared else 0)
        if self.device_bytes > room.device_bytes or left < 0:
            return 0
        found = self.num_keys
        if self.store_bytes:
            found = min(found, left // self.store_bytes)
        if self.file_bytes:
            found = min(found, room.disk_bytes // self.file_bytes)
        return found

    def total_bytes(self, places: int) -> int:
        """Return all memory, with so many places in every store."""
        return self.device_bytes + self.host_bytes + places * self.store_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """A model, a recording and schedules that fit, and what of the planned ones they are."""

    model: ModelSpec
    trace: RoutingTrace
    cases: tuple[Case, ...]
    places: int | None
    changes: Mapping[str, tuple[int, int]]
    """(planned, run) of everything that differs."""
    reason: str

    def to_dict(self) -> dict[str, Any] | None:
        """Return what a validation's document says of it; None where nothing was reduced."""
        if not self.changes:
            return None
        changes = {name: {"planned": planned, "run": run} for name, (planned, run) in self.changes.items()}
        return changes | {"notes": list(self.notes())}

    def notes(self) -> tuple[str, ...]:
        """Return what was reduced, in words."""
        if not self.changes:
            return ()
        found = [self.reason] if self.reason else []
        for name, (planned, run) in self.changes.items():
            found.append(_WORDS[name].format(planned=planned, run=run))
        if not set(self.changes) <= {"experts_in_memory", "steps"}:
            found.append("predictions are for what ran, by the same code; nothing is extrapolated to the whole model")
        return tuple(found)


_WORDS = {
    "experts_in_memory": "{planned} experts share memory for {run}: as many bytes move, and the bytes repeat",
    "layers": "the first {run} of {planned} MoE layers ran, and the recording was cut to them; caches keep their size per layer",
    "hidden_size": "the hidden size is {run} instead of {planned}",
    "expert_intermediate_size": "experts are {run} wide instead of {planned}",
    "steps": "the first {run} of {planned} forward passes ran, so that it ends in time",
}


def room_of(device: Device, memory_bytes: int | None = None) -> Room:
    """Return what runs on `device` may take: a share of what is free, or `memory_bytes` of its memory where that is less."""
    free = int(available_host_bytes() * _SHARE)
    system = os.statvfs(tempfile.gettempdir())
    disk = int(system.f_bavail * system.f_frsize * _SHARE)
    if isinstance(device, CpuDevice):
        most = free if memory_bytes is None else min(free, memory_bytes)
        return Room(device_bytes=most, host_bytes=most, disk_bytes=disk, shared=True)
    most = int(device.limit_bytes * _SHARE) if memory_bytes is None else min(device.limit_bytes, memory_bytes)
    return Room(device_bytes=most, host_bytes=free, disk_bytes=disk, shared=False)


def reduced_to(
    room: Room, model: ModelSpec, trace: RoutingTrace, cases: Sequence[Case], *, window: int, dtype: torch.dtype
) -> Reduced:
    """Return as much of a plan as fits into `room`; raises DoesNotFit where not even the smallest excerpt does."""

    def tried(layers: int, scale: tuple[int, int]) -> tuple[Reduced, Needs, int]:
        smaller = scaled_model(first_layers(model, layers), *scale)
        cut = first_columns(trace, layers)
        mine = tuple(_fewer(case, smaller, layers, trace.num_layers) for case in cases)
        needs = needs_of(smaller, cut, mine, window=window, dtype=dtype)
        found = Reduced(model=smaller, trace=cut, cases=mine, places=None, changes={}, reason="")
        return found, needs, needs.places_in(room)

    def enough(needs: Needs, places: int) -> bool:
        return places >= _least_places(needs)

    full = model.num_moe_layers
    whole, wanted, places = tried(full, (1, 1))
    if places >= wanted.num_keys:
        return whole
    reason = (
        f"{model.name} needs {format_bytes(wanted.total_bytes(wanted.num_keys))} of memory"
        f" where {format_bytes(_all_of(room))} may be taken"
    )
    if wanted.file_bytes * wanted.num_keys > room.disk_bytes:
        reason += (
            f", and {format_bytes(wanted.file_bytes * wanted.num_keys)} of disk of {format_bytes(room.disk_bytes)}"
        )
    if enough(wanted, places):
        return _described(whole, wanted, places, model, reason)
    # Guesses reach ahead: as many layers are kept as there is something to guess.
    least = min(full, 1 + max(1, *(case.schedule.predictor.depth for case in cases)))
    low, high = least, full  # the most layers that fit lie in [low, high), if any do
    best = tried(least, (1, 1))
    if enough(*best[1:]):
        while high - low > 1:
            middle = (low + high) // 2
            found = tried(middle, (1, 1))
            if enough(*found[1:]):
                low, best = middle, found
            else:
                high = middle
        return _described(*best, model, reason)
    for scale in _SCALES:
        if _keeps_shape(model, scale):
            best = tried(least, scale)
            if enough(*best[1:]):
                return _described(*best, model, reason)
    smallest, needs, _ = best
    least_bytes = needs.total_bytes(_least_places(needs))
    what = f"{smallest.model.name} needs {least_bytes} bytes of memory even with {least} layers of hidden size {smallest.model.hidden_size}"
    raise DoesNotFit(f"{what}, where {_all_of(room)} may be taken", max(1, least_bytes - _all_of(room)))


def needs_of(model: ModelSpec, trace: RoutingTrace, cases: Sequence[Case], *, window: int, dtype: torch.dtype) -> Needs:
    """Return the memory that running `cases` on one stage takes, apart from activations."""
    inputs = [run_input(case.schedule, trace, window_steps=window, drafting=case.drafting) for case in cases]
    counting = CountingDevice()
    DensePart(model, counting, dtype=dtype, largest=largest_pass([given.workload for given in inputs]))
    in_memory: set[tuple[str, int]] = set()
    on_disk: set[tuple[str, int]] = set()
    arena = caches = 0
    for given in inputs:
        sizes = {name: expert_layout(model, name).slot_bytes for name in _formats(given.schedule, model)}
        largest = max(sizes.values())
        arena = max(arena, _num_slots(given) * largest)
        if given.schedule.copy.host_experts is None:
            in_memory |= sizes.items()
        else:
            on_disk |= sizes.items()
            held = min(given.schedule.copy.host_experts, trace.num_layers * trace.num_experts)
            caches = max(caches, (held + max(LEAST_SPARE, _most_reads(given))) * largest)
    return Needs(
        device_bytes=counting.used_bytes + arena,
        store_bytes=sum(size for _, size in in_memory),
        host_bytes=caches,
        file_bytes=sum(size for _, size in on_disk),
        num_keys=trace.num_layers * trace.num_experts,
    )


# --- smaller models, recordings and schedules -------------------------------------------------------------------------


def first_layers(model: ModelSpec, layers: int) -> ModelSpec:
    """Return `model` up to its MoE layer number `layers`, counted from one."""
    if layers == model.num_moe_layers:
        return model
    last = model.moe_layers[layers - 1] + 1
    return dataclasses.replace(model.first_layers(last), name=f"{model.name}, {layers} of its MoE layers")


def scaled_model(model: ModelSpec, numerator: int, denominator: int) -> ModelSpec:
    """Return `model` with every width but the vocabulary's and a head's times a fraction, rounded down to multiples of 64."""
    if numerator == denominator:
        return model

    def width(size: int) -> int:
        return _width(size, numerator, denominator) if size else 0

    def share(count: int) -> int:
        return max(1, count * numerator // denominator) if count else 0

    spec, recurrent = model.attention, model.recurrent
    heads, groups = share(spec.num_heads), share(spec.num_kv_heads)
    groups = next(count for count in range(min(groups, heads), 0, -1) if heads % count == 0)
    attention = dataclasses.replace(
        spec,
        num_heads=heads,
        num_kv_heads=heads if spec.num_kv_heads == spec.num_heads else groups,
        q_lora_rank=None if spec.q_lora_rank is None else width(spec.q_lora_rank),
        kv_lora_rank=width(spec.kv_lora_rank),
        vector_parameters=share(spec.vector_parameters),
    )
    if recurrent is not None:
        recurrent = dataclasses.replace(
            recurrent,
            matrix_parameters=max(1, recurrent.matrix_parameters * numerator**2 // denominator**2),
            vector_parameters=share(recurrent.vector_parameters),
            state_values=share(recurrent.state_values),
        )
    return dataclasses.replace(
        model,
        name=f"{model.name}, {numerator}/{denominator} as wide",
        hidden_size=width(model.hidden_size),
        expert_intermediate_size=width(model.expert_intermediate_size),
        shared_intermediate_size=width(model.shared_intermediate_size),
        dense_intermediate_size=width(model.dense_intermediate_size),
        expert_hidden_size=width(model.expert_hidden_size),
        attention=attention,
        recurrent=recurrent,
    )


def first_columns(trace: RoutingTrace, layers: int) -> RoutingTrace:
    """Return a recording's first `layers` MoE layers."""
    if layers == trace.num_layers:
        return trace
    return dataclasses.replace(
        trace,
        experts=trace.experts[:, :layers],
        layer_ids=trace.layer_ids[:layers],
        weights=None if trace.weights is None else trace.weights[:, :layers],
        predicted=None if trace.predicted is None else trace.predicted[:, :layers],
        predicted_prob=None if trace.predicted_prob is None else trace.predicted_prob[:, :layers],
    )


def _fewer(case: Case, model: ModelSpec, layers: int, of: int) -> Case:
    """Return a configuration for the first `layers` of `of` layers: what counts experts over all of them shrinks in proportion."""
    changes: dict[str, Any] = {}
    for section, option in (("cache", "pooled_experts"), ("copy", "host_experts")):
        count = getattr(getattr(case.schedule, section), option)
        if count is not None and layers < of:
            changes[f"{section}__{option}"] = max(1, count * layers // of)
    if case.schedule.cache.host_layers is not None:
        changes["cache__host_layers"] = min(case.schedule.cache.host_layers, layers - 1)
    shape = dataclasses.replace(
        case.shape, name=model.name, hidden=model.hidden_size, intermediate=model.expert_intermediate_size
    )
    return dataclasses.replace(case, schedule=case.schedule.with_options(**changes), shape=shape)


def _keeps_shape(model: ModelSpec, scale: tuple[int, int]) -> bool:
    """Return whether widths rounded to multiples of 64 still stand in about the model's ratio to each other."""
    hidden, inner = _width(model.hidden_size, *scale), _width(model.expert_intermediate_size, *scale)
    if min(hidden, inner) < _WIDTH:
        return False
    planned = model.expert_intermediate_size / model.hidden_size
    return abs(inner / hidden / planned - 1) <= _RATIO_LEEWAY


def _width(size: int, numerator: int, denominator: int) -> int:
    return size * numerator // denominator // _WIDTH * _WIDTH


# --- counting ---------------------------------------------------------------------------------------------------------


class CountingDevice(CpuDevice):
    """A device that gives tensors without memory and counts their bytes."""

    def __init__(self) -> None:
        super().__init__(1 << 62)
        self.place = torch.device("meta")

    def normal(self, shape: Sequence[int], dtype: torch.dtype, what: str, *, scale: float, seed: int) -> torch.Tensor:
        """Return a tensor without memory, counted."""
        return self.empty(shape, dtype, what)


def _formats(schedule: OffloadSchedule, model: ModelSpec) -> set[str]:
    """Return the weight formats that a schedule stores experts in."""
    low = schedule.experts.low_bits
    return {stored_format(schedule, model).name} | ({weight_format(low).name} if low is not None else set())


def _num_slots(given: RunInput) -> int:
    """Return the slots of a run's arena: the cache's, staging, two for a static cache's misses, transient ones."""
    schedule, config = given.schedule, given.config
    cached = 0 if schedule.cache.policy == "none" else int(given.capacities.sum())
    transient = _most_moves(given) if _undecided(given) else int(walk_decisions(given).counts[0].peak_transient)
    return cached + config.staging + 2 + transient


def _most_reads(given: RunInput) -> int:
    """Return the most experts that one layer step reads from disk."""
    if _undecided(given):
        return _most_moves(given)
    state = fresh_state(given.config, given.workload, given.capacities, given.weighed)
    return most_reads(given.config, given.workload, state)


def _undecided(given: RunInput) -> bool:
    """Return whether a run's decisions depend on costs that are not known yet."""
    return needs_prices(given.config) and given.weighed is None


def _most_moves(given: RunInput) -> int:
    """Return a bound of what one layer step moves, whatever it decides: all experts of its layer and of those it may guess."""
    return given.config.num_experts * (1 + given.config.depth)


def _least_places(needs: Needs) -> int:
    """Return how many places the stores must have at least, so that experts come from memory and not from a cache."""
    each = needs.store_bytes or needs.file_bytes
    return min(needs.num_keys, max(DISTINCT, math.ceil(_STORE_BYTES / each)))


def _described(found: Reduced, needs: Needs, places: int, planned: ModelSpec, reason: str) -> Reduced:
    """Return a reduction with what it changed."""
    changes: dict[str, tuple[int, int]] = {}
    if places < needs.num_keys:
        places = max(1, places // DISTINCT) * DISTINCT  # every place has the bytes that its expert would have
        changes["experts_in_memory"] = (needs.num_keys, places)
    mine = found.model
    for name, one, other in (
        ("layers", planned.num_moe_layers, mine.num_moe_layers),
        ("hidden_size", planned.hidden_size, mine.hidden_size),
        ("expert_intermediate_size", planned.expert_intermediate_size, mine.expert_intermediate_size),
    ):
        if one != other:
            changes[name] = (one, other)
    return dataclasses.replace(
        found, places=places if places < needs.num_keys else None, changes=changes, reason=reason
    )


def _all_of(room: Room) -> int:
    return room.host_bytes if room.shared else room.device_bytes + room.host_bytes
