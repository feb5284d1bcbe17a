"""What a run amounts to: rates, shares, counts and an error bar, from an engine's outcome.

Modelled: every figure is derived from whole nanoseconds and whole counts, so two engines that agree give the same figures.
`docs/metrics.md` gives each formula. Ignored: how the figures are shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...base.errors import Internal
from ...base.units import NS_PER_S
from ..policies.state import Array
from .costs import CostTables
from .run_facts import RunFacts
from .simulators import Outcome
from .tabulate import CostSources
from .workload import Workload

Interval = tuple[float, float]
"""The least and the most that a figure may be: everything as slow, or as fast, as what it was made from allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """The figures of one run."""

    prefill_tokens_per_s: float | None
    """Prompt tokens per second of prefill steps alone; None without any."""
    prefill_tokens_per_s_interval: Interval | None
    ttft_s: float | None
    """Time to first token: from a prompt's first step to the end of its last, the mean over prompts computed whole."""
    ttft_s_interval: Interval | None
    decode_tokens_per_s: float | None
    """Generated tokens per second of decode steps alone; None without any."""
    decode_tokens_per_s_interval: Interval | None
    request_s: float | None
    """From a request's first step to the end of its last, the mean over requests that generate something and come to their end."""
    request_s_interval: Interval | None
    requests_per_s: float | None
    """Requests that come to their end, over the whole run; None without any."""
    requests_per_s_interval: Interval | None
    window_s: float
    """The whole run, prompts and answers."""
    window_s_interval: Interval
    step_s: dict[str, float]
    """mean, p50 and p99 duration of decode steps; of prefill steps where nothing is generated."""
    step_s_interval: Interval
    """Of the mean."""
    tpot_s: float | None
    """Time per output token of a request, the mean: a decode step, over the tokens that it yields for each request."""
    makespan_ns: int
    num_steps: int
    num_tokens: int
    """Tokens that come out of the passes; guesses that were wrong are none."""
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
    """Bytes that went to the device until the last step ended: what the times reported have room for."""
    bytes_written_back: int
    """Bytes that went back to the host until then."""
    bytes_after: int
    """Bytes still on their way when the last step ended: guesses that nobody used, never more than their places hold."""
    cpu_runs: int
    """Misses that the host's cores computed; they move no bytes."""
    disk_reads: int
    cancelled: int
    """Prefetches dropped before their copy began; not counted among the prefetches."""
    low_precision_fetches: int
    peak_transient_experts: int
    busy_fraction: dict[str, float]
    """Share of the makespan each lane was busy; of cards that work at once, each counts, so that it may exceed 1."""
    time_share: dict[str, float]
    """Where the time of all steps went: work of dense, expert, head; launching these kernels; waiting for copies, for experts on
    the host's cores, and for the host; sums to 1."""
    bound: str
    """What binds: the largest of copy, compute, launch, cpu and host in `time_share`; disk where copies or the cores wait for it most."""
    relative_uncertainty: float
    """Of the mean step: how much slower than predicted it may be."""

    def reaching(self, others: Iterable[Metrics]) -> Metrics:
        """Return these metrics with every interval reaching over those of the same run where other things are so."""
        found = list(others)
        wider: dict[str, Any] = {}
        for name in (each.name for each in dataclasses.fields(self) if each.name.endswith("_interval")):
            ends = [end for one in (self, *found) for end in getattr(one, name) or ()]
            if getattr(self, name) is not None:
                wider[name] = (min(ends), max(ends))
        step = wider["step_s_interval"][1] / self.step_s["mean"] - 1
        return dataclasses.replace(self, **wider, relative_uncertainty=step) if found else self


def summarise(outcome: Outcome, workload: Workload, tables: CostTables, sources: CostSources, facts: RunFacts, *,
              slow: Outcome, fast: Outcome) -> Metrics:  # fmt: skip
    """Return the metrics of an outcome under `tables`, with intervals that reach from the `slow` to the `fast` outcome of the same run."""
    count, clock = outcome.counts, outcome.clock
    told, slowly, quickly = (figures_of(one.step_end, workload) for one in (outcome, slow, fast))
    between = {name: _interval(value, slowly[name], quickly[name]) for name, value in told.items()}
    steps = np.diff(np.concatenate(([0], outcome.step_end)))
    counted = steps[_counted(workload)]
    lookups = int(count.hits + count.misses)
    makespan = max(outcome.makespan_ns, 1)
    busy_h2d = int(clock.busy_demand + clock.busy_prefetch)
    compute = int(clock.busy_dense + clock.busy_expert + clock.busy_head)
    share = _time_share(outcome, tables, sources, facts)
    groups = {name: share[name] for name in ("copy", "launch", "cpu", "host")}
    groups["compute"] = share["dense"] + share["expert"] + share["head"]
    step_s, step_interval = told["step_s"], between["step_s"]
    if step_s is None or step_interval is None:
        raise Internal("a run without steps")
    return Metrics(
        prefill_tokens_per_s=told["prefill_tokens_per_s"],
        prefill_tokens_per_s_interval=between["prefill_tokens_per_s"],
        ttft_s=told["ttft_s"],
        ttft_s_interval=between["ttft_s"],
        decode_tokens_per_s=told["decode_tokens_per_s"],
        decode_tokens_per_s_interval=between["decode_tokens_per_s"],
        request_s=told["request_s"],
        request_s_interval=between["request_s"],
        requests_per_s=told["requests_per_s"],
        requests_per_s_interval=between["requests_per_s"],
        window_s=told["window_s"] or 0.0,
        window_s_interval=between["window_s"] or (0.0, 0.0),
        step_s_interval=step_interval,
        step_s={
            "mean": step_s,
            "p50": float(np.percentile(counted, 50)) / NS_PER_S,
            "p99": float(np.percentile(counted, 99)) / NS_PER_S,
        },
        tpot_s=told["tpot_s"],
        makespan_ns=outcome.makespan_ns,
        num_steps=workload.num_steps,
        num_tokens=int(workload.yields.sum()),
        hits=int(count.hits),
        misses=int(count.misses),
        guessed_hits=int(count.hits_guessed),
        ready_hits=int(clock.ready),
        late_hits=int(clock.late),
        hit_rate=int(count.hits) / lookups if lookups else 0.0,
        prefetches=int(count.prefetches),
        prefetches_used=int(count.prefetches_used),
        extra_fetches=int(count.extra_fetches),
        recall=int(count.guesses_true) / int(count.truths) if count.truths else None,
        bytes_copied=int(clock.bytes_h2d - clock.after_h2d),
        bytes_written_back=int(clock.bytes_d2h - clock.after_d2h),
        bytes_after=int(clock.after_h2d + clock.after_d2h + clock.after_disk),
        cpu_runs=int(count.cpu_runs),
        disk_reads=int(count.disk_reads),
        cancelled=int(count.cancelled),
        # Formats of several cards are of one size: their numbers are no precisions.
        low_precision_fetches=int(count.low_fetches) if len(set(tables.expert_bytes.tolist())) > 1 else 0,
        peak_transient_experts=int(count.peak_transient),
        busy_fraction={
            "compute": compute / makespan,
            "h2d": busy_h2d / makespan,
            "d2h": int(clock.busy_back) / makespan,
            "cpu": int(clock.busy_cpu) / makespan,
            "disk": int(clock.busy_disk) / makespan,
            "host": int(clock.busy_host) / makespan,
        },
        time_share=share,
        bound=_binds(groups, outcome),
        relative_uncertainty=step_interval[1] / step_s - 1,
    )


def _binds(groups: dict[str, float], outcome: Outcome) -> str:
    """Return the largest of `groups`; what waits for bytes that come from a disk is bound by the slower of the two lanes."""
    clock, found = outcome.clock, max(groups, key=lambda name: groups[name])
    beside = {"copy": int(clock.busy_demand + clock.busy_prefetch), "cpu": int(clock.busy_cpu)}
    return "disk" if int(clock.busy_disk) > beside.get(found, int(clock.busy_disk)) else found


def _counted(workload: Workload) -> npt.NDArray[np.bool_]:
    """Return which steps a run's step time is of: those that decode, or all of them where none does."""
    decode: npt.NDArray[np.bool_] = workload.step_phase == 1
    return decode if decode.any() else np.ones_like(decode)


def figures_of(step_end: Array, workload: Workload) -> dict[str, float | None]:
    """Return the speeds and times of a run by name, None where it has none of it; `step_end` in nanoseconds."""
    ends = np.concatenate(([0], step_end))
    steps = np.diff(ends)
    return {
        "prefill_tokens_per_s": _rate(workload, steps, 0),
        "ttft_s": _spans_s(ends, workload.prompts),
        "decode_tokens_per_s": _rate(workload, steps, 1),
        "request_s": _spans_s(ends, workload.requests),
        "requests_per_s": len(workload.requests) * NS_PER_S / float(ends[-1]) if len(workload.requests) else None,
        "window_s": float(ends[-1]) / NS_PER_S,
        "step_s": float(steps[_counted(workload)].mean()) / NS_PER_S if len(steps) else None,
        "tpot_s": _tpot_s(workload, steps),
    }


def speeds_of(metrics: Metrics) -> dict[str, float | Interval | None]:
    """Return the figures that `figures_of` names, of a prediction, each followed by its interval."""
    found: dict[str, float | Interval | None] = {}
    for name in (
        "prefill_tokens_per_s", "ttft_s", "decode_tokens_per_s", "request_s", "requests_per_s", "window_s",
    ):  # fmt: skip
        found |= {name: getattr(metrics, name), f"{name}_interval": getattr(metrics, f"{name}_interval")}
    return found | {"step_s": metrics.step_s["mean"], "step_s_interval": metrics.step_s_interval}


def _interval(value: float | None, *ends: float | None) -> Interval | None:
    """Return (low, high) of a figure and what it is at both ends of all uncertainties."""
    if value is None:
        return None
    found = [value, *(end for end in ends if end is not None)]
    return min(found), max(found)


def _rate(workload: Workload, steps: Array, phase: int) -> float | None:
    """Return tokens per second over the steps of one phase, None when there are none."""
    mine = workload.step_phase == phase
    duration = int(steps[mine].sum())
    return int(workload.yields[mine].sum()) * NS_PER_S / duration if duration else None


def _tpot_s(workload: Workload, steps: Array) -> float | None:
    """Return the mean seconds of a further token of a request, None where nothing is generated."""
    decode = workload.step_phase == 1
    if not decode.any():
        return None
    mean = float(steps[decode].mean()) / NS_PER_S
    if workload.step_yield is None or workload.step_drafted is None:
        return mean
    each = workload.step_yield[decode] / (workload.step_tokens - workload.step_drafted)[decode]
    return mean / float(each.mean())


def _spans_s(ends: Array, spans: Array) -> float | None:
    """Return the mean seconds from the beginning of each span's first step to the end of its last, None without any."""
    return float((ends[spans[:, 1] + 1] - ends[spans[:, 0]]).mean()) / NS_PER_S if len(spans) else None


def _time_share(outcome: Outcome, tables: CostTables, sources: CostSources, facts: RunFacts) -> dict[str, float]:
    """Return where the time of all steps went; sums to 1.

    Of the time that kernels take, what passes in launching them is no computing: it is set apart.
    """
    clock, launch = outcome.clock, sources.launch
    total = max(int(outcome.step_end[-1]), 1)
    line = tables.step_class[: len(outcome.step_end)]
    kernel = min(max(1, round(facts.typical_tokens)), len(launch.kernel_ns) - 1)
    launches = {
        "dense": int(launch.step_ns[line].sum()),
        "expert": facts.launches * int(launch.kernel_ns[kernel]),
        "head": int(launch.head_ns[line].sum()),
    }
    busy = {
        "dense": int(clock.busy_dense),
        "expert": int(clock.busy_expert),
        "head": int(clock.busy_head),
    }
    launches = {name: min(launches[name], busy[name]) for name in busy}
    waits = {"copy": int(clock.stall_copy), "cpu": int(clock.stall_cpu)}
    rest = max(0, total - sum(busy.values()) - sum(waits.values()))
    parts = {name: busy[name] - launches[name] for name in busy}
    parts |= {"launch": sum(launches.values())} | waits | {"host": rest}
    total = max(total, sum(parts.values()))  # more than the time where several cards work at once
    return {name: value / total for name, value in parts.items()}


def counted_tokens(workload: Workload) -> int:
    """Return the tokens that a window's speed counts: those generated, or all where nothing is generated."""
    decode = workload.step_phase == 1
    return int(workload.yields[decode].sum() if decode.any() else workload.yields.sum())
