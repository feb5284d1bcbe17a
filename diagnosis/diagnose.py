"""Is a measured speed normal: the verdict, and what stands beside it.

Modelled: each measured figure beside its prediction and interval; what binds; ceilings; memory at the context that was asked for; what
would help; what to look for where the figure lies outside. Ignored: where the case comes from (`origin`), files and pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..base.errors import DoesNotFit, InputError
from ..base.frames import Tabular, flat
from ..base.units import GIB
from ..planner.served import llamacpp as served
from .case import DECODE, METRICS, PREFILL, Case
from .causes import Cause, causes_of, host_overflow_bytes, paged, with_unlimited_host
from .ceiling import Ceiling, ceiling_of
from .changes import HARDWARE, Change, changes_of, file_bytes

NORMAL, SLOW, FAST = "normal", "slow", "faster than believable"
VERDICTS = (NORMAL, SLOW, FAST)
MOST_CHANGES, MOST_HARDWARE, MOST_CAUSES = 3, 2, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One measured figure beside its prediction."""

    metric: str
    """decode_tokens_per_s or prefill_tokens_per_s."""
    measured: float
    predicted: float
    low: float
    """Ends of the interval that nine in ten such figures lie in."""
    high: float
    bound: str
    """What binds in the prediction: copy, compute, launch, cpu or host."""
    time_share: Mapping[str, float]
    """Where the time of the predicted steps goes."""
    ceiling: Ceiling

    @property
    def verdict(self) -> str:
        """normal, slow or faster than believable."""
        return verdict_of(self.measured, self.low, self.high)

    @property
    def impossible(self) -> bool:
        """Whether nothing on this machine could have done it."""
        return self.measured > self.ceiling.any_schedule

    def to_dict(self) -> dict[str, Any]:
        """Return the figure as plain values."""
        one = self.ceiling
        return {
            "metric": self.metric, "measured": self.measured, "predicted": self.predicted, "low": self.low, "high": self.high,
            "verdict": self.verdict, "bound": self.bound, "time_share": dict(self.time_share),
            "ceiling": {
                "as_placed": one.as_placed, "as_placed_from": one.as_placed_words, "best_placed": one.best_placed,
                "any_schedule": one.any_schedule, "any_schedule_from": one.any_schedule_words,
            },
            "impossible": self.impossible,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the run needs beside what there is."""

    device_bytes: int
    device_limit_bytes: int
    host_bytes: int
    host_limit_bytes: float | None
    """None: nobody says how much there is."""
    context_tokens: int
    file_bytes: float

    @property
    def fits(self) -> bool:
        """Whether the card holds it."""
        return self.device_bytes <= self.device_limit_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "device_bytes": self.device_bytes, "device_limit_bytes": self.device_limit_bytes, "host_bytes": self.host_bytes,
            "host_limit_bytes": self.host_limit_bytes, "context_tokens": self.context_tokens, "file_bytes": self.file_bytes,
            "fits": self.fits,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis(Tabular):
    """Whether measured speeds are what this run should give, and what to do about it."""

    SHOWN: ClassVar[tuple[str, ...]] = ("metric", "measured", "predicted", "low", "high", "verdict", "bound")
    verdict: str
    """The worst of its speeds': slow before faster than believable before normal."""
    speeds: tuple[Speed, ...]
    memory: Memory
    changes: tuple[Change, ...]
    """Settings and files that would gain most, then hardware."""
    causes: tuple[Cause, ...]
    """What to look for, each of a size that fits; none where the verdict is normal."""
    assumed: tuple[str, ...]
    """What was taken where nothing was said."""
    notes: tuple[str, ...]
    case: Case = field(repr=False)
    command: str | None = None

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row for every measured speed."""
        return [flat(one.to_dict()) for one in self.speeds]

    def table_title(self) -> str:
        """Return the verdict."""
        return self.verdict

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `moeplan diagnose --json` prints."""
        case = self.case
        return {
            "verdict": self.verdict, "command": self.command, "model": case.model.name, "quant": case.quant,
            "machine": case.profile.description,
            "engine": {"name": case.engine, "backend": case.backend}, "placement": dict(case.placement),
            "request": {"prompt_tokens": case.prompt, "reply_tokens": case.reply, "depth_tokens": case.depth,
            "concurrency": case.concurrency,
                        "ubatch": case.ubatch, "context_tokens": case.context, "kv_types": list(case.kv_types)},
            "speeds": [one.to_dict() for one in self.speeds], "memory": self.memory.to_dict(),
            "changes": [
                {"what": one.what, "kind": one.kind, "cost": one.cost, "decode_gain": one.decode_gain, "prefill_gain": one.prefill_gain,
                 "request_gain": one.request_gain} for one in self.changes
            ],
            "causes": [
                {"what": one.what, "check": one.check, "speeds": {name: list(three) for name, three in one.speeds.items()}}
                for one in self.causes
            ],
            "assumed": list(self.assumed), "notes": list(self.notes),
        }  # fmt: skip


def verdict_of(measured: float, low: float, high: float) -> str:
    """Return what a measured speed is beside an interval."""
    return SLOW if measured < low else FAST if measured > high else NORMAL


def diagnose_case(case: Case, measured: Mapping[str, float], command: str | None = None) -> Diagnosis:
    """Return the diagnosis of a case whose speeds were measured; raises InputError without any."""
    metrics = tuple(metric for metric in METRICS if metric in measured)
    if not metrics:
        raise InputError(
            "--measured-decode",
            "(absent)",
            "nothing was measured",
            "give --measured-decode, --measured-prefill, or both",
        )
    notes = []
    over = host_overflow_bytes(case)
    run = case
    if over > 0:
        run = with_unlimited_host(case)
        disk = "a disk of any kind" if case.parts is None or case.parts.disk_bytes_per_s is None else "its disk"
        notes.append(
            f"the host's memory lacks {over / GIB:.1f} GiB of what it must hold: predicted as read from {disk} in every pass; free memory "
            "and disk reads while it runs (vmstat 1) show it"
        )
    try:
        speeds = tuple(_speed(run, metric, measured[metric], over) for metric in metrics)
    except DoesNotFit as reason:
        raise InputError("--hardware", case.profile.name, str(reason), "describe the machine that it ran on") from None
    verdicts = [one.verdict for one in speeds]
    verdict = SLOW if SLOW in verdicts else FAST if FAST in verdicts else NORMAL
    memory = _memory(case)
    if not memory.fits:
        notes.append(
            "it does not fit the card as described: the driver may have moved what is too much to host memory, at the link's speed"
        )
    shown = [one for one in changes_of(run, metrics) if one.kind == HARDWARE or _held(case, one.case, over)]
    kept = [one for one in shown if one.kind != HARDWARE][:MOST_CHANGES] + [
        one for one in shown if one.kind == HARDWARE
    ][:MOST_HARDWARE]
    said = {name: measured[name] for name in metrics}
    causes = [] if verdict == NORMAL else causes_of(run, said, slow=verdict == SLOW, over_bytes=over)
    assumed = (*case.assumed, *case.setup(metrics[0]).assumed)
    return Diagnosis(
        verdict=verdict, speeds=speeds, memory=memory, changes=tuple(kept), causes=tuple(causes[:MOST_CAUSES]), assumed=assumed,
        notes=tuple(notes), case=case, command=command,
    )  # fmt: skip


def _speed(case: Case, metric: str, measured: float, over_bytes: float) -> Speed:
    found = case.predicted(metric)
    metrics = found.metrics
    share = {} if metrics is None else dict(metrics.time_share)
    bound, whole = str(found.bound), float(found.value or 0)
    value, low, high = paged(case, metric, over_bytes)
    if value < whole:  # the rest of the time is the disk's
        share = {name: part * value / whole for name, part in share.items()} | {"disk": 1 - value / whole}
        bound = "disk" if value < whole / 2 else bound
    return Speed(
        metric=metric, measured=measured, predicted=value, low=low, high=high, bound=bound, time_share=share,
        ceiling=ceiling_of(case, metric),
    )  # fmt: skip


def _held(case: Case, changed: Case, over: float) -> bool:
    """Return whether the host's memory holds what a change leaves to it, or at least lacks less than before."""
    if over <= 0 or case.parts is None or changed.parts is None or changed.parts.memory is None:
        return True
    capacity = None if case.parts.memory is None else case.parts.memory.capacity_bytes
    memory = dataclasses.replace(changed.parts.memory, capacity_bytes=capacity)
    return host_overflow_bytes(changed.changed(parts=dataclasses.replace(changed.parts, memory=memory))) < over


def _memory(case: Case) -> Memory:
    simulation = case.memory()
    setting = served.setting(simulation, case.host_layers if case.kind != "cpu" else 0, case.concurrency, case.ubatch)
    cached = (case.model.num_moe_layers - setting.host_layers) * case.model.num_experts
    if case.kind == "gpu-experts":
        cached = int(case.placement["gpu_experts_per_layer"]) * case.model.num_moe_layers
    items = simulation.memory_breakdown(setting.schedule, cached_experts=cached)
    return Memory(
        device_bytes=items.device_bytes, device_limit_bytes=simulation.budget_bytes, host_bytes=items.host_bytes,
        host_limit_bytes=case.host_memory_bytes, context_tokens=case.context or case.depth + case.prompt + case.reply,
        file_bytes=file_bytes(case),
    )  # fmt: skip


__all__ = ["DECODE", "PREFILL", "Diagnosis", "Memory", "Speed", "diagnose_case", "verdict_of"]
