"""An expert-parallel plan in words: what to do, and what a reader must know before trusting it.

Modelled: the verdict in one line, assumptions one a line. Ignored: figures beside them (`reports`).
"""

from __future__ import annotations

from ...base.units import GIB
from ...sim.parallel.simulate import EpPrediction, ParallelSimulation
from ...specs.machines.bundled_kernels import kernel_machines
from ...specs.machines.engines import SERVED_SHARE
from ...specs.schedules.parallel import ExpertParallelSchedule
from .difference import PAYS
from .evidence import CHOOSE, PLAN, REPORT, CountEvidence, TokenEvidence
from .headline import Headline
from .migration import Migration
from .search import EpSearch, describe


def ep_verdict(best: EpPrediction, plain: EpPrediction, beside: Headline, moved: Migration) -> str:
    """Return in one line what to do."""
    gain = best.step_s / plain.step_s - 1
    from_plain = f"{gain:+.1%} step time against plain expert parallelism"
    if beside.gain.verdict != PAYS:
        return f"stay with {beside.why}: the best found ({describe(best.schedule)}) is {beside.words}; {from_plain}"
    if moved.num_experts == 0:
        return f"{describe(best.schedule)}: {beside.words}; {from_plain}, nothing to move; do it"
    do = "do it" if moved.steps_to_pay_back is not None else "do it without moving experts"
    alone = moved.saved_s_per_step / (best.step_s + moved.saved_s_per_step)
    pays = (
        f"pays back after {moved.steps_to_pay_back} steps" if moved.steps_to_pay_back is not None else "never pays back"
    )
    return (
        f"{describe(best.schedule)}: {beside.words}; {from_plain}, placement alone {-alone:+.1%}; moving {moved.num_bytes / GIB:.0f} GiB "
        f"stalls {moved.stall_s:.2f} s and {pays}; {do}"
    )


def filled(simulation: ParallelSimulation) -> list[str]:
    """Return in words that a card is filled as far as serving engines fill it of themselves, where it is."""
    whole = simulation.profile.memory_bytes
    if simulation.profile.device.kind == "cpu" or simulation.budget_bytes != int(whole * SERVED_SHARE):
        return []
    return [f"memory: {SERVED_SHARE:.0%} of each GPU, as serving engines fill of themselves; --memory says another"]


def assumptions(
    search: EpSearch,
    evidence: TokenEvidence | CountEvidence,
    base: ExpertParallelSchedule,
    chosen: ExpertParallelSchedule,
) -> tuple[str, ...]:
    """Return, in words, what a reader must know before trusting the plan."""
    dense = search.simulation.costing.costs.dense_format.name
    found = [*evidence.notes, f"experts are stored in {base.kernel.bits} bits, all other weights in {dense}"]
    found += filled(search.simulation)
    found.append("costs: " + search.simulation.sources() + "; kernels are issued ahead, so the host costs nothing")
    kernels = search.simulation.profile.kernels
    if kernels is not None:
        where = (
            "as measured on this card"
            if kernels.source != "assumed"
            else "of the measured card that it is made like, scaled by bandwidth and peak"
        )
        found.append(f"kernels and exchanges {where}: those of {kernels.engine} {kernels.version}, of NCCL and DeepEP")
    elif search.simulation.profile.name in kernel_machines():
        found.append(
            "the card's rates are not those its kernels were measured at: a roofline takes their place, faster than kernels are"
        )
    found.append(f"hierarchical EPLB keeps {search.placements.expert_groups()} expert groups together")
    if chosen.parallel != base.parallel:
        found.append(
            "the best divides the model in another way: the engine starts anew, which moving experts does not count"
        )
    if chosen.placement.policy == "search":
        ours = search.placements.searched_for(chosen)
        names = ", ".join(f"{name} {ours.layers_from.count(name)}" for name in sorted(set(ours.layers_from)))
        found.append(f"layers of the searched placement by what did best on other requests: {names}")
    if isinstance(evidence, TokenEvidence):
        counts = [len(evidence.parts[part]) for part in (PLAN, CHOOSE, REPORT)]
        found.append(f"planned on {counts[0]}, chosen by {counts[1]} and reported on {counts[2]} steps of {evidence.step_tokens} "
                     "tokens, from disjoint requests")  # fmt: skip
    return tuple(found)
