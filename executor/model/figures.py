"""What a run of a model amounts to: speeds, rates, waiting and memory, and its decisions beside a replay of its own recording.

Modelled: the figures that predictions have, from measured times; waiting is the time between two operations of the compute stream
that copies were under way for the one that comes. Decisions are walked again over the recording that the run itself made, by the
simulator's own workload: hits, misses, copies and all other counts must be equal. Ignored: how anything is shown.
"""

from __future__ import annotations

import dataclasses
import resource
from typing import Any

import numpy as np

from ...base.units import KIB, NS_PER_S
from ...sim.offload.run_input import RunInput
from ...sim.policies.state import Array
from ...sim.timeline import (
    COMPUTE,
    CPU,
    DISK,
    H2D,
    HOST,
    OP_CPU,
    OP_EXPERT,
    ROW_BYTES,
    ROW_END,
    ROW_LANE,
    ROW_OP,
    ROW_START,
    ROW_STEP,
    ROW_TOKENS,
)
from ...specs.schedules.offload import OffloadSchedule
from ...traces.recording import DECODE, PREFILL
from ..running.execute import walk_decisions
from ..running.execution import COMPARED
from ..running.overlap import overlap_ns
from ..running.prediction import run_input
from .outcome import ModelRun

_FROM_RECORDING = ("guesses_true", "truths")
"""Counts that say how good guesses were: known once the recording is there, and no decision depends on them."""


def replayed(run: ModelRun, schedule: OffloadSchedule) -> RunInput:
    """Return the input with which the simulator replays a run's own recording under the schedule that made it."""
    given = run_input(schedule, run.recording)
    counts = np.zeros_like(given.workload.popularity) if run.popularity is None else run.popularity
    workload = dataclasses.replace(given.workload, popularity=counts)
    return dataclasses.replace(given, workload=workload, weighed=run.prices)


def differences(run: ModelRun, schedule: OffloadSchedule) -> list[str]:
    """Return in which counts a run differs from the replay of its own recording: none, unless decisions look at observed time."""
    given = replayed(run, schedule)
    walked = walk_decisions(given).counts[0]
    found = []
    for name in COMPARED:
        if name not in _FROM_RECORDING and run.counts[name] != walked[name]:
            found.append(f"{name}: replayed {walked[name]}, run {run.counts[name]}")
    rows = run.timeline.rows
    fetched = int(walked.misses + walked.prefetches + walked.extra_fetches - walked.cpu_runs)
    computed = np.isin(rows[:, ROW_OP], (OP_EXPERT, OP_CPU))
    spec = run.recording
    pairs = {
        "bytes copied": (fetched * run.expert_bytes, bytes_copied(run)),
        "bytes read": (
            int(walked.disk_reads) * run.expert_bytes,
            int(rows[rows[:, ROW_LANE] == DISK, ROW_BYTES].sum()),
        ),
        "experts on the host's cores": (int(walked.cpu_runs), int(np.count_nonzero(rows[:, ROW_OP] == OP_CPU))),
        "expert tokens": (spec.num_tokens * spec.num_layers * spec.top_k, int(rows[computed, ROW_TOKENS].sum())),
        "steps": (given.workload.num_steps, len(run.step_end_ns)),
    }
    return found + [f"{name}: replayed {one}, run {other}" for name, (one, other) in pairs.items() if one != other]


def bytes_copied(run: ModelRun) -> int:
    """Return the bytes that really went to the device."""
    rows = run.timeline.rows
    return int(rows[rows[:, ROW_LANE] == H2D, ROW_BYTES].sum())


def figures(run: ModelRun, schedule: OffloadSchedule) -> dict[str, Any]:
    """Return a run's figures as plain values; None where there is nothing to say."""
    given = replayed(run, schedule)
    walked = walk_decisions(given).counts[0]
    taken = run.step_end_ns - run.step_begin_ns
    prefill, decode = run.step_phase == PREFILL, run.step_phase == DECODE
    prompt_tokens = sum(run.prompts)
    hits, misses = int(run.counts.hits), int(run.counts.misses)
    truths = int(walked.truths)
    firsts = [taken[prefill & (run.step_request == number)].sum() for number in range(len(run.prompts))]
    return {
        "prompt_tokens": prompt_tokens,
        "generated_tokens": sum(map(len, run.tokens)),
        "prefill_tokens_per_s": _rate(prompt_tokens, int(taken[prefill].sum())),
        "decode_tokens_per_s": _rate(int(decode.sum()), int(taken[decode].sum())),
        "ttft_s": float(np.mean(firsts)) / NS_PER_S,
        "step_s": _steps(taken[decode] if decode.any() else taken),
        "hits": hits,
        "misses": misses,
        "hit_rate": hits / max(1, hits + misses),
        "recall": int(walked.guesses_true) / truths if truths else None,
        "guessed_hits": int(run.counts.hits_guessed),
        "ready_hits": run.ready_hits,
        "prefetches": int(run.counts.prefetches),
        "prefetches_used": int(run.counts.prefetches_used),
        "cpu_runs": int(run.counts.cpu_runs),
        "disk_reads": int(run.counts.disk_reads),
        "bytes_copied": bytes_copied(run),
        "stall_per_token_s": _stall_s(run, decode) / max(1, int(decode.sum())) if decode.any() else None,
        "device_bytes": run.device_bytes,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB,
        "replay_differences": differences(run, schedule),
    }


def _rate(tokens: int, ns: int) -> float | None:
    return tokens * NS_PER_S / ns if tokens and ns else None


def _steps(ns: Array) -> dict[str, float]:
    seconds = ns / NS_PER_S
    return {
        "mean": float(seconds.mean()), "p50": float(np.quantile(seconds, 0.5)), "p99": float(np.quantile(seconds, 0.99)),
    }  # fmt: skip


def _stall_s(run: ModelRun, counted: Array) -> float:
    """Return the seconds of the steps `counted` in which nothing was computed and a copy was under way before an expert's kernel."""
    rows = run.timeline.rows
    busy = rows[np.isin(rows[:, ROW_LANE], (COMPUTE, HOST, CPU))]
    starts = rows[(rows[:, ROW_LANE] == COMPUTE) & (rows[:, ROW_OP] == OP_EXPERT)]
    starts = starts[counted[starts[:, ROW_STEP]]]
    ends = np.sort(busy[:, ROW_END])
    before = np.searchsorted(ends, starts[:, ROW_START], side="right") - 1
    gaps = starts.copy()
    gaps[:, ROW_END] = starts[:, ROW_START]
    gaps[:, ROW_START] = np.where(before >= 0, ends[np.maximum(before, 0)], starts[:, ROW_START])
    gaps = gaps[gaps[:, ROW_END] > gaps[:, ROW_START]]
    return float(overlap_ns(gaps, rows[rows[:, ROW_LANE] == H2D]).sum()) / NS_PER_S
