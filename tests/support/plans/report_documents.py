"""Made-up documents for the tests of reports: small, complete, with figures that are easy to recognise on a page."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from moeplan.reports.offload.hit_curves import HitCurve
from moeplan.sim.timeline import LANE_NAMES, OP_NAMES, Timeline, canonical
from moeplan.specs.machines.profile import Profile
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.schedules.offload import OffloadSchedule
from moeplan.specs.schedules.presets import load_preset

GIB = 2**30
LAYERS, EXPERTS = 2, 8


def result(
    name: str, schedule: OffloadSchedule, tokens_per_s: float, *, wrong: float = 0.2, **changes: Any
) -> dict[str, Any]:
    """Return one schedule's part of a plan document, with times that may be off by `wrong` of themselves."""
    window_s = 60 / tokens_per_s
    found = {
        "name": name,
        "schedule": schedule.to_dict(),
        "prefill_tokens_per_s": 3 * tokens_per_s,
        "prefill_tokens_per_s_interval": [2.5 * tokens_per_s, 3.75 * tokens_per_s],
        "ttft_s": 10 / 3 / tokens_per_s,
        "ttft_s_interval": [3 / tokens_per_s, 4 / tokens_per_s],
        "decode_tokens_per_s": tokens_per_s,
        "decode_tokens_per_s_interval": [tokens_per_s / (1 + wrong), tokens_per_s / (1 - wrong)],
        "request_s": None,
        "request_s_interval": None,
        "requests_per_s": None,
        "requests_per_s_interval": None,
        "window_s": window_s,
        "window_s_interval": [(1 - wrong) * window_s, (1 + wrong) * window_s],
        "relative_uncertainty": wrong,
        "step_s": {"mean": 1 / tokens_per_s, "p50": 1 / tokens_per_s, "p99": 1.5 / tokens_per_s},
        "makespan_ns": round(10**9 * 60 / tokens_per_s),
        "num_steps": 50,
        "num_tokens": 60,
        "hits": 300,
        "misses": 100,
        "guessed_hits": 40,
        "ready_hits": 30,
        "late_hits": 10,
        "hit_rate": 0.75,
        "prefetches": 80,
        "prefetches_used": 40,
        "bytes_copied": 60 * 3 * 2**20,
        "bound": "copy",
        "time_share": {"dense": 0.2, "expert": 0.15, "head": 0.05, "launch": 0.05, "copy": 0.5, "host": 0.05},
        "memory_breakdown": {
            "device_bytes": 5 * GIB,
            "host_bytes": 9 * GIB,
            "items": [
                {"name": "dense weights", "place": "device", "bytes": 3 * GIB, "note": "all layers but routed experts"},
                {"name": "resident experts", "place": "device", "bytes": 2 * GIB, "note": "8 experts"},
                {"name": "expert store", "place": "host", "bytes": 9 * GIB, "note": "all experts, page-locked"},
            ],
        },
        "assumptions": ["caches start empty"],
        "engine": "compiled, checked by simpy",
    }
    return found | changes


def plan_document(**changes: Any) -> dict[str, Any]:
    """Return a plan document: two baselines, three references, a front of three points."""
    best = OffloadSchedule(name="best").with_options(
        cache__experts_per_layer=4,
        predictor__kind="next-gate",
        predictor__width=2,
        predictor__staging=3,
        experts__bits="4",
    )
    knowing = best.with_options(name="belady", cache__policy="belady")
    bigger = best.with_options(cache__experts_per_layer=6)
    everything = best.with_options(cache__experts_per_layer=8)
    code = load_preset("mixtral-offloading-code").with_options(cache__experts_per_layer=4)
    document = {
        "schema_version": 1,
        "kind": "offload",
        "provenance": {
            "produced_by": "moeplan 9.9.9",
            "model": "tiny <b>model</b>",
            "hardware": "rtx-4090",
            "memory_bytes": 6 * GIB,
            "window_steps": 50,
            "trace": {"model": "tiny", "source": "made up & small", "num_tokens": 777, "num_layers": LAYERS,
                      "num_experts": EXPERTS, "top_k": 2},
        },
        "request": {
            "bits": ["4", "3"], "objective": "tokens_per_s", "floor_tokens_per_s": None, "concurrency": 1,
            "prefill_chunk_tokens": None,
        },
        "best": result("best", best, 40.0),
        "baselines": [
            result("on-demand", load_preset("on-demand"), 16.0, prefetches=0, prefetches_used=0, guessed_hits=0, ready_hits=0,
                   hit_rate=0.0),
            result("mixtral-offloading-code", code, 25.0, hit_rate=0.5, assumptions=["caches start empty", "only here"]),
        ],
        "baselines_that_do_not_fit": {"resident": "does not fit: resident needs 12 bytes; 5 bytes are missing"},
        "references": {
            "belady": result("belady", knowing, 44.0),
            "memory x1.5": result("memory x1.5", bigger, 60.0),
            "memory x2": result("memory x2", everything, 80.0, wrong=0.5),
        },
        "front": [
            {"level": level, "device_bytes": level * GIB, "prefill_tokens_per_s": None, "decode_tokens_per_s": speed,
             "window_s": 60 / speed, "schedule": best.to_dict()}
            for level, speed in ((3, 20.0), (4, 30.0), (5, 40.0))
        ],
        "ranked_by": "window_s",
        "num_candidates": 2345,
        "num_evaluated": 2000,
        "num_abandoned": 45,
        "num_pruned": 300,
        "lower_bound_step_s": 0.02,
        "optimality_gap": 0.25,
        "verdict": "policy: copy binds; more memory would help",
    }  # fmt: skip
    return copy.deepcopy(document | changes)


def made_up_timeline(num_steps: int = 8, prompt_tokens: int = 5) -> Timeline:
    """Return steps of two layers, the first with a prompt; from step to step each fetch takes 10 ns more."""
    rows: list[tuple[int, ...]] = []
    now = 0

    def add(
        lane: str, op: str, step: int, layer: int, expert: int, start: int, length: int, size: int, tokens: int
    ) -> int:
        rows.append(
            (LANE_NAMES.index(lane), OP_NAMES.index(op), step, layer, expert, start, start + length, size, tokens)
        )
        return start + length

    for step in range(num_steps):
        tokens = prompt_tokens if step == 0 else 1
        for layer in range(LAYERS):
            now = add("compute", "dense", step, layer, -1, now, 100, 0, tokens)
            decided = add("host", "host layer", step, layer, -1, now, 20, 0, 0)
            arrived = add("h2d", "fetch", step, layer, step % EXPERTS, decided, 200 + 10 * step, 4096, 0)
            now = add("compute", "expert", step, layer, step % EXPERTS, arrived, 50, 0, tokens)
        now = add("compute", "head", step, LAYERS - 1, -1, now, 30, 0, tokens)
        now = add("host", "host step", step, LAYERS - 1, -1, now, 20, 0, 0)
    return Timeline(rows=canonical(np.array(rows, np.int64)))


def hit_curves() -> tuple[HitCurve, HitCurve]:
    """Return two curves over eight sizes."""
    sizes = tuple(range(1, EXPERTS + 1))
    lru = HitCurve(
        name="LRU", experts_per_layer=sizes, hit_fraction=tuple(size / 10 for size in sizes), bytes_per_size=2**20
    )
    best = HitCurve(
        name="Belady: knows the future", experts_per_layer=sizes, hit_fraction=tuple((size + 1) / 10 for size in sizes)
    )
    return lru, best


def profile() -> Profile:
    """Return a bundled machine."""
    return load_hardware("rtx-4090")


def validation_document() -> dict[str, Any]:
    """Return a validation of four configurations, the last of which misses its interval."""
    times = (
        ("on-demand, 2", 0.010, 0.0101),
        ("on-demand, 4", 0.020, 0.0196),
        ("best, 2", 0.005, 0.0051),
        ("best, 4", 0.003, 0.0040),
    )
    return {
        "configurations": [
            {"name": name, "predicted_step_s": predicted, "measured_step_s": measured,
             "interval_s": [0.9 * predicted, 1.1 * predicted],
             "measured_interval_s": [0.99 * measured, 1.02 * measured], "counts_equal": True}
            for name, predicted, measured in times
        ],
        "median_relative_error": 0.02, "p90_relative_error": 0.18, "noise_floor": 0.03, "coverage": 0.75, "kendall_tau": 0.95,
        "regret": 0.004, "counts_equal": True, "error_budget": {"as predicted": 0.02, "copy": 0.01, "compute": 0.018},
    }  # fmt: skip
