"""One expert-parallel schedule on one recording: from files' nouns to a prediction.

Modelled: the schedule as it is given, its placement made on the planning part of the recording and its steps taken from the
reporting part; what its rank holds in memory, and how many tokens a rank could take before that is full. Ignored: whether another
schedule is better (`ep_plan`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...base.errors import InputError
from ...sim.parallel.simulate import EpPrediction
from ...specs.machines.profile import Profile
from ...specs.memory import MemoryBreakdown
from ...specs.models import ModelSpec
from ...specs.schedules.parallel import ExpertParallelSchedule, apply_ep_settings, load_ep_preset
from .case import (
    ParallelRequest,
    Recording,
    batch_that_fits,
    check_ep_match,
    dispatch_bytes_per_value,
    evidence_of,
    prepare_ep,
)
from .evidence import REPORT
from .latency import Latency, latency
from .search import EpSearch, describe
from .words import filled


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelAnswer:
    """What one schedule does in steps as they were asked for. Users are requests in decode."""

    request: ParallelRequest
    prediction: EpPrediction
    memory: MemoryBreakdown
    """Of the rank that holds most."""
    budget_bytes: int
    """Memory of one rank."""
    largest_tokens_per_rank: int
    """Most tokens of a rank in a step that fit beside everything else."""
    latency: Latency
    """What users wait for."""
    notes: tuple[str, ...]
    search: EpSearch = field(repr=False)

    @property
    def num_ranks(self) -> int:
        """Devices in all."""
        return self.search.simulation.num_ranks

    @property
    def interval_s(self) -> tuple[float, float]:
        """The ends between which a step lies nine times in ten."""
        step, wide = self.prediction.step_s, self.prediction.relative_uncertainty
        return step * (1 - wide), step * (1 + wide)

    @property
    def tokens_per_s_per_rank(self) -> float:
        """Tokens a second of each device: generated ones, beside the prompts that are mixed in; prompts' in prefill."""
        return self.latency.tokens_per_s / self.num_ranks

    @property
    def tokens_per_s_per_user(self) -> float | None:
        """Tokens a second of each request, prompts computed in between; None in prefill."""
        return None if self.latency.tpot_s is None else 1 / self.latency.tpot_s

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        prediction, low_high = self.prediction, self.interval_s
        return prediction.to_dict() | {
            "kind": "expert-parallel", "schedule": prediction.schedule.to_dict(), "description": describe(prediction.schedule),
            "step_s_interval": list(low_high), "num_ranks": self.num_ranks, "step_tokens": self.search.evidence.step_tokens,
            "tokens_per_s_per_gpu": self.tokens_per_s_per_rank, "tokens_per_s_per_user": self.tokens_per_s_per_user,
            "memory": self.memory.to_dict(), "memory_budget_bytes": self.budget_bytes,
            "largest_tokens_per_rank": self.largest_tokens_per_rank, "tokens_a_step": self.request.tokens_a_step,
            "latency": self.latency.to_dict() | {"missed": self.latency.misses(self.request)},
            "request": {key: value for key, value in dataclasses.asdict(self.request).items() if key != "workers"},
            "assumptions": list(self.notes),
        }  # fmt: skip


def preset_for(
    name: str, request: ParallelRequest, model: ModelSpec, settings: Mapping[str, Any] | None = None
) -> ExpertParallelSchedule:
    """Return a preset with the model's formats and the settings made; raises UnknownName or InputError.

    Unless they are set, experts are stored as the request says and tokens travel in what they are multiplied in.
    """
    bits = str((settings or {}).get("kernel.bits", request.of_model(model).bits or "16"))
    formats = {"kernel.bits": bits, "all_to_all.dispatch_bytes_per_value": dispatch_bytes_per_value(bits)}
    return apply_ep_settings(load_ep_preset(name), formats | shared_attention(request, settings) | dict(settings or {}))


def shared_attention(request: ParallelRequest, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the options of a schedule that let as many ranks share attention as a request says, none where it says nothing.

    settings: those that are made beside them. Raises InputError where these say it already.
    """
    ranks = request.attention_ranks
    if ranks is None:
        return {}
    for key in ("parallel.attention", "parallel.attention_ranks"):
        if key in (settings or {}):
            raise InputError(
                f"--set {key}", (settings or {})[key], "--attention-tp says it already", "give one of the two"
            )
    if ranks == 1:
        return {"parallel.attention": "data", "parallel.attention_ranks": 0}
    return {"parallel.attention": "tensor", "parallel.attention_ranks": ranks}


def answer_ep(
    model: ModelSpec,
    profile: Profile,
    recording: Recording,
    request: ParallelRequest,
    schedule: ExpertParallelSchedule,
    *,
    engine: str = "compiled",
    rows: bool = False,
) -> ParallelAnswer:
    """Return what a schedule does: its prediction with where the time goes, its memory and the largest batch.

    The schedule's weight format and redundant slots are its own; `request.num_redundant` and `request.bits` are not used. engine:
    "compiled", "simpy", or "both", compared. Raises as `simulate_ep` does.
    """
    request = request.of_model(model)
    check_ep_match(model, recording, request)
    own = dataclasses.replace(request, num_redundant=0)
    fitted, fewer = batch_that_fits(model, profile, recording, own, [schedule])
    request = dataclasses.replace(request, tokens_per_rank=fitted.tokens_per_rank)
    search = _prepared(model, profile, recording, request, schedule)
    prediction = search.predict(schedule, REPORT, engine=engine, rows=rows, parts=True)
    simulation = search.simulation
    memory, most = search.memory(schedule)
    dense = simulation.costing.costs.dense_format.name
    notes = (*fewer, *search.evidence.notes, f"experts are stored in {schedule.kernel.bits} bits, all other weights in {dense}",
             *filled(simulation), "costs: " + simulation.sources() + "; kernels are issued ahead, so the host costs nothing")  # fmt: skip
    return ParallelAnswer(
        request=request, prediction=prediction, memory=memory, budget_bytes=simulation.budget_bytes, largest_tokens_per_rank=most,
        latency=latency(search, recording, request, schedule, prediction.step_s, most),
        notes=notes, search=search,
    )  # fmt: skip


def simulate_ep(
    model: ModelSpec,
    profile: Profile,
    recording: Recording,
    request: ParallelRequest,
    schedule: ExpertParallelSchedule,
    *,
    engine: str = "both",
    rows: bool = False,
) -> EpPrediction:
    """Return the prediction of a schedule, under one engine ("compiled", "simpy") or both, compared.

    The schedule's weight format and redundant slots are its own; `request.num_redundant` and `request.bits` are not used.
    Raises InputError where recording, model, ranks and schedule do not belong together, DoesNotFit where memory is too small.
    """
    search = _prepared(model, profile, recording, request, schedule)
    return search.predict(schedule, REPORT, engine=engine, rows=rows)


def _prepared(
    model: ModelSpec, profile: Profile, recording: Recording, request: ParallelRequest, schedule: ExpertParallelSchedule
) -> EpSearch:
    """Return a search that can predict this schedule."""
    request = dataclasses.replace(request, bits=schedule.kernel.bits, num_redundant=0).of_model(model)
    check_ep_match(model, recording, request)
    return prepare_ep(model, profile, evidence_of(model, recording, request), request, schedule)
