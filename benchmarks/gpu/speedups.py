"""Stage 4: how much faster the papers' schedules are than their baselines, measured here and predicted with stage 2's profile.

    Mixtral-offloading   (arXiv 2312.17238) with Mixtral-8x7B's experts in 4, 3 and 2 bits, four of eight cached in each layer: whole
                         layers fetched; only what was chosen; LRU; LRU and the next gate's guesses; the public code (LRU, one stream,
                         victims copied back); a lookahead gate of synthetic recall, one and two layers deep
    Pre-gated MoE        (arXiv 2308.12066) with Switch-Large-128's experts in float32 and bfloat16, nothing cached: on demand; every
                         expert of the next block; the next block's choice

Published figures stand beside them with the machines they were measured on: their links, hosts and kernels are others than these,
so only the order and the rough size compare. Modelled: batch 1, decoding, after a short prompt; one synthetic request with the
published locality; the synthetic predictor's recalls are assumptions. Ignored: quality.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moeplan.base.errors import InputError
from moeplan.calibrate.costs.load import check_profile_matches
from moeplan.devices.device import available_host_bytes
from moeplan.devices.stores.slot_sizes import expert_layout
from moeplan.executor.running.execute import open_stage
from moeplan.executor.running.prediction import run_input
from moeplan.executor.validation.grid import Case, Shape
from moeplan.executor.validation.validate import costs_of, validate_cases
from moeplan.sim.offload.run_input import RunInput
from moeplan.specs.machines.profile import Profile
from moeplan.specs.models import ModelSpec
from moeplan.specs.schedules.offload import OffloadSchedule
from moeplan.specs.schedules.presets import load_preset
from moeplan.traces.recording import RoutingTrace

from .expected import expected_s
from .models import layers_that_fit, mixtral, mixtral_trace, switch_large, switch_trace
from .opening import open_results
from .profile import load_profile, needed
from .results import Part

_MIXTRAL_LAYERS, _SWITCH_BLOCKS = 32, 12
_CACHED = 4
_SEED = 5
# Recall of a trained lookahead gate one layer ahead: an assumption between the 0.68–0.83 measured for untrained gates of a small
# model and the 0.96 reported for the first choice (HOBBIT, arXiv 2411.01433).
_RECALL = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Tokens per second that a paper gives for a schedule."""

    source: str
    machine: str
    tokens_per_s: Mapping[str, float]


# Tables of arXiv 2312.17238 §4 (OpenAssistant prompts, batch 1), A100-80GB.
_MIXTRAL_A100 = {
    "2": {"LRU + next gate": 3.061, "LRU": 2.918, "on demand": 2.265, "whole layers": 1.392},
    "3": {"LRU + next gate": 2.845, "LRU": 2.683, "on demand": 2.055, "whole layers": 1.246},
}
# Abstract of Computer Standards & Interfaces 94, 103996 (2025): throughput over Mixtral-offloading.
_LOOKAHEAD_GAIN = {"4": 1.5772, "3": 1.6000, "2": 1.6226}
# arXiv 2308.12066, figures of block latency and throughput with Switch-Large-128 on an A100-80GB, float32.
_PRE_GATED = {
    "throughput over on demand": 1.6,
    "block latency over on demand": 1.9,
    "block latency over all ahead": 125.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One part: schedules of one model in one weight format."""

    model: ModelSpec
    cases: tuple[tuple[Case, RunInput], ...]
    baselines: tuple[str, ...]
    repeats: int
    facts: Mapping[str, Any]
    """What stands beside the figures: sizes, notes, what was published."""


def run(out: Path, *, dry: bool, deadline_s: float) -> bool:
    """Measure what is not measured yet, write speedups.json; return whether all of it is done with equal counts."""
    began = open_results(out, "speedups", dry=dry, deadline_s=deadline_s)
    kind, results = began.kind, began.results
    profile = load_profile(out, needed(dry=dry))
    check_profile_matches(profile, kind=kind, name=str(began.told["name"]))
    jobs = {f"Mixtral-offloading, {bits} bits": (partial(_mixtral, bits, dry=dry), False) for bits in ("2", "4", "3")}
    formats = {"bfloat16": "16", "float32": "32"}
    jobs |= {f"Pre-gated MoE, {name}": (partial(_switch, bits, dry=dry), True) for name, bits in formats.items()}
    parts: list[Part] = []
    expected: dict[str, float | None] = {}
    for name, (prepare, plain) in jobs.items():
        # Switch-Large's experts are plain: stage 2 measures them last, and nothing else waits for them.
        known = partial(load_profile, out, needed(dry=dry, with_plain=True)) if plain else partial(_same, profile)
        parts.append((name, partial(_compare, prepare, known, kind)))
        if name not in results.parts and time.monotonic() < deadline_s:
            expected[name] = _expected(prepare(), known, kind, deadline_s)
    results.run(parts, expected_s=expected)
    done = results.close(targets=[], warnings=list(began.warnings))
    return done and all(row["counts_equal"] for part in results.parts.values() for row in part["schedules"])


def mixtral_schedules(bits: str) -> dict[str, OffloadSchedule]:
    """Return the rows of Mixtral-offloading's comparison, and lookahead gates, by what they do."""
    lru = {"cache__experts_per_layer": _CACHED, "experts__bits": bits}
    paper = load_preset("mixtral-offloading").with_options(**lru)
    synthetic = paper.with_options(predictor__kind="synthetic", predictor__recall=_RECALL)
    return {
        "whole layers": load_preset("naive").with_options(experts__bits=bits),
        "on demand": load_preset("on-demand").with_options(experts__bits=bits),
        "public code": load_preset("mixtral-offloading-code").with_options(**lru),
        "LRU": paper.with_options(predictor__kind="none", predictor__staging=0),
        "LRU + next gate": paper,
        f"lookahead, recall {_RECALL:g}, 1 layer": synthetic,
        f"lookahead, recall {_RECALL:g}, 2 layers": synthetic.with_options(predictor__depth=2, predictor__staging=8),
    }


def switch_schedules(bits: str) -> dict[str, OffloadSchedule]:
    """Return the schedules of Pre-gated MoE's comparison, by what they do."""
    gate = load_preset("pre-gated").with_options(experts__bits=bits)
    return {
        "on demand": load_preset("on-demand").with_options(experts__bits=bits),
        "all ahead": gate.with_options(predictor__kind="all"),
        "pre-gated": gate,
    }


def _mixtral(bits: str, *, dry: bool) -> Job:
    wanted = 4 if dry else _MIXTRAL_LAYERS
    slot_bytes = expert_layout(mixtral(1, dry=dry), bits).slot_bytes
    layers = layers_that_fit(wanted, 8, slot_bytes, available_host_bytes())
    model = mixtral(layers, dry=dry)
    trace = mixtral_trace(layers, prompt=4, decode=5 if dry else 20, seed=_SEED)
    return Job(
        model=model,
        cases=_cases(model, trace, mixtral_schedules(bits)),
        baselines=("whole layers", "on demand", "public code", "LRU + next gate"),
        repeats=1 if dry else 2,
        facts={
            "num_layers": layers,
            "notes": _shrunk(layers, wanted, "layers"),
            "published": {
                "tokens_per_s": _MIXTRAL_A100.get(bits),
                "machine": "A100-80GB SXM",
                "source": "arXiv 2312.17238",
                "lookahead_over_mixtral_offloading": _LOOKAHEAD_GAIN[bits],
                "lookahead_source": "Computer Standards & Interfaces 94, 103996 (2025), abstract",
            },
        },
    )


def _switch(bits: str, *, dry: bool) -> Job:
    wanted = 3 if dry else _SWITCH_BLOCKS
    small = switch_large(1, dry=dry)
    slot_bytes = expert_layout(small, bits).slot_bytes
    blocks = layers_that_fit(wanted, small.num_experts, slot_bytes, available_host_bytes())
    model = switch_large(blocks, dry=dry)
    trace = switch_trace(blocks, model.num_experts, prompt=4, decode=4 if dry else 12, seed=_SEED)
    return Job(
        model=model,
        cases=_cases(model, trace, switch_schedules(bits)),
        baselines=("on demand", "all ahead"),
        repeats=1 if dry else 2,
        facts={
            "num_blocks": blocks,
            "notes": [*_shrunk(blocks, wanted, "MoE blocks"), "a decoder-only model: no encoder, no cross-attention"],
            "published": {**_PRE_GATED, "machine": "A100-80GB, float32", "source": "arXiv 2308.12066"},
        },
    )


def _cases(
    model: ModelSpec, trace: RoutingTrace, schedules: Mapping[str, OffloadSchedule]
) -> tuple[tuple[Case, RunInput], ...]:
    shape = Shape(name=model.name, hidden=model.hidden_size, intermediate=model.expert_intermediate_size)
    return tuple(
        (Case(name=name, shape=shape, schedule=one, group=model.name), run_input(one, trace))
        for name, one in schedules.items()
    )


def _same(profile: Profile) -> Profile:
    return profile


def _expected(job: Job, known: Callable[[], Profile], kind: str, deadline_s: float) -> float | None:
    try:
        profile = known()
    except InputError:  # the part itself says what is missing
        return None
    runs = [(given, job.model) for _, given in job.cases]
    return expected_s(runs, profile, kind, rounds=job.repeats + 1, deadline_s=deadline_s)


def _compare(prepare: Callable[[], Job], known: Callable[[], Profile], kind: str) -> dict[str, Any]:
    """Return measured and predicted speed of every schedule of a job."""
    profile, job = known(), prepare()
    costs = costs_of(profile, job.model, kind)
    with open_stage(job.model, [given.workload for _, given in job.cases], device=kind, distinct_experts=2) as stage:
        found = validate_cases(job.cases, stage, costs, repeats=job.repeats)
    rows = [{**one.compared.to_dict(), "error_budget": dict(one.budget)} for one in found]
    return {**job.facts, "schedules": rows, "speedups": _speedups(rows, job.baselines)}


def _speedups(rows: list[dict[str, Any]], baselines: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return, for each baseline and every other schedule, how much faster that is: measured and predicted."""
    by_name = {row["name"]: row for row in rows}
    return [
        {
            "schedule": row["name"],
            "baseline": name,
            "measured": by_name[name]["measured_step_s"] / row["measured_step_s"],
            "predicted": by_name[name]["predicted_step_s"] / row["predicted_step_s"],
        }
        for name in baselines
        for row in rows
        if row["name"] != name
    ]


def _shrunk(got: int, wanted: int, what: str) -> list[str]:
    return [] if got == wanted else [f"{got} {what} instead of {wanted}: the host's memory holds no more"]
