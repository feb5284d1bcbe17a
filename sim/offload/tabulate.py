"""The cost model tabulated once per run into whole nanoseconds.

Modelled: every duration is rounded up to a nanosecond here and nowhere else. A host that itself computes (a CPU device)
pays its launches inside the kernels. Tables at either end of every duration's uncertainty are made the same way.
Ignored: that errors may cancel.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ...base.errors import InputError
from ...base.units import NS_PER_S, seconds_to_ns
from ...calibrate.costs.cost_model import CostModel
from ...calibrate.costs.estimate import Array as FloatArray
from ...calibrate.costs.estimate import Estimate, Times
from ...specs.models import ModelSpec, WeightFormat
from ...specs.schedules.offload import OffloadSchedule
from ..policies.state import Array
from .costs import ONE_AT_A_TIME, CostTables, chunk_sizes, host_costs, rate_table
from .workload import Workload

FAST, AS_IS, SLOW = -1, 0, 1
"""Durations as they are, or at either end of their uncertainty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSources:
    """Where a run's costs come from: one estimate for each kind of activity, and the largest of each."""

    estimates: dict[str, Estimate]
    launch: LaunchTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchTimes:
    """What passes in launching kernels, of the durations in the tables; nanoseconds."""

    step_ns: Array
    """[num_classes]: dense parts of all layers."""
    head_ns: Array
    """[num_classes]."""
    kernel_ns: Array
    """[max_expert_tokens + 1]: of one launch of experts' kernels, by the tokens of each expert."""


def tabulate(costs: CostModel, model: ModelSpec, schedule: OffloadSchedule, workload: Workload, fmt: WeightFormat,
             low: WeightFormat | None = None, *, shift: int = AS_IS) -> tuple[CostTables, CostSources]:  # fmt: skip
    """Return the run's cost tables, with experts stored as `fmt` or, some, as `low`, and where they come from.

    shift: AS_IS, or FAST or SLOW, the ends of each duration's own uncertainty.
    Raises MissingCalibration where the profile has no cost for what the schedule does.
    """
    host = {
        "host_step": _override(schedule.host.per_step_s, costs.host_per_step()),
        "host_layer": _override(schedule.host.per_layer_s, _host_layer(costs, schedule, workload)),
        "host_kernel": _override(schedule.host.per_kernel_s, costs.host_per_kernel()),
        "host_transfer": _override(schedule.host.per_transfer_s, costs.host_per_transfer()),
    }
    host_ns = {name: seconds_to_ns(_shifted(each, shift)) for name, each in host.items()}
    inside_ns = host_ns["host_kernel"] if costs.host_shares_compute else 0
    classes, step_class = costs.remembered(("classes", id(workload)), lambda: (workload, _classes(workload)))[1]
    dense = costs.remembered(
        ("dense", classes.tobytes(), costs.mode, shift, workload.guess),
        lambda: _dense_tables(costs, model, classes, shift, workload.guess),
    )
    grouped = schedule.kernel.grouping == "grouped"
    # With several cards an expert's format says its card too: what it costs, and over which link it comes.
    formats = [(card, each) for card in costs.each_card for each in ((fmt,) if low is None else (fmt, low))]
    if low is not None and len(costs.each_card) > 1:
        raise InputError(
            "experts.low_bits", low.name, "experts of two formats on several cards are not modelled", "leave it out"
        )
    most = workload.max_expert_tokens
    shares = [card.expert_times(most, each, grouped=grouped) for card, each in formats]
    base = costs.grouped_base(fmt) if grouped else None
    base_ns = seconds_to_ns(_shifted(base, shift)) + inside_ns if base is not None else 0
    sizes = [card.moved_bytes(each) for card, each in formats]
    chunks = [chunk_sizes(size, schedule.copy.chunk_bytes) for size in sizes]
    pinned = schedule.copy.pinned
    copies = [
        [card.host_to_device(size, pinned=pinned) for size in (first, last)]
        for (card, _), (_, first, last) in zip(formats, chunks, strict=True)
    ]
    backs = [card.device_to_host(size, pinned=pinned) for (card, _), size in zip(formats, sizes, strict=True)]
    cpu_ns, cpu = np.zeros((len(formats), 0), np.int64), None
    if schedule.kernel.miss != "fetch":
        runs = [[card.cpu_expert(n, each) for n in range(1, most + 1)] for card, each in formats]
        cpu_ns = np.array([[0] + [_at_least_one(run, shift) for run in row] for row in runs], np.int64)
        cpu = runs[0][0]
    reads = [costs.disk_to_host(size) for size in sizes] if schedule.copy.host_experts is not None else []
    tables = CostTables(
        step_class=step_class,
        dense_ns=dense.dense_ns + inside_ns,
        head_ns=dense.head_ns + inside_ns,
        kernel_ns=_kernel_ns(shares, 0 if grouped else inside_ns, shift),
        grouped_ns=np.array([base_ns], np.int64),
        expert_format=_formats(schedule, workload) + _cards(costs, model, workload),
        expert_bytes=np.array(sizes, np.int64),
        num_chunks=np.array([count for count, _, _ in chunks], np.int64),
        chunk_bytes=np.array([[first, last] for _, first, last in chunks], np.int64),
        chunk_ns=np.array([[_at_least_one(copy, shift) for copy in row] for row in copies], np.int64)
        + np.array([0, seconds_to_ns(costs.transfer_wait_s())], np.int64),
        back_ns=np.array([_at_least_one(back, shift) for back in backs], np.int64),
        cpu_ns=cpu_ns,
        disk_ns=np.array([_at_least_one(read, shift) for read in reads] or [0] * len(formats), np.int64),
        host_ns=host_costs(
            step=host_ns["host_step"],
            layer=host_ns["host_layer"],
            kernel=host_ns["host_kernel"] - inside_ns,
            transfer=host_ns["host_transfer"],
        ),
        rate=rate_table(partial(_rate, costs, shift=shift)),
        stages=_stages(costs, model, schedule, workload),
    )  # fmt: skip
    estimates = {
        "dense": dense.dense,
        "head": dense.head,
        "expert": shares[0].at(-1),
        "copy": copies[0][0],
        "write_back": backs[0],
    } | host
    if cpu is not None:
        estimates["cpu"] = cpu
    if reads:
        estimates["disk"] = reads[0]
    first = shares[0].launch_s * NS_PER_S
    launch = LaunchTimes(
        step_ns=dense.launch_ns[:, 0] + inside_ns * dense.dense_ns.shape[1],
        head_ns=dense.launch_ns[:, 1] + inside_ns,
        kernel_ns=np.full(most + 1, base_ns) if grouped else np.append(0, first.astype(np.int64) + inside_ns),
    )
    return tables, CostSources(estimates=estimates, launch=launch)


def everything_stays(schedule: OffloadSchedule, num_layers: int, num_experts: int) -> bool:
    """Return whether a resolved schedule keeps every expert on the device, so that nothing is copied or left to the cores."""
    cache = schedule.cache
    whole = cache.pooled_experts is not None and cache.pooled_experts >= num_layers * num_experts
    whole = whole or (cache.experts_per_layer is not None and cache.experts_per_layer >= num_experts)
    return whole and cache.policy == "static" and cache.reset != "request" and schedule.predictor.kind == "none"


def _stages(costs: CostModel, model: ModelSpec, schedule: OffloadSchedule, workload: Workload) -> Array:
    """Return the `stages` of cost tables: where passes follow each other over cards. Layers without experts go with the next one with."""
    stays = everything_stays(schedule, workload.num_layers, workload.num_experts)
    if costs.most_passes == 1 or not stays:
        return ONE_AT_A_TIME
    cards = [costs.card_of(layer) for layer in model.moe_layers]
    return np.array([*cards, costs.head_card, costs.most_passes], np.int64)


def tables_key(schedule: OffloadSchedule, num_layers: int, num_experts: int) -> tuple[Any, ...]:
    """Return all of a schedule that `tabulate` looks at, its workload's options included: schedules alike in it share their tables."""
    copy = schedule.copy
    return (schedule.experts, schedule.kernel, schedule.host, schedule.workload, schedule.cache.reset, copy.host_experts is None,
            copy.chunk_bytes, copy.pinned, everything_stays(schedule, num_layers, num_experts),
            *host_layer_kind(schedule, num_experts))  # fmt: skip


def _classes(workload: Workload) -> tuple[Array, Array]:
    """Return ([num_classes, 4] tokens, context, requests and guesses of each kind of pass, [num_steps] the kind of each step)."""
    # A prefill pass computes tokens of one request; a decode pass one token of each of its requests, and the guesses that it verifies.
    guesses = np.zeros_like(workload.step_tokens) if workload.step_drafted is None else workload.step_drafted
    requests = np.where(workload.step_phase == 0, 1, workload.step_tokens - guesses)
    kinds = np.stack([workload.step_tokens, workload.step_context, requests, guesses], 1)
    classes, step_class = np.unique(kinds, axis=0, return_inverse=True)
    return classes, step_class.astype(np.int64).ravel()


def _kernel_ns(shares: list[Times], extra_ns: int, shift: int) -> Array:
    """Return [num_formats, max_expert_tokens + 1]: experts' kernels, or their shares of a grouped one."""
    rows = []
    for each in shares:
        seconds = each.seconds * _ends(each.relative_uncertainty, shift)
        if not np.isfinite(seconds).all() or (seconds < 0).any():
            seconds_to_ns(float(seconds[~(np.isfinite(seconds) & (seconds >= 0))][0]))  # says what is wrong
        rows.append(np.append(0, np.maximum(1, np.ceil(seconds * NS_PER_S)).astype(np.int64) + extra_ns))
    return np.stack(rows)


def _host_layer(costs: CostModel, schedule: OffloadSchedule, workload: Workload) -> Estimate:
    """Return the host's time a layer: engines that decide what to fetch, layer by layer, have a time of their own for it.

    A cache whose experts stay is no exception: what it lacks is known once the layer's routing was read back. Gates run early come on top
    where their time is known; the last layers have fewer layers to guess, so a layer has the mean.
    """
    num_layers = workload.num_layers
    fetching, depth = host_layer_kind(schedule, workload.num_experts)
    layer = costs.host_per_fetching_layer() if fetching else costs.host_per_layer()
    guess = costs.host_per_guess() if depth else None
    if guess is None:
        return layer
    guesses = sum(min(depth, num_layers - 1 - column) for column in range(num_layers)) / num_layers
    return layer + dataclasses.replace(guess, seconds=guess.seconds * guesses)


def host_layer_kind(schedule: OffloadSchedule, num_experts: int) -> tuple[bool, int]:
    """Return what the host's time a layer depends on: whether it decides what to fetch, and how far ahead gates run early (0: none do)."""
    held = schedule.cache.experts_per_layer
    some_stay = schedule.cache.policy == "static" and held is not None and held < num_experts
    fetching = schedule.kernel.miss != "cpu" and (schedule.cache.policy != "static" or some_stay)
    return fetching, schedule.predictor.depth if schedule.predictor.kind == "next-gate" else 0


def _formats(schedule: OffloadSchedule, workload: Workload) -> Array:
    """Return int64 [num_layers * num_experts]: the format each expert is stored in, 1 for each layer's least popular ones."""
    formats = np.zeros((workload.num_layers, workload.num_experts), np.int64)
    few = round(schedule.experts.low_fraction * workload.num_experts)
    if few:
        least = np.argsort(workload.popularity, axis=1, kind="stable")[:, :few]
        np.put_along_axis(formats, least, 1, axis=1)
    return formats.ravel()


def _cards(costs: CostModel, model: ModelSpec, workload: Workload) -> Array:
    """Return [num_layers * num_experts]: the card of each expert, that of its layer."""
    return np.repeat(np.array([costs.card_of(layer) for layer in model.moe_layers], np.int64), workload.num_experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _DenseTables:
    """What everything but experts takes, by kind of pass."""

    dense_ns: Array
    """[num_classes, num_layers]."""
    head_ns: Array
    """[num_classes]."""
    launch_ns: Array
    """[num_classes, 2]: of them, what passes in launches: of all layers, of the head."""
    dense: Estimate
    head: Estimate


def _dense_tables(
    costs: CostModel, model: ModelSpec, classes: Array, shift: int, guess: tuple[Estimate, ...]
) -> _DenseTables:
    """Return what everything but experts takes in each kind of pass; guess: what drafting a token of 1, 2, … requests takes, which the
    head's time includes.

    Layers without experts run before the MoE layer that follows them; those after the last one belong to the head.
    """
    groups: list[list[int]] = []
    begin = 0
    for layer in model.moe_layers:
        groups.append(list(range(begin, layer + 1)))
        begin = layer + 1
    tail = range(begin, model.num_layers)
    dense_ns = np.zeros((len(classes), len(groups)), np.int64)
    head_ns, launch_ns = np.zeros(len(classes), np.int64), np.zeros((len(classes), 2), np.int64)
    dense = head = costs.head(1)
    for row, (tokens, context, requests, guesses) in enumerate(classes.tolist()):
        for column, group in enumerate(groups):
            parts = [costs.dense_layer(layer, tokens, context, requests) for layer in group]
            dense = parts[-1]
            dense_ns[row, column] = sum(_at_least_one(part, shift) for part in parts)
            launch_ns[row, 0] += sum(int(part.launch_s * NS_PER_S) for part in parts)
        head = costs.head(requests + guesses)  # logits are wanted of each request's last token only, and of guesses
        drafts = [guess[requests - 1]] * (guesses // requests) if guess else []
        ends = [head, *drafts, *(costs.dense_layer(layer, tokens, context, requests) for layer in tail)]
        head_ns[row] = sum(_at_least_one(part, shift) for part in ends)
        launch_ns[row, 1] = sum(int(part.launch_s * NS_PER_S) for part in ends)
    return _DenseTables(dense_ns=dense_ns, head_ns=head_ns, launch_ns=launch_ns, dense=dense, head=head)


def typical_tokens(workload: Workload) -> float:
    """Return the tokens that an expert gets when it is used, on average over decoding where there is any."""
    decode = np.repeat(workload.steps.step_phase == 1, workload.num_layers)
    counts = np.diff(workload.steps.layer_step_start)
    mine = np.repeat(decode, counts) if decode.any() else np.ones(workload.num_expert_uses, bool)
    return float(workload.steps.layer_step_tokens[mine].mean())


def _override(seconds: float | None, estimate: Estimate) -> Estimate:
    """Return the profile's estimate, or the user's own number in its place (then without uncertainty)."""
    if seconds is None:
        return estimate
    return Estimate(seconds=seconds, source="user", bound="host", relative_uncertainty=0.0)


def _at_least_one(estimate: Estimate, shift: int) -> int:
    """Return an activity's nanoseconds; nothing that runs takes none."""
    return max(1, seconds_to_ns(_shifted(estimate, shift)))


def _shifted(estimate: Estimate, shift: int) -> float:
    """Return an estimate's seconds, or those at an end of its uncertainty."""
    return estimate.seconds * float(_ends(estimate.relative_uncertainty, shift)) if shift else estimate.seconds


def _ends(relative_uncertainty: float | FloatArray, shift: int) -> FloatArray:
    """Return the factor that takes a duration to an end of its uncertainty: errors are ratios, so both ends are as many times away."""
    found: FloatArray = (1 + np.asarray(relative_uncertainty)) ** float(shift)
    return found


def _rate(costs: CostModel, lane: str, companions: frozenset[str], *, shift: int) -> float:
    """Return the speed of `lane` relative to running alone while `companions` run, or that at an end of its uncertainty."""
    rate = costs.rate_fraction(lane, companions)
    if not shift:
        return rate
    return min(1.0, rate / float(_ends(costs.rate_uncertainty(lane, companions), shift)))
