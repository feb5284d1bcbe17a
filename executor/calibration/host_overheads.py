"""What this engine costs its host, measured by running it on a model too small to compute anything.

    layer      from the routing being known to the decision turned into transfers and launches
    transfer   submitting one
    kernel     between one operation of the compute stream and the next (on CUDA: launching one)
    step       between the head and the next forward pass
    piece      between one piece of a copy and the next that waited
    start      from a submission to an idle copy engine's first byte
    wake       from an arrival to the start of the kernel that waited for it

Modelled: the very program, policies and threads of a real run; the model has as many experts and layers as the real
one. Ignored: how these costs grow with more tokens than a decode step has.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch

from ...base.units import NS_PER_S
from ...calibrate.samples import Sample
from ...sim.offload.run_input import RunInput
from ...sim.offload.workload import build_workload
from ...sim.policies.state import Array, make_config
from ...sim.timeline import (
    COMPUTE,
    H2D,
    OP_DENSE,
    OP_EXPERT,
    OP_HOST_LAUNCH,
    OP_HOST_LAYER,
    OP_HOST_STEP,
    OP_HOST_SUBMIT,
    ROW_END,
    ROW_LANE,
    ROW_LAYER,
    ROW_OP,
    ROW_START,
    ROW_STEP,
)
from ...specs.models import ModelSpec
from ...specs.schedules.offload import OffloadSchedule
from ...specs.schedules.presets import load_preset
from ...traces.recording import RoutingTrace
from ..running.execute import execute, open_stage

_HIDDEN = 64
_LAYERS = 4
_LEAST_NS = 100


def tiny_like(model: ModelSpec) -> ModelSpec:
    """Return a model with as many experts and choices as `model` and next to nothing in them."""
    attention = dataclasses.replace(
        model.attention,
        kind="gqa",
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        v_head_dim=16,
        q_lora_rank=None,
        kv_lora_rank=0,
        qk_rope_head_dim=0,
        qk_nope_head_dim=0,
        gated=False,
        projections=None,
        extra_matrix_parameters=0,
        key_is_value=False,
        tokens_per_entry=1,
        compressed=False,
        index_values=0,
        selected=None,
    )
    layers = min(_LAYERS, model.num_moe_layers)
    return dataclasses.replace(
        model,
        name=f"{model.name} made tiny",
        hidden_size=_HIDDEN,
        num_layers=layers,
        moe_layers=tuple(range(layers)),
        expert_intermediate_size=_HIDDEN,
        vocab_size=64,
        attention=attention,
        num_shared_experts=0,
        shared_intermediate_size=0,
        dense_intermediate_size=0,
        sliding_layers=(),
        sliding_window=None,
        recurrent=None,
        recurrent_layers=(),
        num_encoder_layers=0,
        encoder_moe_layers=(),
        cross_attention=False,
        other_parameters=0,
        expert_hidden_size=0,
        zero_experts=0,
        layer_variants=(),
    )


def random_routing(model: ModelSpec, *, steps: int, requests: int = 1, context: int = 0, seed: int = 0) -> RoutingTrace:
    """Return a recording of `requests` requests that decode `steps` tokens after `context` others, all choosing at random."""
    rng = np.random.default_rng(seed)
    keys = rng.random((requests * steps, model.num_moe_layers, model.num_experts))
    experts = np.argsort(keys, axis=2)[:, :, : model.top_k]
    wide = np.uint8 if model.num_experts <= 256 else np.uint16
    return RoutingTrace(
        experts=experts.astype(wide),
        request=np.repeat(np.arange(requests, dtype=np.int32), steps),
        position=np.tile(np.arange(context, context + steps, dtype=np.int32), requests),
        phase=np.ones(requests * steps, np.uint8),
        num_experts=model.num_experts,
        model=model.name,
        layer_ids=tuple(range(model.num_moe_layers)),
        source="made up at random to measure overheads",
        licence="none",
        weights=None,
        predicted=None,
        predicted_prob=None,
        metadata={},
    )


def measure_host(model: ModelSpec, *, device: str = "cpu", steps: int = 60) -> list[Sample]:
    """Return the engine's own costs as samples of kind `host`."""
    tiny = tiny_like(model)
    trace = random_routing(tiny, steps=steps)
    bits = "32" if device == "cpu" else "16"
    cached = load_preset("resident").with_options(
        cache__experts_per_layer=tiny.num_experts, kernel__grouping="per-expert", experts__bits=bits
    )
    fetched = load_preset("on-demand").with_options(experts__bits=bits)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    found: dict[str, list[int]] = {}
    workload = build_workload(trace, cached.workload)
    with open_stage(tiny, [workload], device=device, dtype=dtype) as stage:
        for schedule in (cached, fetched):
            rows = execute(stage, _input(schedule, tiny, trace)).timeline.rows
            rows = rows[rows[:, ROW_STEP] >= steps // 6]  # the first steps warm up
            asynchronous = stage.device.asynchronous
            for name, taken in (
                resident_costs(rows, asynchronous) if schedule is cached else fetching_costs(rows)
            ).items():
                found.setdefault(name, []).extend(taken)
    return [
        Sample(
            kind="host", labels={"what": name}, arguments={}, seconds=tuple(max(t, _LEAST_NS) / NS_PER_S for t in taken)
        )
        for name, taken in found.items()
        if taken
    ]


def _input(schedule: OffloadSchedule, model: ModelSpec, trace: RoutingTrace) -> RunInput:
    config = make_config(
        schedule,
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        guess_distances=0,
        guess_width=0,
    )
    return RunInput(
        schedule=schedule,
        config=config,
        workload=build_workload(trace, schedule.workload),
        capacities=np.array(schedule.cache.slots_by_cache(trace.num_layers)),
    )


def resident_costs(rows: Array, asynchronous: bool) -> dict[str, list[int]]:
    """Return what a run in which nothing is copied tells: kernel and step."""
    found = {"step": _lengths(rows, OP_HOST_STEP)}
    if asynchronous:
        found["kernel"] = _lengths(rows, OP_HOST_LAUNCH)
        return found
    compute = rows[rows[:, ROW_LANE] == COMPUTE]
    host = rows[np.isin(rows[:, ROW_OP], (OP_HOST_LAYER, OP_HOST_STEP))]
    gaps = []
    for before, after in itertools.pairwise(compute):
        inside = host[(host[:, ROW_START] >= before[ROW_END] - _LEAST_NS) & (host[:, ROW_END] <= after[ROW_START])]
        gaps.append(int(after[ROW_START] - before[ROW_END] - (inside[:, ROW_END] - inside[:, ROW_START]).sum()))
    found["kernel"] = gaps
    return found


def fetching_costs(rows: Array) -> dict[str, list[int]]:
    """Return what a run in which every expert is fetched tells: layer, transfer, piece, start and wake."""
    found: dict[str, list[int]] = {"layer": _lengths(rows, OP_HOST_LAYER), "transfer": _lengths(rows, OP_HOST_SUBMIT)}
    copies = rows[rows[:, ROW_LANE] == H2D]
    kernels = rows[rows[:, ROW_OP] == OP_EXPERT]
    submits = rows[rows[:, ROW_OP] == OP_HOST_SUBMIT]
    layer_steps = {(row[ROW_STEP], row[ROW_LAYER]) for row in rows[rows[:, ROW_OP] == OP_DENSE].tolist()}
    for step, layer in layer_steps:
        moved, ran, asked = (
            part[(part[:, ROW_STEP] == step) & (part[:, ROW_LAYER] == layer)] for part in (copies, kernels, submits)
        )
        if len(moved) and len(asked):
            found.setdefault("start", []).append(int(moved[0, ROW_START] - asked[0, ROW_END]))
            found.setdefault("piece", []).extend((moved[1:, ROW_START] - moved[:-1, ROW_END]).tolist())
        if len(moved) and len(ran) and ran[-1, ROW_START] > moved[-1, ROW_END]:
            found.setdefault("wake", []).append(int(ran[0, ROW_START] - moved[0, ROW_END]))
    return found


def _lengths(rows: Array, op: int) -> list[int]:
    mine = rows[rows[:, ROW_OP] == op]
    lengths: list[int] = (mine[:, ROW_END] - mine[:, ROW_START]).tolist()
    return lengths
