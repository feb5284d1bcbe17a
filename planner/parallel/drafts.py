"""How many tokens the model's draft layer drafts: a plan without drafts beside plans with them, the best of which is the answer.

Modelled: the plan without drafts is searched in full. Each draft length is then estimated with the schedule that did best without; the most
promising ones are searched in full too, and whatever was searched is compared by generated tokens a second, of plans that keep their
limits. What a step takes does not depend on how many of the tokens that it checks are accepted, so the acceptance from which a length pays
follows from the two steps alone. Ignored: batches other than the request's own in estimates, drafts that end early.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...base.errors import DoesNotFit, InputError, OutOfReach
from ...specs.drafting import read_acceptance, share_accepted, tokens_per_step, yielding
from .case import ParallelRequest, Recording, evidence_of, prepare_ep
from .evidence import REPORT
from .latency import Latency, latency
from .plan import ParallelPlan

LENGTHS = (1, 2, 3, 4, 5, 6, 8)
"""Draft lengths that are looked at where nobody says which: a draft layer's later guesses come from its own earlier ones."""
_SEARCHED = 2
"""Lengths that are searched in full, at most."""
_NEAR, _HOPELESS = 0.03, 0.1
"""Estimates this close to the best one are searched too; none is where the best lies this far behind the plan without drafts."""
_NO_GAIN = 0.03
"""Gains up to this are none: repeated runs of one build differ by about as much."""
_DRAFT = "mtp"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tried:
    """What became of one draft length."""

    length: int
    step_s: float | None
    waits: Latency | None
    excess: float
    """By how much limits are exceeded, as shares of them."""
    searched: bool
    why: str = ""
    """Why there are no figures."""

    @property
    def merit(self) -> tuple[float, float]:
        """What lengths are ordered by, the least first."""
        return (float("inf"), 0.0) if self.waits is None else (self.excess, -self.waits.tokens_per_s)


def with_drafts(request: ParallelRequest, length: int) -> ParallelRequest:
    """Return the request with drafts of `length` guesses, none at 0."""
    return dataclasses.replace(
        request, speculative=False, draft_tokens=length, acceptance=request.acceptance if length else None
    )


def lengths_of(request: ParallelRequest) -> tuple[int, ...]:
    """Return the draft lengths to look at: up to the most asked for, as far as the acceptance is known."""
    known = read_acceptance(request.acceptance or "0").longest
    if request.draft_tokens > known:
        rule = f"acceptance is known for {known} positions"
        raise InputError(
            "--draft-tokens", request.draft_tokens, rule, "draft fewer, or give one number for all positions"
        )
    reach = min(known, request.draft_tokens or LENGTHS[-1])
    return tuple(sorted({length for length in LENGTHS if length <= reach} | {reach}))


def choose_ep_drafts(
    request: ParallelRequest, recording: Recording, plan_with: Callable[[ParallelRequest], ParallelPlan]
) -> ParallelPlan:
    """Return the best plan of those without drafts and with drafts of any length; plan_with searches for a request.

    Raises as `plan_with` does.
    """
    refused: Exception | None = None
    try:
        plain = plan_with(with_drafts(request, 0))
    except OutOfReach as error:  # drafts may keep a limit that nothing keeps without them
        refused = error
        plain = plan_with(dataclasses.replace(with_drafts(request, 0), ttft_s=None, tpot_s=None))
    plans = {0: plain}
    found = {0: _of_plan(0, plain, request)}
    for length in lengths_of(request):
        found[length] = _estimated(plain, recording, request, length)
    for length in _promising(found):
        try:
            plans[length] = plan_with(with_drafts(request, length))
        except (DoesNotFit, OutOfReach) as error:
            found[length] = _Tried(length=length, step_s=None, waits=None, excess=0.0, searched=True, why=str(error))
            continue
        found[length] = _of_plan(length, plans[length], request)
    best = min((found[length] for length in plans), key=lambda one: (one.merit, one.length))
    excess, speed = found[0].merit
    chosen = best if best.merit < (excess, speed * (1 + _NO_GAIN)) else found[0]
    if chosen.length == 0 and refused is not None:
        raise refused
    drafting = _to_dict(request, found, chosen)
    return dataclasses.replace(plans[chosen.length], drafting=drafting)


def fixed_ep_drafts(request: ParallelRequest) -> dict[str, Any] | None:
    """Return what a plan document says of drafts whose length was asked for, None without any."""
    if not request.draft_tokens or request.acceptance is None:
        return None
    words = f"drafted as asked: {_guesses(request.draft_tokens)} a step by the draft layer"
    return {
        "draft": _DRAFT, "acceptance": request.acceptance, "length": request.draft_tokens, "chosen": False,
        "tokens_per_step": request.tokens_a_step, "gain": None, "ranked_by": None, "tried": [], "verdict": words,
    }  # fmt: skip


def _of_plan(length: int, plan: ParallelPlan, request: ParallelRequest) -> _Tried:
    return _Tried(
        length=length, step_s=plan.best.step_s, waits=plan.latency, excess=_excess(plan.latency, request), searched=True
    )


def _estimated(plan: ParallelPlan, recording: Recording, request: ParallelRequest, length: int) -> _Tried:
    """Return what drafts reach with the schedule that did best without, at the same batch."""
    mine = dataclasses.replace(plan.request, draft_tokens=length, acceptance=request.acceptance)
    model, schedule = plan.search.simulation.model, plan.best.schedule
    try:
        search = prepare_ep(model, plan.search.simulation.profile, evidence_of(model, recording, mine), mine, schedule)
        step_s = search.predict(schedule, REPORT).step_s
        without = dataclasses.replace(mine, tpot_s=None)  # the largest batch that keeps it is of plans alone
        waits = latency(search, recording, without, schedule, step_s, search.memory(schedule)[1])
    except DoesNotFit as error:
        return _Tried(length=length, step_s=None, waits=None, excess=0.0, searched=False, why=str(error))
    return _Tried(length=length, step_s=step_s, waits=waits, excess=_excess(waits, request), searched=False)


def _excess(waits: Latency, request: ParallelRequest) -> float:
    limits = ((request.ttft_s, waits.ttft_s), (request.tpot_s, waits.tpot_s))
    return sum(max(0.0, value / limit - 1) for limit, value in limits if limit is not None and value is not None)


def _promising(found: dict[int, _Tried]) -> list[int]:
    """Return the lengths that are searched in full, the best first."""
    ranked = sorted((one for one in found.values() if one.length and one.waits is not None), key=lambda one: one.merit)
    if not ranked:
        return []
    excess, best = ranked[0].merit
    if (excess, best * (1 + _HOPELESS)) > found[0].merit:
        return []
    near = [one.length for one in ranked if one.merit[0] <= excess and one.merit[1] <= best * (1 - _NEAR)]
    return near[:_SEARCHED]


def _to_dict(request: ParallelRequest, found: dict[int, _Tried], chosen: _Tried) -> dict[str, Any]:
    acceptance, plain = read_acceptance(request.acceptance or "0"), found[0]
    rows = [
        {
            "length": one.length, "tokens_per_step": tokens_per_step(one.length, acceptance), "searched": one.searched, "why": one.why,
            "step_s": one.step_s, "tokens_per_s": None if one.waits is None else one.waits.tokens_per_s,
            "tpot_s": None if one.waits is None else one.waits.tpot_s, "pays_from": _pays_from(one, plain),
        }
        for one in sorted(found.values(), key=lambda each: each.length)
    ]  # fmt: skip
    return {
        "draft": _DRAFT, "acceptance": acceptance.to_text(), "length": chosen.length, "chosen": True,
        "tokens_per_step": tokens_per_step(chosen.length, acceptance), "gain": _gain(chosen, plain),
        "ranked_by": "generated tokens/s", "tried": rows, "verdict": _words(found, chosen, acceptance.to_text()),
    }  # fmt: skip


def _pays_from(one: _Tried, plain: _Tried) -> float | None:
    """Return the share of accepted guesses from which a length pays at the batch of the plan without, None where at no share."""
    if not one.length or one.step_s is None or plain.step_s is None:
        return None
    needed = one.step_s / plain.step_s
    return None if needed > one.length + 1 else share_accepted(one.length, yielding(one.length, max(1.0, needed)))


def _gain(one: _Tried, plain: _Tried) -> float:
    if one.waits is None or plain.waits is None:
        return 1.0
    return one.waits.tokens_per_s / plain.waits.tokens_per_s


def _words(found: dict[int, _Tried], chosen: _Tried, acceptance: str) -> str:
    """Return in one line whether drafting pays."""
    plain = found[0]
    if chosen.length:
        kept = " (no plan without drafts keeps the limits)" if plain.excess > chosen.excess else ""
        return (
            f"drafting pays: {_guesses(chosen.length)} a step by the draft layer, at an acceptance of {acceptance}: "
            f"{_gain(chosen, plain):.2f} times the generated tokens of a plan without{kept}"
        )
    others = [one for one in found.values() if one.length and one.waits is not None]
    if not others:
        return f"drafting does not fit: {found[max(found)].why}"
    best = min(others, key=lambda one: one.merit)
    times = _gain(best, plain)
    said = f"the best of it, {_guesses(best.length)} a step: {times:.2f} times the generated tokens of a plan without"
    if best.merit[0] > plain.merit[0]:
        return f"drafting does not keep the limits: {said}"
    if times > 1:
        return f"drafting gains nothing that can be promised: {said}, and runs of one build differ by {_NO_GAIN:.0%}"
    return f"drafting does not pay: {said}"


def _guesses(length: int) -> str:
    return f"{length} guess" if length == 1 else f"{length} guesses"
