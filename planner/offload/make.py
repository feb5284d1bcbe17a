"""The planner at work: a search for each weight format, what its engine can be told beside it, rivals run, one answer checked.

Modelled: everything that a finished plan holds (`plan`). Micro-batch and type of keys and values are chosen among `Variants`. Ignored: what
stands in a document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ...base.errors import DoesNotFit, Internal
from ...base.units import NS_PER_S
from ...sim.offload.metrics import counted_tokens
from ...sim.offload.simulate import Prediction, Simulation
from ...specs.provenance import made_of
from ...specs.schedules.offload import OffloadSchedule
from ..trials import Progress, Tally, deadline
from .baselines import CheckedRuns
from .bounds import Bounds
from .objective import out_of_reach
from .plan import OffloadPlan, OffloadRequest, base_schedule, provenance_of
from .scoring import Scored, SearchResult, front_point, is_better, merit, score
from .search import search
from .space import Candidate
from .variants import Aim, Variant, Variants
from .verdict import need_nothing, references_of, run_ns, verdict, with_memory


@dataclass(slots=True, kw_only=True)
class _Found:
    """What was found with one weight format."""

    base: OffloadSchedule
    """What the search did not change, under the variant of the best."""
    variant: Variant
    result: SearchResult


def make_plan(
    simulation: Simulation,
    request: OffloadRequest,
    *,
    variants: Variants | None = None,
    progress: Progress | None = None,
) -> OffloadPlan:
    """Return the plan for `request` on the simulation's window.

    variants: the micro-batches and types of keys and values to choose from; None: those of the request and of the simulation.
    Raises DoesNotFit when no weight format leaves room for any schedule.
    """
    if variants is None:
        only = Variant(simulation=simulation, kv_type="as asked", ubatch=request.prefill_chunk_tokens)
        variants = Variants(every=(only,))
    bases = [
        base_schedule(request, simulation.model.native_bits if bits == "native" else bits) for bits in request.bits
    ]
    found: list[_Found] = []
    first = variants.first(bases[0], request.objective)
    first.simulation.warm(first.of(bases[0]))  # compile before forking, so that the workers need not
    compared = first.simulation
    if request.objective == "least_memory":  # what the answer has to beat, it has to beat with the answer's memory
        found = _search_each(variants, bases, request, progress)
        least = min(found, key=lambda one: _merit(one.result, request))
        compared = with_memory(least.variant.simulation, least.result.front[-1].device_bytes)
    with CheckedRuns(compared) as checked:
        begun = None
        if len(bases) == 1:
            begun = found[0].base if found else first.of(bases[0])
            checked.submit_presets(begun)
        found = found or _search_each(variants, bases, request, progress)
        won = min(found, key=lambda one: _merit(one.result, request))
        base, result, simulation = won.base, won.result, won.variant.simulation
        if request.limits.excess(result.best.figures):
            nearest = result.best.candidate.words()
            raise out_of_reach(request.limits, nearest or "the plainest schedule", result.best.figures)
        same = request.objective == "least_memory" or simulation is compared
        winner = result.best.candidate.schedule.with_options(name="best")
        if same:
            if begun != base:
                checked.forget()
                checked.submit_presets(base)
            checked.submit(winner)
            predictions, left_out = checked.collect()
    if not same:  # keys and values of another type
        compared = simulation
        with CheckedRuns(compared) as checked:
            checked.submit_presets(base)
            checked.submit(winner)
            predictions, left_out = checked.collect()
    rivals, confirmed = predictions[:-1], predictions[-1]
    if confirmed.schedule.name != winner.name or run_ns(confirmed) != result.best.total_ns:
        raise Internal(f"the winner's re-run differs from its score: {result.best.candidate.words()}")
    same_as = _better_rival(simulation, base, request, result, rivals)
    if same_as is not None:
        confirmed = same_as
        winner = same_as.schedule.with_options(name="best")
    best = simulation.predict(winner, rows=True)
    if best.outcome.makespan_ns != confirmed.outcome.makespan_ns or run_ns(best) != result.best.total_ns:
        raise Internal("the winner's re-run differs from its score")
    best = dataclasses.replace(best, engine=confirmed.engine)
    references = references_of(compared, best)
    steps = best.metrics.num_steps
    least_ns = min(one.result.lower_bound_ns for one in found)
    if result.best.total_ns < least_ns:
        words = result.best.candidate.words()
        raise Internal(f"a schedule took {result.best.total_ns} ns, below the bound of {least_ns} ns for all: {words}")
    bound_s, mean_s = least_ns / NS_PER_S, result.best.total_ns / NS_PER_S
    tally = Tally()
    for one in found:
        tally.add(one.result.tally)
    return OffloadPlan(
        request=dataclasses.replace(request, prefill_chunk_tokens=base.workload.prefill_chunk_tokens),
        best=best,
        baselines=tuple(rivals),
        left_out=left_out,
        front=tuple(result.front),
        references=references,
        tally=tally,
        lower_bound_step_s=bound_s / steps,
        optimality_gap=mean_s / bound_s - 1 if bound_s else float("inf"),
        verdict=verdict(
            best,
            rivals,
            references,
            same_as=same_as.schedule.name if same_as is not None else None,
            floor_tokens_per_s=request.floor_tokens_per_s,
            objective=request.objective,
        ),
        provenance=provenance_of(simulation),
        made_of=made_of(simulation.model, simulation.profile),
        simulation=simulation,
        variant=won.variant,
    )


def _search_each(
    variants: Variants, bases: list[OffloadSchedule], request: OffloadRequest, progress: Progress | None
) -> list[_Found]:
    """Return what is found with each weight format that leaves room for any schedule; raises DoesNotFit when none does."""
    found, misfits = [], []
    simulation = variants.every[0].simulation
    seconds = None if request.seconds is None else request.seconds / len(bases)
    for base in bases:
        until = deadline(seconds)
        low_bits = _smaller(simulation, base, bases)
        try:
            searched = variants.every if request.exhaustive else (variants.first(base, request.objective),)
        except DoesNotFit as reason:
            misfits.append(reason)
            continue
        mine: list[_Found] = []
        for variant in searched:
            try:
                result = search(
                    variant.simulation,
                    variant.of(base),
                    objective=request.objective,
                    floor_tokens_per_s=request.floor_tokens_per_s,
                    low_bits=low_bits,
                    exhaustive=request.exhaustive,
                    limits=request.limits,
                    seconds=None if seconds is None else seconds / len(searched),
                    progress=progress,
                )
            except DoesNotFit as reason:
                misfits.append(reason)
            else:
                mine.append(_Found(base=variant.of(base), variant=variant, result=result))
        if mine:
            best = min(mine, key=lambda one: (*_merit(one.result, request), one.variant.rank))
            _improve(variants, best, base, request, low_bits, until)
            found += mine
    if not found:
        raise min(misfits, key=lambda reason: reason.missing_bytes)
    return found


def _improve(
    variants: Variants,
    found: _Found,
    base: OffloadSchedule,
    request: OffloadRequest,
    low_bits: str | None,
    until: float,
) -> None:
    """Put what another variant, or the machine's engine, has in the place of the best that was found, where it is better."""
    result, least = found.result, request.objective == "least_memory"
    floor_ns = 0
    if least and request.floor_tokens_per_s is not None:
        tokens = counted_tokens(found.variant.simulation.workload(found.base))
        floor_ns = int(tokens * NS_PER_S / request.floor_tokens_per_s)
    aim = Aim(objective=request.objective, limits=request.limits, floor_ns=floor_ns)
    better = variants.improved(result.best, found.variant, base, aim, until)
    result.tally.add(better.tally)
    result.lower_bound_ns = min(result.lower_bound_ns, better.lower_bound_ns)
    if not request.exhaustive and not least:
        number, bound_ns = variants.unsearched(found.variant, base, low_bits)
        result.tally.num_raced_out += number
        result.lower_bound_ns = min(result.lower_bound_ns, bound_ns)
    if better.best is not result.best:
        result.best, found.variant, found.base = better.best, better.variant, better.variant.of(base)
        level = better.best.candidate.level
        result.front = [one for one in result.front if one.level < level]
        result.front.append(front_point(found.variant.simulation, level, better.best))


def _smaller(simulation: Simulation, base: OffloadSchedule, bases: list[OffloadSchedule]) -> str | None:
    """Return the largest allowed weight format smaller than the base's own, for experts that may have two."""
    smaller = [other for other in bases if simulation.expert_bytes(other) < simulation.expert_bytes(base)]
    return max(smaller, key=simulation.expert_bytes).experts.bits if smaller else None


def _merit(result: SearchResult, request: OffloadRequest) -> tuple[float, ...]:
    if request.objective == "least_memory":
        return (float(result.front[-1].device_bytes),)
    return merit(result.best, request.objective, request.limits)


def _better_rival(simulation: Simulation, base: OffloadSchedule, request: OffloadRequest, result: SearchResult,
                  rivals: Sequence[Prediction]) -> Prediction | None:  # fmt: skip
    """Return the published schedule that needs nothing special and is better than the search's best, which it then replaces in
    `result`; None where there is none.
    """
    found: tuple[Prediction, Scored] | None = None
    best = result.best
    for rival in need_nothing(rivals):
        cache = rival.schedule.cache
        slots = cache.slots(simulation.trace.num_layers)
        candidate = Candidate(schedule=rival.schedule, level=result.front[-1].level, cached_slots=slots)
        if request.objective == "tokens_per_s" and run_ns(rival) >= best.total_ns:
            continue
        bound = Bounds(simulation, base).of(candidate)
        scored = score(simulation, candidate, bound, simulation.workload(base))
        if scored is None or run_ns(rival) != scored.total_ns:
            raise Internal(f"a published schedule's re-run differs from its score: {candidate.words()}")
        if request.objective == "least_memory":
            # With no more memory than the search's best; a faster one reaches the floor all the more.
            better = scored.total_ns < best.total_ns
        else:
            better = is_better(scored, best, request.objective, request.limits)
        if better:
            found, best = (rival, scored), scored
            result.lower_bound_ns = min(result.lower_bound_ns, bound.whole_ns)
    if found is None:
        return None
    result.best = best
    result.front[-1] = front_point(simulation, result.front[-1].level, best)
    return found[0]
