"""Hypothesis strategies shared by the tests: recordings, schedules and cost tables, small enough to shrink."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from moeplan.sim.offload.costs import HOST_COSTS, CostTables, chunk_sizes, host_costs, rate_table
from moeplan.sim.offload.workload import Workload, build_workload
from moeplan.sim.policies.state import Array, PolicyConfig, make_config
from moeplan.sim.timeline import NUM_RATED_LANES, RATE_ONE
from moeplan.specs.schedules.offload import CACHE_POLICIES, MISS_CHOICES, PLACEMENTS, PREDICTORS, OffloadSchedule
from moeplan.traces.format import RoutingTrace


def make_trace(rng: np.random.Generator, *, num_layers: int, num_experts: int, top_k: int, requests: list[tuple[int, int]],
               guesses: int = 0, skew: float = 0.0) -> RoutingTrace:  # fmt: skip
    """Return a recording with (prompt, decode) lengths per request; skew > 0 makes low-numbered experts popular."""
    total = sum(prompt + decode for prompt, decode in requests)
    weight = np.exp(-skew * np.arange(num_experts))
    keys = rng.random((total, num_layers, num_experts)) ** (1 / weight)
    experts = np.argsort(-keys, axis=2)[:, :, :top_k].astype(np.uint8)
    request = np.repeat(np.arange(len(requests)), [p + d for p, d in requests]).astype(np.int32)
    position = np.concatenate([np.arange(p + d) for p, d in requests]).astype(np.int32)
    phase = np.concatenate([np.r_[np.zeros(p), np.ones(d)] for p, d in requests]).astype(np.uint8)
    predicted = prob = None
    if guesses:
        noise = rng.random((total, num_layers, guesses, num_experts))
        # True choices tend to be guessed: that is what makes a prefetch sometimes right and sometimes wrong.
        for layer in range(num_layers):
            np.put_along_axis(noise[:, layer], np.repeat(experts[:, layer, None, :].astype(int), guesses, 1),
                              rng.random((total, guesses, top_k)) + 0.4, axis=2)  # fmt: skip
        order = np.argsort(-noise, axis=3)[..., : min(4, num_experts)]
        predicted = order.astype(np.int16)
        prob = np.take_along_axis(noise, order, axis=3).astype(np.float16) / 2
        for distance in range(guesses):
            predicted[:, : distance + 1, distance] = -1
            prob[:, : distance + 1, distance] = 0
    return RoutingTrace(
        experts=experts, request=request, position=position, phase=phase, num_experts=num_experts, model="made-up",
        layer_ids=tuple(range(num_layers)), source="test", licence="none", weights=None, predicted=predicted,
        predicted_prob=prob, metadata={},
    )  # fmt: skip


def make_costs(rng: np.random.Generator, workload: Workload, schedule: OffloadSchedule, *, scale: int = 50, host: bool = True,
               coupled: bool = True) -> CostTables:  # fmt: skip
    """Return cost tables of small whole numbers, so that ties are common."""
    layers, experts, most = workload.num_layers, workload.num_experts, workload.max_expert_tokens
    tokens, step_class = np.unique(workload.step_tokens, return_inverse=True)
    num_bytes = int(rng.integers(1, 5)) * 4096
    count, first, last = chunk_sizes(num_bytes, schedule.copy.chunk_bytes)
    many = 1 if schedule.experts.low_bits is None else 2
    formats = np.zeros((layers, experts), np.int64)
    formats[:, : round(schedule.experts.low_fraction * experts)] = 1
    per_chunk = int(rng.integers(1, scale))
    rates = np.full((NUM_RATED_LANES, 2**NUM_RATED_LANES), RATE_ONE, np.int64)
    if coupled:
        slow = {lane: float(rng.uniform(0.3, 1.0)) for lane in ("compute", "h2d", "d2h", "cpu")}
        rates = rate_table(lambda lane, others: slow[lane] ** len(others))
    return CostTables(
        step_class=step_class.astype(np.int64).ravel(),
        dense_ns=rng.integers(1, scale, (len(tokens), layers)),
        head_ns=rng.integers(1, scale, len(tokens)),
        kernel_ns=np.stack([np.r_[0, np.cumsum(rng.integers(0, 4, most)) + rng.integers(1, scale)] for _ in range(many)]),
        grouped_ns=np.array([int(rng.integers(0, scale)) if schedule.kernel.grouping == "grouped" else 0]),
        expert_format=formats.ravel(),
        expert_bytes=np.array([num_bytes, 4096])[:many],
        num_chunks=np.array([count, 1])[:many],
        chunk_bytes=np.array([[first, last], [4096, 4096]])[:many],
        chunk_ns=np.array([[per_chunk, int(rng.integers(1, per_chunk + 1))], [per_chunk, int(rng.integers(1, per_chunk + 1))]])[:many],
        back_ns=rng.integers(1, scale, many),
        cpu_ns=rng.integers(1, 3 * scale, (many, most + 1)).cumsum(1),
        disk_ns=rng.integers(1, 3 * scale, many),
        host_ns=host_costs(**dict(zip(HOST_COSTS.names, (rng.integers(0, scale // 4 + 1, 4) * int(host)).tolist(), strict=True))),
        rate=rates,
    )  # fmt: skip


def config_of(schedule: OffloadSchedule, trace: RoutingTrace) -> PolicyConfig:
    """Return the compiled form of a schedule for a recording."""
    distances, width = (0, 0) if trace.predicted is None else trace.predicted.shape[2:]
    return make_config(schedule, num_layers=trace.num_layers, num_experts=trace.num_experts, top_k=trace.top_k,
                       guess_distances=distances, guess_width=width)  # fmt: skip


def capacities_of(schedule: OffloadSchedule, trace: RoutingTrace) -> Array:
    """Return slots per pool for a schedule that names its own capacity."""
    return np.array(schedule.cache.slots_by_cache(trace.num_layers))


@st.composite
def schedules(draw: st.DrawFn, num_layers: int, num_experts: int) -> OffloadSchedule:
    """Return a valid schedule with its own capacity."""
    policy = draw(st.sampled_from(["none", *CACHE_POLICIES]))
    predictor = draw(st.sampled_from(PREDICTORS))
    settings: dict[str, object] = {"cache.policy": policy, "predictor.kind": predictor}
    if policy != "none":
        if draw(st.booleans()):
            settings["cache.pooled_experts"] = draw(st.integers(1, num_layers * num_experts))
        else:
            settings["cache.experts_per_layer"] = each = draw(st.integers(1, num_experts))
            settings["cache.first_layer_extra"] = draw(st.integers(0, num_experts - each))
        settings["predictor.staging"] = draw(st.integers(1 if policy == "static" and predictor != "none" else 0, 5))
    if predictor not in ("none", "pre-gate"):
        settings["predictor.depth"] = draw(st.integers(1, 3))
    settings["predictor.width"] = draw(st.integers(1, num_experts))
    settings["predictor.recall"] = draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    settings["predictor.seed"] = draw(st.integers(0, 3))
    settings["kernel.grouping"] = draw(st.sampled_from(["per-expert", "grouped"]))
    settings["copy.overlap"] = draw(st.sampled_from([True, True, True, False]))
    settings["copy.write_back"] = draw(st.booleans())
    settings["copy.chunk_bytes"] = draw(st.sampled_from([None, 4096, 8192]))
    if policy == "none" and predictor == "none":
        settings["copy.fetch"] = draw(
            st.sampled_from(["routed", "layer", *(["layer-streamed"] if settings["copy.overlap"] else [])])
        )
    settings["predictor.threshold"] = draw(st.sampled_from([0.0, 0.0, 0.3, 0.7]))
    settings["predictor.benefit"] = draw(st.booleans())
    settings["predictor.library"] = draw(st.integers(1, 3))
    if policy == "static":
        settings["cache.placement"] = draw(st.sampled_from(PLACEMENTS))
    if draw(st.booleans()):
        settings |= {"experts.bits": "16", "experts.low_bits": "4"}
        settings |= draw(
            st.sampled_from([{"experts.low_rank": 0}, {"experts.low_rank": 1}, {"experts.low_fraction": 0.5}])
        )
    if settings["copy.overlap"]:
        if settings.get("copy.fetch", "routed") == "routed":
            settings["kernel.miss"] = draw(st.sampled_from(["fetch", *MISS_CHOICES]))
        settings["copy.cancel"] = draw(st.booleans())
        if not settings["copy.write_back"]:
            settings["copy.host_experts"] = draw(st.sampled_from([None, 1, 2, num_layers * num_experts]))
    settings["workload.concurrency"] = concurrency = draw(st.integers(1, 3))
    settings["workload.prefill_chunk_tokens"] = draw(st.sampled_from([None, 1, 3]))
    settings["cache.reset"] = draw(st.sampled_from(["never", "request"])) if concurrency == 1 else "never"
    from moeplan.specs.schedules.offload import apply_settings

    return apply_settings(OffloadSchedule(name="drawn"), settings)


@st.composite
def runs(draw: st.DrawFn) -> tuple[PolicyConfig, Workload, CostTables, Array, OffloadSchedule, RoutingTrace]:
    """Return everything one run takes: configuration, workload, cost tables, capacities, schedule, recording."""
    num_layers, num_experts = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    top_k = draw(st.integers(1, min(3, num_experts)))
    requests = draw(
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)).filter(lambda r: sum(r) > 0), min_size=1, max_size=4)
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    trace = make_trace(rng, num_layers=num_layers, num_experts=num_experts, top_k=top_k, requests=requests,
                       guesses=draw(st.integers(0, 3)), skew=draw(st.sampled_from([0.0, 0.5])))  # fmt: skip
    schedule = draw(schedules(num_layers, num_experts))
    workload = build_workload(trace, schedule.workload, reset_per_request=schedule.cache.reset == "request",
                              with_next_use=schedule.cache.policy == "belady")  # fmt: skip
    costs = make_costs(
        rng,
        workload,
        schedule,
        scale=draw(st.sampled_from([3, 8, 50])),
        host=draw(st.booleans()),
        coupled=draw(st.booleans()),
    )
    return config_of(schedule, trace), workload, costs, capacities_of(schedule, trace), schedule, trace
