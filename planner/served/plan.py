"""A plan for one serving engine: every setting it has room for, beside what it does when it is told nothing.

Modelled: all settings of the engine's space are simulated to the end, the best and the engine's defaults by both simulators; nothing is
recommended that is predicted slower than a default, and where the difference is within what the prediction itself is uncertain
by, the plan says so. Ignored: which flags that means (`emit`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...base.bounds import binds
from ...base.errors import DoesNotFit, InputError, Internal, OutOfReach, UnknownName
from ...base.units import NS_PER_S
from ...sim.offload.metrics import counted_tokens, figures_of
from ...sim.offload.simulate import Prediction, Simulation
from ...specs.card_split import CardSplit
from ...specs.provenance import made_of
from ...specs.schedules.offload import OffloadSchedule
from ..offload.baselines import CheckedRuns
from ..offload.bounds import Bounds
from ..offload.objective import check_objective, figures_of_metrics, out_of_reach, value_of
from ..offload.plan import OffloadPlan, OffloadRequest, base_schedule, provenance_of
from ..offload.scoring import FrontPoint
from ..offload.space import Candidate
from ..offload.verdict import run_ns
from ..trials import Progress, Tally, Trials, deadline
from .difference import Difference, difference
from .ktransformers import KTRANSFORMERS
from .llamacpp import IK_LLAMA_CPP, LLAMA_CPP
from .setting import Setting, Space, device_bytes

# A gain below this fraction is none: what the engine does of itself is then the answer.
_SAME = 0.002
ENGINES: Mapping[str, Space] = {one.name: one for one in (LLAMA_CPP, IK_LLAMA_CPP, KTRANSFORMERS)}
"""Engines whose settings are a space of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A setting that was simulated."""

    setting: Setting
    figures: dict[str, float | None]
    p99_ns: float
    total_ns: int
    device_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedPlan:
    """A finished plan for an engine."""

    plan: OffloadPlan
    chosen: Setting
    default: Setting | None
    """What the engine does when it is told nothing; None where that is not modelled."""
    beside: Difference | None
    """The chosen setting beside that; None where it is that."""
    tried: tuple[Tried, ...]


def check_engine(name: str) -> None:
    """Return nothing; raises UnknownName for an engine without a space of its own."""
    if name not in ENGINES:
        more = "vllm, sglang and tensorrt-llm: simulate --engine for one box, plan --mode ep for their settings on many GPUs"
        raise UnknownName("--for", name, ENGINES, more=more)


def make_served_plans(
    simulations: Mapping[str, Simulation], request: OffloadRequest, engine: str, *, ubatch: int | None = None,
    progress: Progress | None = None,
) -> tuple[str, ServedPlan]:  # fmt: skip
    """Return the best of the plans with each type of keys and values, and its type: a later one only where it gains something.

    simulations: by type, the preferred one first. Raises as `make_served_plan` does, where no type has a plan.
    """
    found: list[tuple[str, ServedPlan]] = []
    failed: list[DoesNotFit | OutOfReach] = []
    for kind, simulation in simulations.items():
        try:
            found.append((kind, make_served_plan(simulation, request, engine, ubatch=ubatch, progress=progress)))
        except (DoesNotFit, OutOfReach) as reason:
            failed.append(reason)
    if not found:
        raise failed[-1]
    best = found[0]
    for one in found[1:]:
        theirs = _plan_merit(best[1].plan, request)
        if _plan_merit(one[1].plan, request) < (theirs[0], theirs[1] * (1 - _SAME)):
            best = one
    return best


def _plan_merit(plan: OffloadPlan, request: OffloadRequest) -> tuple[float, float]:
    """Return what plans with other keys and values are ordered by, the least first: limits exceeded, then the objective."""
    if request.objective == "least_memory":
        return 0.0, float(plan.front[-1].device_bytes)
    figures = figures_of_metrics(plan.best.metrics)
    return request.limits.excess(figures), value_of(
        request.objective, figures, NS_PER_S * plan.best.metrics.step_s["p99"]
    )


def make_served_plan(simulation: Simulation, request: OffloadRequest, engine: str, *, ubatch: int | None = None,
                     progress: Progress | None = None) -> ServedPlan:  # fmt: skip
    """Return the plan for `engine`; ubatch: the micro-batch asked for, None where the search may choose.

    Raises DoesNotFit where no setting fits, OutOfReach where none keeps the limits, InputError for what the engine cannot be told.
    """
    space = ENGINES[engine]
    if len(request.bits) > 1 or request.bits[0] != "native":
        raise InputError(
            "--bits", ",".join(request.bits), f"a file for {engine} says how experts are stored", "use --quant"
        )
    if request.objective == "least_memory" and request.floor_tokens_per_s is None:
        raise InputError("floor", None, "least memory needs a speed to reach", "give a floor in tokens per second")
    refused: list[DoesNotFit] = []
    every = space.settings(simulation, request.concurrency, ubatch, refused)
    if not every:
        raise min(refused, key=lambda reason: reason.missing_bytes)
    check_objective(request.objective, request.limits, simulation.workload(every[0].schedule))
    left_out: dict[str, str] = {}
    defaults = space.defaults(simulation, request.concurrency, ubatch, left_out)
    tried = _try_each(simulation, every, request.seconds, progress)
    best = min(tried, key=lambda one: _merit(one, request, simulation))
    excess = _merit(best, request, simulation)[0]
    if excess and request.limits:
        raise out_of_reach(request.limits, best.setting.words, best.figures)
    if excess:
        most = max(_speed(one, simulation) for one in tried)
        raise DoesNotFit(
            f"no setting reaches {request.floor_tokens_per_s:g} tokens/s; the fastest reaches {most:.4g}", 0
        )
    default = next(iter(defaults), None)
    granted = 0.0 if default is None else _granted(simulation, engine, default, request.objective)
    if default is not None:
        unset = _try(simulation, default)
        nearly = _merit(unset, request, simulation, max(granted, _SAME))
        if nearly <= _merit(best, request, simulation):
            best = unset
    return _finished(simulation, request, best, defaults, tried, left_out, granted, len(every))


def best_setting(
    simulation: Simulation, request: OffloadRequest, engine: str, ubatch: int | None
) -> tuple[tuple[float, float, float], dict[str, float | None]]:
    """Return how good the best setting with micro-batches of `ubatch` is (limits exceeded, the objective, the window's time, the least
    first), and its figures, not compared with what the engine does of itself. Raises DoesNotFit where none fits.
    """
    refused: list[DoesNotFit] = []
    every = ENGINES[engine].settings(simulation, request.concurrency, ubatch, refused)
    if not every:
        raise min(refused, key=lambda reason: reason.missing_bytes)
    tried = _try_each(simulation, every, request.seconds, None)
    best = min(tried, key=lambda one: _merit(one, request, simulation))
    return _merit(best, request, simulation)[:3], best.figures


def _finished(simulation: Simulation, request: OffloadRequest, best: Tried, defaults: list[Setting], tried: list[Tried],
              left_out: dict[str, str], granted: float, num_settings: int) -> ServedPlan:  # fmt: skip
    """Return the plan of the setting that was chosen, run again by both simulators beside the engine's defaults."""
    winner = best.setting.schedule.with_options(name="best")
    whole, simulation = simulation, simulation.divided(best.setting.split)
    simulation.warm(base_schedule(request, winner.experts.bits))  # compile before forking, so that the workers need not
    runs = [(one.split, one.schedule.with_options(name=one.words)) for one in defaults]
    predictions, misfits = _checked(whole, [*runs, (best.setting.split, winner)])
    *rivals, confirmed = predictions
    if confirmed.schedule.name != winner.name or run_ns(confirmed) != best.total_ns:
        raise Internal(f"the winner's re-run differs from its score: {best.setting.words}")
    shown = simulation.predict(winner, rows=True)
    shown = dataclasses.replace(shown, engine=confirmed.engine)
    base = base_schedule(request, winner.experts.bits).with_options(
        workload__prefill_chunk_tokens=best.setting.ubatch, workload__concurrency=request.concurrency
    )
    cached = best.setting.cached_experts
    bound = Bounds(simulation, base).of(Candidate(schedule=best.setting.schedule, level=cached, cached_slots=cached))
    steps = shown.metrics.num_steps
    bound_s, mean_s = bound.whole_ns / NS_PER_S / steps, best.total_ns / NS_PER_S / steps
    default = next(iter(defaults), None)
    beside = None
    if default is not None and best.setting != default:
        beside = difference(simulation, best.setting.schedule, default.schedule, request.objective, granted=granted,
                            elsewhere=whole.divided(default.split))  # fmt: skip
    plan = OffloadPlan(
        request=dataclasses.replace(request, prefill_chunk_tokens=best.setting.ubatch), best=shown, baselines=tuple(rivals),
        left_out=left_out | misfits, front=tuple(_front(tried, request, simulation)), references={},
        tally=Tally(num_evaluated=len(tried), num_skipped=num_settings - len(tried)), lower_bound_step_s=bound_s,
        optimality_gap=mean_s / bound_s - 1 if bound_s else float("inf"), verdict=_verdict(shown, best, default, beside),
        provenance=provenance_of(simulation), made_of=made_of(simulation.model, simulation.profile),
        simulation=simulation,
    )  # fmt: skip
    return ServedPlan(plan=plan, chosen=best.setting, default=default, beside=beside, tried=tuple(tried))


def _checked(
    simulation: Simulation, runs: Sequence[tuple[CardSplit | None, OffloadSchedule]]
) -> tuple[list[Prediction], dict[str, str]]:
    """Return the predictions by both simulators of schedules, each under its division over cards, in order; and why others have none."""
    found: list[Prediction] = []
    misfits: dict[str, str] = {}
    for split, group in itertools.groupby(runs, key=lambda run: run[0]):
        with CheckedRuns(simulation.divided(split)) as checked:
            for _, schedule in group:
                checked.submit(schedule)
            predictions, refused = checked.collect()
        found += predictions
        misfits |= refused
    return found, misfits


def served_to_dict(found: ServedPlan, engine: str, version: str) -> dict[str, Any]:
    """Return what a plan document says of its engine: the setting chosen, what the engine does of itself, how they compare."""
    rows = sorted(found.tried, key=lambda one: one.figures["window_s"] or 0.0)
    return {
        "engine": engine,
        "version": version,
        "setting": _setting_to_dict(found.chosen),
        "default": None if found.default is None else _setting_to_dict(found.default),
        "difference": None
        if found.beside is None
        else dataclasses.asdict(found.beside) | {"promised": found.beside.promised},
        "tried": [_setting_to_dict(one.setting) | {"device_bytes": one.device_bytes} | one.figures for one in rows],
    }


def _setting_to_dict(one: Setting) -> dict[str, Any]:
    return {
        "name": one.words, "host_layers": one.host_layers, "ubatch": one.ubatch, "op_offload": one.op_offload, "fitted": one.fitted,
        "part_of_layer": one.part_of_layer, "told_layers": one.told_layers, "card": one.card, "experts_per_layer": one.experts_per_layer,
        "upload_tokens": one.schedule.kernel.upload_tokens, **({} if one.split is None else {"split": one.split.to_dict()}),
    }  # fmt: skip


def _try_each(
    simulation: Simulation, every: list[Setting], seconds: float | None, progress: Progress | None
) -> list[Tried]:
    """Return what becomes of every setting, in their order, simulated over all cores; seconds: after so long no further are begun."""
    tried: list[Tried] = []
    with Trials(total=len(every), until=deadline(seconds), progress=progress) as trials:
        for batch in trials.batches(every, partial(bool, tried)):
            tried += trials.each(lambda one: _try(simulation, one), batch)
            trials.tell(len(batch), batch[-1].words)
    return tried


def _try(simulation: Simulation, one: Setting) -> Tried:
    schedule = one.schedule
    outcome, workload = simulation.divided(one.split).run(schedule), simulation.workload(schedule)
    figures = figures_of(outcome.step_end, workload)
    return Tried(setting=one, figures=figures, p99_ns=_p99(outcome.step_end, workload), total_ns=int(outcome.step_end[-1]),
                 device_bytes=device_bytes(simulation, one))  # fmt: skip


def _p99(step_end: Any, workload: Any) -> float:
    import numpy as np

    steps = np.diff(np.concatenate(([0], step_end)))
    return float(np.percentile(steps[workload.step_phase == workload.step_phase.max()], 99))


def _speed(one: Tried, simulation: Simulation) -> float:
    """Return the tokens per second of the window that a floor is about."""
    return counted_tokens(simulation.workload(one.setting.schedule)) * NS_PER_S / one.total_ns


def _merit(
    one: Tried, request: OffloadRequest, simulation: Simulation, granted: float = 0.0
) -> tuple[float, float, float, int]:
    """Return what settings are ordered by, the least first; granted: the fraction of its time that a setting is forgiven."""
    if request.objective == "least_memory":
        short = max(0.0, (request.floor_tokens_per_s or 0.0) / _speed(one, simulation) - 1)
        return short, float(one.device_bytes), float(one.total_ns), 0
    value = value_of(request.objective, one.figures, one.p99_ns) * (1 - granted)
    return request.limits.excess(one.figures), value, one.total_ns * (1 - granted), one.device_bytes


def _granted(simulation: Simulation, engine: str, default: Setting, objective: str) -> float:
    """Return the fraction of its time that the part of a layer, which is not simulated, may save a default at most."""
    if not default.part_of_layer or objective == "least_memory":
        return 0.0
    more = ENGINES[engine].fuller(simulation, default)
    one, other = (_try(simulation, each) for each in (default, more))
    before, after = (value_of(objective, each.figures, each.p99_ns) for each in (one, other))
    return max(0.0, default.part_of_layer * (1 - after / before))


def _front(tried: list[Tried], request: OffloadRequest, simulation: Simulation) -> list[FrontPoint]:
    """Return the best setting with at most as much memory, for every amount that one takes."""
    found: list[FrontPoint] = []
    best: Tried | None = None
    for one in sorted(tried, key=lambda one: one.device_bytes):
        if best is None or _merit(one, request, simulation) < _merit(best, request, simulation):
            best = one
            level = max(1, one.setting.cached_experts)
            found.append(
                FrontPoint(
                    level=level, device_bytes=one.device_bytes, figures=one.figures, schedule=one.setting.schedule
                )
            )
    return found


def _verdict(best: Prediction, chosen: Tried, default: Setting | None, beside: Difference | None) -> str:
    """Return in one line what binds and what the chosen setting is beside what the engine does of itself."""
    said = binds(best.metrics.bound)
    if default is None:
        return f"{said}; what the engine does when it is told nothing is not modelled here"
    if beside is None:
        return f"{said}; nothing to set: no setting is predicted faster than what the engine does when it is told nothing, {default.words}"
    credited = f", credited with {default.part_of_layer:.0%} of one more layer" if default.part_of_layer else ""
    against = f"{default.words}{credited}"
    if not beside.promised:
        told = chosen.setting.words
        return (
            f"{said}; no difference that this prediction can promise: {told} is predicted {beside.words} as {against}"
        )
    cause = next(iter(beside.shares), None)
    unsure = "" if cause is None else f"; most of that range comes from {cause}"
    return f"{said}; {chosen.setting.words} is predicted {beside.words} as {against}, shared errors cancelled{unsure}"
