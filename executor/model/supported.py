"""Which schedules a model can be run by: those that the executor runs, but for what only a recording knows.

Modelled: one refusal for each option that needs the future or a second store. Ignored: whether a schedule fits.
"""

from __future__ import annotations

from ...base.errors import InputError
from ...specs.models import ModelSpec
from ...specs.schedules.offload import OffloadSchedule
from ..running.supported import check_runnable


def stored_bits(bits: str, spec: ModelSpec) -> str:
    """Return the weight format that `bits` names: the checkpoint's own for "native"."""
    return spec.native_bits if bits == "native" else bits


def with_whole_layers(schedule: OffloadSchedule, num_layers: int, num_experts: int) -> OffloadSchedule:
    """Return a schedule that keeps whole layers off the device as one that says how many experts are on it."""
    away = schedule.cache.host_layers
    if away is None:
        return schedule
    if away >= num_layers:
        raise InputError("cache.host_layers", away, f"the model has {num_layers} MoE layers", "leave one on the device")
    return schedule.with_options(cache__pooled_experts=(num_layers - away) * num_experts)


def check_runs_live(
    schedule: OffloadSchedule, popularity_is_known: bool, prices_are_known: bool = False, pre_gate: int = 0
) -> None:
    """Return nothing; raises InputError for the first option that a model cannot be run by.

    pre_gate: how many layers early the model's own gates choose.
    """
    check_runnable(schedule)
    cache, predictor, kernel = schedule.cache, schedule.predictor, schedule.kernel
    sized = (cache.experts_per_layer, cache.pooled_experts, cache.host_layers)
    if cache.policy != "none" and all(size is None for size in sized):
        raise InputError(
            "cache", "no size", "a run needs the number of slots", "set cache.experts_per_layer or cache.pooled_experts"
        )
    if cache.policy == "belady":
        raise InputError("cache.policy", "belady", "knows the future, which a model does not", "choose another policy")
    if predictor.kind in ("synthetic", "oracle"):
        raise InputError(
            "predictor.kind", predictor.kind, "knows the truth in advance, which a model does not", "use next-gate"
        )
    _check_gates(predictor.kind, pre_gate)
    if predictor.benefit and not prices_are_known:
        raise InputError(
            "predictor.benefit",
            True,
            "weighs predicted costs, and no machine is known",
            "give --profile, or set it to false",
        )
    if kernel.miss in ("cheaper", "balanced"):
        raise InputError(
            "kernel.miss",
            kernel.miss,
            "weighs what cores take, which a run of a model is not given yet",
            "set it to fetch",
        )
    if schedule.experts.low_bits is not None:
        raise InputError(
            "experts.low_bits", schedule.experts.low_bits, "a model is run in one weight format", "leave it out"
        )
    if schedule.workload.concurrency != 1:
        raise InputError(
            "workload.concurrency", schedule.workload.concurrency, "a model is run one request at a time", "set it to 1"
        )
    if schedule.copy.write_back and schedule.copy.host_experts is not None:
        raise InputError("copy.write_back", True, "experts on disk are only read", "set it to false")
    by_popularity = cache.policy == "static" and cache.placement == "popularity"
    if by_popularity and not popularity_is_known:
        raise InputError(
            "cache.policy",
            "static",
            "is filled by popularity, of which nothing is known",
            "give --trace, a recording of this model",
        )


def _check_gates(kind: str, pre_gate: int) -> None:
    """Return nothing; raises InputError where a schedule expects gates that the model does not have."""
    if kind == "pre-gate" and pre_gate == 0:
        rule = "the model was not fine-tuned to choose a layer early"
        raise InputError("predictor.kind", "pre-gate", rule, "use next-gate")
    if kind == "pre-gate" and pre_gate > 1:
        rule = f"looks one layer ahead, and the model chooses {pre_gate} ahead: only one layer is run"
        raise InputError("predictor.kind", kind, rule, "use none")
    if kind == "next-gate" and pre_gate:
        rule = f"the model's gates choose {pre_gate} layer(s) early, which leaves nothing to guess"
        raise InputError("predictor.kind", kind, rule, "use pre-gate" if pre_gate == 1 else "use none")
