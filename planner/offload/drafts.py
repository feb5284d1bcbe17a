"""How many tokens to draft: a plan without drafts beside plans with them, the best of which is the answer.

Modelled: the plan without drafts is searched in full. Each draft length is then estimated with the schedules that did best without, at the
memory that drafting leaves; the most promising ones are searched in full too, and whatever was searched is compared by the request's own
objective and limits. Ignored: lengths between those looked at, drafts that end early because the draft is unsure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from ...base.errors import DoesNotFit, InputError, OutOfReach
from ...base.units import NS_PER_S
from ...sim.offload.drafting.draft import Drafting
from ...sim.offload.metrics import figures_of
from ...sim.offload.simulate import Simulation
from ...specs.drafting import tokens_per_step
from ...specs.schedules.offload import OffloadSchedule
from .objective import RANKED_BY, figures_of_metrics, value_of
from .plan import OffloadPlan, OffloadRequest
from .verdict import need_nothing, run_ns

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
"""Draft lengths that are looked at where nobody says which."""
_SEARCHED = 2
"""Lengths that are searched in full, at most."""
_NEAR, _HOPELESS = 0.03, 0.1
"""Estimates this close to the best one are searched too; none is where the best lies this far behind the plan without drafts."""
_RIVALS = 3
_NO_GAIN = 0.03
"""Gains up to this are none: repeated runs of one build differ by about as much."""
_FASTER = {
    "request_s": "a whole request is", "ttft_s": "the first token comes", "decode_tokens_per_s": "generation is",
    "requests_per_s": "requests are served", "tokens_per_s": "the whole window is", "p99_step_s": "the slowest steps are",
}  # fmt: skip
"""What is how many times as fast, by objective."""
Answer = TypeVar("Answer")
Merit = tuple[float, float, float]
"""What plans are ordered by, the least first: limits exceeded, the objective, the time of the window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimated:
    """What became of one draft length."""

    length: int
    figures: dict[str, float | None]
    """Of the plan, where it was searched; else of the best schedule that was tried."""
    merit: Merit
    searched: bool
    why: str = ""
    """Why there are no figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted(Generic[Answer]):
    """A plan, and how its draft length was chosen."""

    answer: Answer
    simulation: Simulation
    """What the answer was planned on."""
    drafting: dict[str, Any]
    """What a plan document says of it."""


def lengths_of(drafting: Drafting, most: int | None) -> tuple[int, ...]:
    """Return the draft lengths to look at, as far as the acceptance is known; most: None looks at `LENGTHS`."""
    reach = min(drafting.acceptance.longest, LENGTHS[-1] if most is None else most)
    found = {length for length in LENGTHS if length <= reach}
    return tuple(sorted(found | ({reach} if reach else set())))


def choose_drafts(
    simulation: Simulation,
    request: OffloadRequest,
    lengths: Sequence[int],
    plan_on: Callable[[Simulation, OffloadRequest], Answer],
    plan_of: Callable[[Answer], OffloadPlan],
    estimate: Callable[[Simulation, Answer], tuple[Merit, dict[str, float | None]]],
) -> Drafted[Answer]:
    """Return the best plan of those without drafts and with drafts of any of `lengths`.

    simulation: with drafting, of any length. plan_on searches on a simulation; plan_of is the plan in its answer; estimate says what a
    simulation with drafts reaches with the schedules of an answer without. Raises InputError for an objective that a length
    cannot be chosen by, and as `plan_on` does.
    """
    if request.objective == "least_memory":
        raise InputError(
            "--speculative", "least_memory", "a draft length is chosen by speed", "choose another --objective"
        )
    on = {length: simulation.drafted(length) for length in (0, *lengths)}
    answers: dict[int, Answer] = {}
    refused: Exception | None = None
    try:
        answers[0] = plan_on(on[0], request)
    except OutOfReach as error:  # drafts may keep a limit that nothing keeps without them
        refused = error
        answers[0] = plan_on(on[0], dataclasses.replace(request, ttft_s=None, tpot_s=None))
    estimates: dict[int, Estimated] = {}
    for length in lengths:
        try:
            merit, figures = estimate(on[length], answers[0])
            estimates[length] = Estimated(length=length, figures=figures, merit=merit, searched=False)
        except DoesNotFit as error:
            nothing = dict.fromkeys(figures_of_metrics(plan_of(answers[0]).best.metrics))
            estimates[length] = Estimated(
                length=length, figures=nothing, merit=(np.inf, np.inf, np.inf), searched=False, why=str(error)
            )
    plain = _of_plan(0, plan_of(answers[0]), request)
    for length in _promising(plain, list(estimates.values())):
        try:
            answers[length] = plan_on(on[length], request)
        except (DoesNotFit, OutOfReach) as error:
            estimates[length] = Estimated(
                length=length,
                figures=estimates[length].figures,
                merit=(np.inf, np.inf, np.inf),
                searched=True,
                why=str(error),
            )
            continue
        estimates[length] = _of_plan(length, plan_of(answers[length]), request)
    searched = {length: one for length, one in estimates.items() if length in answers}
    best = min((plain, *searched.values()), key=lambda one: (one.merit, one.length))
    chosen = best if best.merit[:2] < (plain.merit[0], plain.merit[1] / (1 + _NO_GAIN)) else plain
    if chosen.length == 0 and refused is not None:
        raise refused
    return Drafted(
        answer=answers[chosen.length],
        simulation=on[chosen.length],
        drafting=_to_dict(simulation, request, plain, list(estimates.values()), chosen),
    )


def estimate_with(
    simulation: Simulation, plan: OffloadPlan, request: OffloadRequest
) -> tuple[Merit, dict[str, float | None]]:
    """Return what the best of a plan's schedules reaches on a simulation with drafts, each with the cache that fits there.

    Raises DoesNotFit where none of them fits.
    """
    rivals = sorted(need_nothing(plan.baselines), key=run_ns)[:_RIVALS]
    schedules = [plan.best.schedule, *(one.schedule for one in plan.front[-1:]), *(one.schedule for one in rivals)]
    found: list[tuple[Merit, dict[str, float | None]]] = []
    misfits: list[DoesNotFit] = []
    for schedule in schedules:
        try:
            found.append(_merit_of(simulation, _resized(simulation, schedule), request))
        except DoesNotFit as error:
            misfits.append(error)
        except InputError:  # more of what it asks for than there is now
            continue
    if not found:
        raise min(misfits, key=lambda error: error.missing_bytes, default=DoesNotFit("any schedule with drafts", 1))
    return min(found, key=lambda one: one[0])


def _resized(simulation: Simulation, schedule: OffloadSchedule) -> OffloadSchedule:
    """Return a resolved schedule with as much of its cache as fits beside what drafting keeps."""
    cache = schedule.cache
    slots = cache.pooled_experts if cache.pooled_experts is not None else cache.experts_per_layer
    if cache.policy == "none" or slots is None:
        return simulation.resolve(schedule)
    each = 1 if cache.pooled_experts is not None else simulation.trace.num_layers
    fits = (simulation.slots_that_fit(schedule) - cache.first_layer_extra) // each
    if cache.placement in ("front", "back") and cache.pooled_experts is not None:
        fits = fits // simulation.trace.num_experts * simulation.trace.num_experts
    key = "cache__pooled_experts" if cache.pooled_experts is not None else "cache__experts_per_layer"
    if fits < 1:
        raise DoesNotFit(f"{schedule.name} with drafts", simulation.expert_bytes(schedule))
    return simulation.resolve(schedule.with_options(**{key: min(slots, fits)}))


def _merit_of(
    simulation: Simulation, schedule: OffloadSchedule, request: OffloadRequest
) -> tuple[Merit, dict[str, float | None]]:
    outcome, workload = simulation.run(schedule), simulation.workload(schedule)
    figures = figures_of(outcome.step_end, workload)
    steps = np.diff(np.concatenate(([0], outcome.step_end)))
    p99 = float(np.percentile(steps[workload.step_phase == workload.step_phase.max()], 99))
    return merit_of(request, figures, p99, float(outcome.step_end[-1])), figures


def merit_of(request: OffloadRequest, figures: dict[str, float | None], p99_ns: float, total_ns: float) -> Merit:
    """Return what plans are ordered by, the least first."""
    return request.limits.excess(figures), value_of(request.objective, figures, p99_ns), total_ns


def _of_plan(length: int, plan: OffloadPlan, request: OffloadRequest) -> Estimated:
    figures = figures_of_metrics(plan.best.metrics)
    p99_ns = plan.best.metrics.step_s["p99"] * NS_PER_S
    return Estimated(
        length=length, figures=figures, searched=True, merit=merit_of(request, figures, p99_ns, float(run_ns(plan.best)))
    )  # fmt: skip


def _promising(plain: Estimated, estimates: list[Estimated]) -> list[int]:
    """Return the lengths that are searched in full, the best first."""
    ranked = sorted((one for one in estimates if not one.why), key=lambda one: one.merit)
    if not ranked:
        return []
    excess, best, _ = ranked[0].merit
    if (excess, best * (1 - _HOPELESS)) > plain.merit[:2]:
        return []
    near = [one.length for one in ranked if one.merit[0] <= excess and one.merit[1] <= best * (1 + _NEAR)]
    return near[:_SEARCHED]


def fixed_drafts(drafting: Drafting) -> dict[str, Any]:
    """Return what a plan document says of drafts whose length was asked for."""
    mean = tokens_per_step(drafting.length, drafting.acceptance)
    return {
        "draft": drafting.kind, "acceptance": drafting.acceptance.to_text(), "length": drafting.length, "chosen": False,
        "tokens_per_step": mean, "gain": None, "ranked_by": None, "tried": [], "verdict": f"drafted as asked: {drafting.words}",
    }  # fmt: skip


def _to_dict(
    simulation: Simulation, request: OffloadRequest, plain: Estimated, estimates: list[Estimated], chosen: Estimated
) -> dict[str, Any]:
    drafting = simulation.drafting
    if drafting is None:
        raise InputError("--speculative", "(absent)", "nothing says what drafts", "add --acceptance")
    gain = plain.merit[1] / chosen.merit[1] if chosen.merit[1] else 1.0
    rows = []
    for one in (plain, *sorted(estimates, key=lambda each: each.length)):
        mean = tokens_per_step(one.length, drafting.acceptance)
        rows.append(
            {"length": one.length, "tokens_per_step": mean, "searched": one.searched, "why": one.why} | one.figures
        )
    return {
        "draft": drafting.kind, "acceptance": drafting.acceptance.to_text(), "length": chosen.length, "chosen": True,
        "tokens_per_step": tokens_per_step(chosen.length, drafting.acceptance), "gain": gain,
        "ranked_by": RANKED_BY[request.objective], "tried": rows, "verdict": _words(drafting, request, plain, estimates, chosen, gain),
    }  # fmt: skip


def _words(
    drafting: Drafting, request: OffloadRequest, plain: Estimated, estimates: list[Estimated], chosen: Estimated, gain: float
) -> str:  # fmt: skip
    """Return in one line whether drafting pays."""
    what = _FASTER[request.objective]
    if chosen.length:
        kept = " (no plan without drafts keeps the limits)" if plain.merit[0] > chosen.merit[0] else ""
        mean = tokens_per_step(chosen.length, drafting.acceptance)
        return (
            f"drafting pays: {_guesses(chosen.length)} a step by {drafting.kind}, {mean:.3g} tokens a step: {what} {gain:.2f} times as "
            f"fast as without{kept}"
        )
    fits = [one for one in estimates if not one.why]
    if not fits:
        return f"drafting does not fit: {estimates[0].why}" if estimates else "nothing could be drafted"
    best = min(fits, key=lambda one: one.merit)
    times = plain.merit[1] / best.merit[1] if best.merit[1] else 1.0
    said = f"the best of it, {_guesses(best.length)} a step by {drafting.kind}: {what} {times:.2f} times as fast as without"
    if times > 1:
        return f"drafting gains nothing that can be promised: {said}, and runs of one build differ by {_NO_GAIN:.0%}"
    return f"drafting does not pay: {said}"


def _guesses(length: int) -> str:
    return f"{length} guess" if length == 1 else f"{length} guesses"
