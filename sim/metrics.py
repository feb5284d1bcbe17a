"""What a run amounts to: rates, shares, counts and an error bar, from an engine's outcome.

Modelled: every figure is derived from whole nanoseconds and whole counts, so two engines that agree give the same figures.
`docs/metrics.md` gives each formula. Ignored: how the figures are shown.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..units import NS_PER_S
from . import clock_fields as fields
from .engines import Outcome
from .policies import state as ps
from .policies.state import Array
from .tabulate import CostSources
from .workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """The figures of one run."""

    tokens_per_s: float
    """Generated tokens per second of the whole run, prompts included in its time; where nothing is generated, prompt tokens."""
    decode_tokens_per_s: float | None
    """Generated tokens per second of decode steps alone."""
    prefill_tokens_per_s: float | None
    """Prompt tokens per second of prefill steps alone."""
    step_s: dict[str, float]
    """mean, p50 and p99 duration of decode steps; of prefill steps where nothing is generated."""
    makespan_ns: int
    num_steps: int
    num_tokens: int
    hits: int
    misses: int
    guessed_hits: int
    """Hits that a prefetch had brought."""
    ready_hits: int
    """Guessed hits whose bytes had arrived when the layer was decided."""
    late_hits: int
    hit_rate: float
    prefetches: int
    prefetches_used: int
    extra_fetches: int
    """Experts fetched only because whole layers are."""
    recall: float | None
    """Share of the experts really used that were guessed one layer ahead; None without guesses."""
    bytes_copied: int
    bytes_written_back: int
    cpu_runs: int
    """Misses that the host's cores computed; they move no bytes."""
    disk_reads: int
    cancelled: int
    """Prefetches dropped before their copy began; not counted among the prefetches."""
    low_precision_fetches: int
    peak_transient_experts: int
    busy_fraction: dict[str, float]
    """Share of the makespan each lane was busy."""
    time_share: dict[str, float]
    """Where the time of all steps went: dense, expert, head, waiting for copies, for experts on the host's cores, and for
    the host; sums to 1."""
    bound: str
    """What binds: the largest of copy, compute, cpu and host in `time_share`."""
    relative_uncertainty: float


def summarise(outcome: Outcome, workload: Workload, sources: CostSources) -> Metrics:
    """Return the metrics of a twin outcome (a SimPy outcome has no busy times of its own)."""
    count, clock = outcome.counts, outcome.clock
    steps = np.diff(np.concatenate(([0], outcome.step_end)))
    decode = _rate(workload, steps, 1)
    prefill = _rate(workload, steps, 0)
    counted = steps[workload.step_phase == (0 if decode is None else 1)]
    lookups = int(count[ps.HITS] + count[ps.MISSES])
    makespan = max(outcome.makespan_ns, 1)
    busy_h2d = int(clock[fields.BUSY_DEMAND] + clock[fields.BUSY_PREFETCH])
    compute = int(clock[fields.BUSY_DENSE] + clock[fields.BUSY_EXPERT] + clock[fields.BUSY_HEAD])
    total = max(int(outcome.step_end[-1]), 1)
    host_share = max(0, total - compute - int(clock[fields.STALL_COPY]) - int(clock[fields.STALL_CPU]))
    share = {
        "dense": clock[fields.BUSY_DENSE] / total,
        "expert": clock[fields.BUSY_EXPERT] / total,
        "head": clock[fields.BUSY_HEAD] / total,
        "copy": clock[fields.STALL_COPY] / total,
        "cpu": clock[fields.STALL_CPU] / total,
        "host": host_share / total,
    }
    groups = {"copy": share["copy"], "compute": compute / total, "cpu": share["cpu"], "host": share["host"]}
    return Metrics(
        tokens_per_s=counted_tokens(workload) * NS_PER_S / total,
        decode_tokens_per_s=decode,
        prefill_tokens_per_s=prefill,
        step_s={
            "mean": float(counted.mean()) / NS_PER_S,
            "p50": float(np.percentile(counted, 50)) / NS_PER_S,
            "p99": float(np.percentile(counted, 99)) / NS_PER_S,
        },
        makespan_ns=outcome.makespan_ns,
        num_steps=workload.num_steps,
        num_tokens=workload.num_tokens,
        hits=int(count[ps.HITS]),
        misses=int(count[ps.MISSES]),
        guessed_hits=int(count[ps.HITS_GUESSED]),
        ready_hits=int(clock[fields.READY]),
        late_hits=int(clock[fields.LATE]),
        hit_rate=int(count[ps.HITS]) / lookups if lookups else 0.0,
        prefetches=int(count[ps.PREFETCHES]),
        prefetches_used=int(count[ps.PREFETCHES_USED]),
        extra_fetches=int(count[ps.EXTRA_FETCHES]),
        recall=int(count[ps.GUESSES_TRUE]) / int(count[ps.TRUTHS]) if count[ps.TRUTHS] else None,
        bytes_copied=int(clock[fields.BYTES_H2D]),
        bytes_written_back=int(clock[fields.BYTES_D2H]),
        cpu_runs=int(count[ps.CPU_RUNS]),
        disk_reads=int(count[ps.DISK_READS]),
        cancelled=int(count[ps.CANCELLED]),
        low_precision_fetches=int(count[ps.LOW_FETCHES]),
        peak_transient_experts=int(count[ps.PEAK_TRANSIENT]),
        busy_fraction={
            "compute": compute / makespan,
            "h2d": busy_h2d / makespan,
            "d2h": int(clock[fields.BUSY_BACK]) / makespan,
            "cpu": int(clock[fields.BUSY_CPU]) / makespan,
            "disk": int(clock[fields.BUSY_DISK]) / makespan,
            "host": int(clock[fields.BUSY_HOST]) / makespan,
        },
        time_share={name: float(value) for name, value in share.items()},
        bound=max(groups, key=lambda name: groups[name]),
        relative_uncertainty=_uncertainty(share, sources),
    )


def counted_tokens(workload: Workload) -> int:
    """Return the tokens that `tokens_per_s` counts: those generated, or all where nothing is generated."""
    decode = workload.step_phase == 1
    return int(workload.step_tokens[decode].sum() if decode.any() else workload.step_tokens.sum())


def _rate(workload: Workload, steps: Array, phase: int) -> float | None:
    """Return tokens per second over the steps of one phase, None when there are none."""
    mine = workload.step_phase == phase
    duration = int(steps[mine].sum())
    return int(workload.step_tokens[mine].sum()) * NS_PER_S / duration if duration else None


def _uncertainty(share: dict[str, float], sources: CostSources) -> float:
    """Return the relative uncertainty of the run's time: each kind's own, weighted by its share of the time.

    The errors of one kind of activity come from one constant, so they do not average out over activities; those of
    different kinds may, but that they do is not known, so they are added.
    """
    kinds = {"dense": "dense", "expert": "expert", "head": "head", "copy": "copy", "cpu": "cpu", "host": "host_layer"}
    return float(sum(share[name] * sources.relative_uncertainty(kind) for name, kind in kinds.items()))
