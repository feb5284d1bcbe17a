"""What a search wants: a figure to be least, and limits that come before it.

Modelled: figures of the whole window, of a request, of the first token, of decoding; limits on the time to the first token and on
the time of each further one (TTFT, TPOT). A schedule that keeps every limit beats one that does not; of those that do not, the
one that comes nearest is better, so that a search without an answer can say which that is. Ignored: how schedules are found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...base.errors import InputError, OutOfReach
from ...base.units import MS_PER_S
from ...sim.offload.workload import Workload

OBJECTIVES = (
    "request_s", "ttft_s", "decode_tokens_per_s", "requests_per_s", "tokens_per_s", "p99_step_s", "least_memory",
)  # fmt: skip
OF_REQUESTS = ("request_s", "ttft_s", "decode_tokens_per_s", "requests_per_s")
RANKED_BY: Mapping[str, str] = {
    "tokens_per_s": "window_s", "p99_step_s": "step_s.p99", "least_memory": "memory_breakdown.device_bytes", "request_s": "request_s",
    "ttft_s": "ttft_s", "decode_tokens_per_s": "decode_tokens_per_s", "requests_per_s": "requests_per_s",
}  # fmt: skip
"""Objectives, with the figure of a schedule that decides (of a rate the most is best, of others the least)."""
RATES = ("decode_tokens_per_s", "requests_per_s")
"""Objectives of which the most is best."""
Figures = Mapping[str, float | None]
# Figures that a window may lack, and what it then has none of.
_LACKING = {
    "request_s": "request that comes to its end", "requests_per_s": "request that comes to its end", "ttft_s": "prompt",
    "decode_tokens_per_s": "generated token",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What every schedule must keep; None: no limit."""

    ttft_s: float | None = None
    """Time to the first token, at most."""
    tpot_s: float | None = None
    """Time of each further token of a request, at most."""

    def __bool__(self) -> bool:
        """Return whether there is any."""
        return self.ttft_s is not None or self.tpot_s is not None

    def excess(self, figures: Figures) -> float:
        """Return by what fraction the figures exceed the limit that they exceed most; 0 where they keep all of them."""
        found = [0.0]
        for limit, value in ((self.ttft_s, figures["ttft_s"]), (self.tpot_s, tpot_of(figures))):
            if limit is not None:
                found.append(math.inf if value is None else value / limit - 1)
        return max(found)

    def words(self) -> str:
        """Return the limits as they are asked for."""
        named = (("--ttft", self.ttft_s), ("--tpot", self.tpot_s))
        return " and ".join(f"{option} {seconds_text(value)}" for option, value in named if value is not None)


NO_LIMITS = Limits()


def seconds_text(value: float) -> str:
    """Return a time as it is written on a command line."""
    return f"{value:.4g}s" if value >= 1 else f"{MS_PER_S * value:.4g}ms"


def tpot_of(figures: Figures) -> float | None:
    """Return the mean seconds between two tokens of a request, None where nothing is generated."""
    return figures["tpot_s"]


def value_of(objective: str, figures: Figures, p99_ns: float = 0.0) -> float:
    """Return the figure by which an objective ranks, the least first; the window's time for objectives of another kind."""
    if objective == "p99_step_s":
        return p99_ns
    if objective in RATES:
        return 1 / (figures[objective] or math.inf)
    name = objective if objective in ("request_s", "ttft_s") else "window_s"
    value = figures[name]
    return math.inf if value is None else value


def check_objective(objective: str, limits: Limits, workload: Workload) -> None:
    """Return nothing; raises InputError for an objective that does not exist or of which the window has no figure."""
    if objective not in OBJECTIVES:
        raise InputError("objective", objective, f"not one of {', '.join(OBJECTIVES)}", "choose one")
    decodes = bool(np.any(workload.step_phase == 1))
    has = {
        "request_s": len(workload.requests) > 0, "requests_per_s": len(workload.requests) > 0,
        "ttft_s": len(workload.prompts) > 0, "decode_tokens_per_s": decodes,
    }  # fmt: skip
    asked: list[tuple[str, str, object]] = [(objective, "objective", objective)]
    asked += [("ttft_s", "--ttft", limits.ttft_s)] if limits.ttft_s is not None else []
    asked += [("decode_tokens_per_s", "--tpot", limits.tpot_s)] if limits.tpot_s is not None else []
    for name, field, value in asked:
        if not has.get(name, True):
            raise InputError(
                field, value, f"the window has no {_LACKING[name]}", "choose another objective or other lengths"
            )


def decided_by_window(objective: str, workload: Workload) -> bool:
    """Return whether the time of the whole window decides: where it does, a run that takes longer than the best has lost.

    The mean time of a request does where one request follows another without a gap, from the first step to the last.
    """
    if objective != "request_s":
        return objective in ("tokens_per_s", "requests_per_s")
    spans = workload.requests
    return bool(
        len(spans)
        and spans[0, 0] == 0
        and spans[-1, 1] == workload.num_steps - 1
        and np.all(spans[1:, 0] == spans[:-1, 1] + 1)
    )


def out_of_reach(limits: Limits, name: str, figures: Figures) -> OutOfReach:
    """Return the error of limits that nothing keeps; name, figures: of what comes nearest."""
    ttft, tpot = figures["ttft_s"], tpot_of(figures)
    near = [f"first token after {seconds_text(ttft)}"] if ttft is not None else []
    near += [f"{seconds_text(tpot)} a further token"] if tpot is not None else []
    return OutOfReach(f"no schedule keeps {limits.words()}; {name} comes nearest: {', '.join(near)}")


def figures_of_metrics(metrics: Any) -> dict[str, float | None]:
    """Return a prediction's figures by the names used here."""
    found: dict[str, float | None] = {
        name: getattr(metrics, name) for name in ("prefill_tokens_per_s", "ttft_s", "decode_tokens_per_s", "request_s",
                                                    "requests_per_s", "window_s")
    }  # fmt: skip
    return found | {"step_s": metrics.step_s["mean"], "tpot_s": metrics.tpot_s}
