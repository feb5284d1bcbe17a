"""What operations cost inside a run, where caches, neighbours and the engine's own threads are as they are in a run.

A microbenchmark repeats one operation; in a run an expert may have arrived a moment ago and lie in a cache, a copy fills a
slot that nobody has touched for long, the host's Python has been pushed out of the caches by weights. Therefore the engine
itself runs seven schedules with the shapes that are calibrated and routing made up at random, and the rows of its timelines,
sorted by what they did and what ran beside them, become samples:

    transient overlap   nothing is kept, copies on their own thread; once on demand, once guessed one layer ahead
    cached overlap      half of the experts stay, copies on their own thread; without guesses, with, and one launch a layer step
    cached stream       half of the experts stay, victims are copied back, everything on one thread

Modelled: a few layers and experts of each model, as many as a gibibyte holds. Ignored: recordings, cache sizes and batches
other than these; that costs carry over to them is what a validation checks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ...base.units import GIB, NS_PER_S
from ...calibrate.costs.run_kind import (
    AHEAD,
    BESIDE_COPIES,
    CACHED,
    FRESH,
    IN_STREAM,
    NOTHING,
    OVERLAPPED,
    TRANSIENT,
)
from ...calibrate.microbenchmarks.experts import expert_arguments
from ...calibrate.microbenchmarks.measure import Extent
from ...calibrate.samples import Sample
from ...devices.stores.slot_sizes import expert_layout
from ...sim.offload.run_input import RunInput
from ...sim.policies.state import Array
from ...sim.timeline import (
    COMPUTE,
    D2H,
    H2D,
    OP_DENSE,
    OP_EXPERT,
    OP_HEAD,
    ROW_BYTES,
    ROW_END,
    ROW_EXPERT,
    ROW_LANE,
    ROW_LAYER,
    ROW_OP,
    ROW_START,
    ROW_STEP,
    ROW_TOKENS,
)
from ...specs.models import ModelSpec
from ...specs.models.pass_shape import PassShape, dense_arguments, head_arguments
from ...specs.schedules.offload import OffloadSchedule
from ...specs.schedules.presets import load_preset
from ..running.decided import Item, decided_work, launch_of_rows, run_arrivals
from ..running.execute import Progress, execute, open_stage, silent
from ..running.execution import Execution
from ..running.overlap import overlap_ns
from ..running.prediction import run_input
from .host_overheads import fetching_costs, random_routing, resident_costs

_STORE_BYTES = GIB
_WARM_UP_STEPS = 2
_CONTEXT = 128
_ALONE, _TOGETHER = 0.1, 0.7
_DISTINCT = 4
# How many guesses are right where there are any: about what gates applied one layer early reach.
_DIALLED: Mapping[str, object] = {"predictor__kind": "synthetic", "predictor__recall": 0.8}

Key = tuple[str, tuple[tuple[str, str], ...], tuple[tuple[str, float], ...]]


def excerpt_of(model: ModelSpec, bits: str, num_layers: int) -> ModelSpec:
    """Return `model` with at most `num_layers` layers and, where they are large, fewer experts: about a gibibyte if that can be."""
    each = expert_layout(model, bits).slot_bytes
    least = min(model.num_experts, 2 * model.top_k)
    layers = max(1, min(num_layers, model.num_moe_layers, _STORE_BYTES // (least * each)))
    experts = max(least, min(model.num_experts, _STORE_BYTES // (layers * each)))
    last = model.moe_layers[layers - 1] + 1
    return dataclasses.replace(model.first_layers(last), num_experts=experts)


def measure_runs(
    models: Sequence[ModelSpec],
    bits: Sequence[str],
    extent: Extent,
    *,
    device: str = "cpu",
    progress: Progress = silent,
) -> list[Sample]:
    """Return samples of kinds run_expert, run_dense, run_head, run_copy and host from runs with the shapes of `models`.

    Raises DoesNotFit where even an excerpt of a model exceeds the device.
    """
    found: dict[Key, list[float]] = {}
    chosen = np.unique(np.linspace(0, len(models) - 1, extent.run_shapes or len(models)).astype(int)).tolist()
    for number, model in enumerate(models[at] for at in chosen):
        for place, kind in enumerate(bits):
            progress(number * len(bits) + place, len(chosen) * len(bits), f"runs of {model.name} in {kind} bits")
            excerpt = excerpt_of(model, kind, extent.run_layers)
            for key, seconds in _measure_model(excerpt, kind, extent.run_passes, device).items():
                found.setdefault(key, []).extend(seconds)
    return samples_of(found)


def samples_of(found: Mapping[Key, Sequence[float]]) -> list[Sample]:
    """Return durations, gathered by what they are of, as samples."""
    return [
        Sample(kind=kind, labels=dict(labels), arguments=dict(arguments), seconds=tuple(seconds))
        for (kind, labels, arguments), seconds in found.items()
    ]


def _measure_model(
    model: ModelSpec, bits: str, passes: Sequence[tuple[int, int]], device: str
) -> dict[Key, list[float]]:
    found: dict[Key, list[float]] = {}
    traces = {batch: random_routing(model, steps=steps, requests=batch, context=_CONTEXT) for batch, steps in passes}
    inputs = [
        (mode, batch, run_input(schedule.with_options(workload__concurrency=batch), trace))
        for mode, schedule in calibrated_schedules(model, bits)
        for batch, trace in traces.items()
    ]
    workloads = [given.workload for _, _, given in inputs]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with open_stage(model, workloads, device=device, dtype=dtype, distinct_experts=_DISTINCT) as stage:
        for mode, _, given in inputs:
            ran = execute(stage, given)
            rows = undisturbed(ran)
            if mode is None:
                add_host(found, resident_costs(rows, stage.device.asynchronous))
                continue
            if mode[0] == TRANSIENT and given.schedule.predictor.kind == "none":
                add_host(found, fetching_costs(rows))
            kinds = operations(model, stage.dense.groups, stage.dense.dtype.itemsize, given, bits, mode, rows)
            for key, seconds in kinds.items():
                found.setdefault(key, []).extend(seconds)
    return found


def undisturbed(ran: Execution) -> Array:
    """Return a run's rows after its warm-up, without those of layer steps that another program interrupted.

    Where that leaves none of a kind of operation, all of that kind count: on a busy machine long ones are always interrupted.
    """
    rows = ran.timeline.rows[ran.timeline.rows[:, ROW_STEP] >= _WARM_UP_STEPS]
    kept = ~ran.disturbed[rows[:, ROW_STEP], rows[:, ROW_LAYER]]
    for op in np.unique(rows[:, ROW_OP]):
        mine = rows[:, ROW_OP] == op
        if not kept[mine].any():
            kept |= mine
    return rows[kept]


def calibrated_schedules(
    model: ModelSpec, bits: str, *, guessing: Mapping[str, object] = _DIALLED
) -> list[tuple[tuple[str, str] | None, OffloadSchedule]]:
    """Return schedules with their modes; None stands for one that copies nothing. guessing: options of those that guess."""
    half = max(1, model.num_experts // 2)
    lru = {"predictor__kind": "none", "predictor__staging": 0, "cache__experts_per_layer": half}
    plain = {"experts__bits": bits, "kernel__grouping": "per-expert"}
    all_of_them = {"cache__experts_per_layer": model.num_experts}
    guesses = {**guessing, "predictor__staging": 4}
    ahead = {} if guessing is _DIALLED else guessing
    caching, code = load_preset("mixtral-offloading"), load_preset("mixtral-offloading-code")
    return [
        (None, load_preset("resident").with_options(**plain, **all_of_them)),
        ((TRANSIENT, OVERLAPPED), load_preset("on-demand").with_options(**plain)),
        ((TRANSIENT, OVERLAPPED), load_preset("pre-gated").with_options(**plain, **ahead)),
        ((CACHED, OVERLAPPED), caching.with_options(**plain, **lru)),
        ((CACHED, OVERLAPPED), caching.with_options(**plain, **(lru | guesses))),
        ((CACHED, OVERLAPPED), caching.with_options(**plain, **lru).with_options(kernel__grouping="grouped")),
        ((CACHED, IN_STREAM), code.with_options(**plain, **lru)),
    ]


def add_host(found: dict[Key, list[float]], lengths: Mapping[str, Sequence[int]]) -> None:
    """Add what the host was busy with, in nanoseconds by what it was."""
    for what, taken in lengths.items():
        key: Key = ("host", (("what", what),), ())
        found.setdefault(key, []).extend(max(ns, 100) / NS_PER_S for ns in taken)


def operations(
    model: ModelSpec, groups: Sequence[Sequence[int]], itemsize: int, given: RunInput, bits: str, mode: tuple[str, str], rows: Array
) -> dict[Key, list[float]]:  # fmt: skip
    """Return the durations of a run's operations, by what they did and what ran beside them.

    groups: for each MoE layer the decoder layers that end with it. itemsize: bytes of a number of the dense part.
    """
    contexts, arrivals = given.workload.step_context, run_arrivals(given)
    decodes = given.workload.step_phase == 1
    copies = rows[rows[:, ROW_LANE] == H2D]
    backs = rows[rows[:, ROW_LANE] == D2H]
    compute = rows[rows[:, ROW_LANE] == COMPUTE]
    found: dict[Key, list[float]] = {}
    common = {"bits": bits, "cache": mode[0], "stream": mode[1]}
    together = round(len(arrivals) / max(1, given.workload.num_steps * given.config.num_layers))
    launches = decided_work(given).launches if given.config.grouped else {}
    kernels, places = compute[:, ROW_OP] == OP_EXPERT, np.zeros(len(compute), np.int64)
    places[kernels] = launch_of_rows(compute[kernels])
    shares = _shares(compute, copies)
    for row, share, place in zip(compute.tolist(), shares.tolist(), places.tolist(), strict=True):
        beside = _beside(share)
        if beside is None:
            continue
        labels, tokens = common | {"beside": beside}, row[ROW_TOKENS]
        if row[ROW_OP] == OP_EXPERT and given.config.grouped:
            items = launches[row[ROW_STEP], row[ROW_LAYER]][place]
            arguments, kind = _grouped_arguments(model, arrivals, row, items), "run_grouped"
        elif row[ROW_OP] == OP_EXPERT:
            labels["state"] = arrivals[row[ROW_STEP], row[ROW_LAYER], row[ROW_EXPERT]]
            arguments = expert_arguments(model, tokens) | {"experts": together}
            kind = "run_expert"
        elif row[ROW_OP] == OP_DENSE:
            # Contexts differ from pass to pass; they are short here, and rounding them up puts rows together.
            context = -(-int(contexts[row[ROW_STEP]]) // 64) * 64
            requests = tokens if decodes[row[ROW_STEP]] else 1
            shape = PassShape(tokens=tokens, context_tokens=max(context, tokens), requests=requests)
            arguments, kind = dense_arguments(model, list(groups[row[ROW_LAYER]]), shape, itemsize), "run_dense"
        elif row[ROW_OP] == OP_HEAD:
            arguments, kind = head_arguments(model, tokens if decodes[row[ROW_STEP]] else 1, itemsize), "run_head"
        else:
            continue
        _note(found, kind, labels, arguments, row)
    for direction, moved in (("h2d", copies), ("d2h", backs)):
        for row, share in zip(moved.tolist(), _shares(moved, compute).tolist(), strict=True):
            beside = _beside(share)
            if beside is not None:
                labels = common | {"beside": beside, "direction": direction}
                _note(found, "run_copy", labels, {"bytes": row[ROW_BYTES], "experts": together}, row)
    return found


def _grouped_arguments(
    model: ModelSpec, arrivals: Mapping[tuple[int, int, int], str], row: Sequence[int], items: Sequence[Item]
) -> dict[str, float]:
    """Return what one launch computed: tokens of all its experts, how many these were, and how many had just arrived."""
    states = [arrivals[row[ROW_STEP], row[ROW_LAYER], expert] for expert, _, _ in items]
    counts = {"experts": len(states), "fresh": states.count(FRESH), "ahead": states.count(AHEAD)}
    return expert_arguments(model, row[ROW_TOKENS]) | counts


def _note(
    found: dict[Key, list[float]], kind: str, labels: Mapping[str, str], arguments: Mapping[str, float], row: list[int]
) -> None:
    key = (kind, tuple(sorted(labels.items())), tuple(arguments.items()))
    found.setdefault(key, []).append(max(1, row[ROW_END] - row[ROW_START]) / NS_PER_S)


def _shares(rows: Array, others: Array) -> Array:
    """Return for each row the share of its time in which one of `others` ran too."""
    shares: Array = overlap_ns(rows, others) / np.maximum(rows[:, ROW_END] - rows[:, ROW_START], 1)
    return shares


def _beside(share: float) -> str | None:
    """Return what ran beside an operation; None where it was there for a part of the time."""
    return NOTHING if share <= _ALONE else BESIDE_COPIES if share >= _TOGETHER else None
