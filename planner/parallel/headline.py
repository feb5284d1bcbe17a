"""The headline of an expert-parallel plan: against what engines do today, not against plain expert parallelism.

Modelled: the rival that was named, else the balancing that SGLang, vLLM and TensorRT-LLM ship (DeepSeek's EPLB: its hierarchical rule where
expert groups divide over nodes, else the global one) with as many copies as the plan has, as the engine runs it where one is named.
Whether the plan is faster than that by more than the doubt about the difference. Ignored: what moving there costs (`migration`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...base.errors import DoesNotFit, InputError, UnknownName
from ...sim.parallel.simulate import EpPrediction
from ...specs.schedules.parallel import EP_PRESETS, ExpertParallelSchedule, load_ep_preset
from .difference import COSTS, NOTHING, PAYS, Gain, gain
from .evidence import REPORT
from .search import EpSearch, describe


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The plan beside its rival."""

    rival: EpPrediction
    why: str
    """What the rival is, in words."""
    gain: Gain

    @property
    def ratio(self) -> float:
        """How many times as fast the plan is."""
        return self.rival.step_s / (self.rival.step_s - self.gain.saved_s)

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the ratio, nine times in ten."""
        best = self.rival.step_s - self.gain.saved_s
        low, high = (1 + (self.gain.saved_s + sign * self.gain.uncertainty_s) / best for sign in (-1, 1))
        return low, high

    @property
    def words(self) -> str:
        """The headline."""
        low, high = self.interval
        ratio = f"{self.ratio:.2f} times as fast ({low:.2f} to {high:.2f}) as {self.why}"
        if self.gain.verdict == PAYS:
            return ratio
        if self.gain.verdict == COSTS:
            return f"slower: {ratio}"
        if self.gain.verdict == NOTHING:
            return f"no faster than {self.why}"
        return f"undecided, no more than its own doubt: {ratio}"

    def to_dict(self) -> dict[str, Any]:
        """Return the headline as plain values."""
        description = describe(self.rival.schedule)
        return {
            "name": self.rival.schedule.name, "why": self.why, "step_s": self.rival.step_s, "description": description,
            "schedule": self.rival.schedule.to_dict(), "rival": self.rival.to_dict() | {"description": f"{self.why}: {description}"},
            "ratio": self.ratio, "ratio_interval": list(self.interval), "words": self.words,
        } | self.gain.to_dict()  # fmt: skip


def rival_of(
    search: EpSearch, base: ExpertParallelSchedule, *, against: str | None, copies: int, engine: str | None
) -> tuple[ExpertParallelSchedule, str]:
    """Return the schedule that a plan has to beat, and what it is; raises UnknownName, or InputError for one that cannot be here."""
    groups, nodes = search.placements.expert_groups(), search.simulation.num_nodes
    usual = (
        "eplb-hierarchical"
        if nodes > 1 and groups % nodes == 0 and search.placements.num_experts % groups == 0
        else "eplb"
    )
    name = against or usual
    if name not in EP_PRESETS:
        raise UnknownName("--against", name, EP_PRESETS)
    preset = load_ep_preset(name)
    if not search.placements.available(preset.placement.policy):
        raise InputError("--against", name, "needs the routing of single tokens; the recording holds counts only",
                         "name another, or record tokens")  # fmt: skip
    own = copies if preset.placement.num_redundant else 0
    schedule = preset.with_options(
        placement__num_redundant=own, kernel__bits=base.kernel.bits,
        all_to_all__dispatch_bytes_per_value=base.all_to_all.dispatch_bytes_per_value,
    )  # fmt: skip
    if against is None:
        # DeepEP, which they use: low-latency kernels in decode, else once to every node and there once to every rank.
        shipped = "all-choices" if not search.simulation.prefill else "hierarchical" if nodes > 1 else "per-rank"
        schedule = schedule.with_options(all_to_all__kind=shipped, all_to_all__tiers="together")
    slots = search.placements.num_slots(own) // search.simulation.num_ranks
    if schedule.pipeline.split == "expert" and schedule.num_groups > slots:
        schedule = schedule.with_options(pipeline__num_groups=slots)
    copied = f" with {own} copies" if own else ""
    why = f"{name}{copied}" if against else f"the balancing that engines ship ({name}{copied})"
    if engine is not None:
        told = search.told(schedule)
        if against is not None and (told is None or _means(told) != _means(schedule)):
            raise InputError("--against", name, f"{engine} cannot be told it", "name another, or leave out --for")
        schedule = (told or base).with_options(name=name if told else "ep")
        placed = schedule.placement
        copied = f" with {placed.num_redundant} copies" if placed.num_redundant else ""
        why = f"{engine}'s {'own balancing' if against is None else name} ({placed.policy}{copied})"
        if placed.policy in ("contiguous", "round-robin"):
            why = f"{engine} with experts in their order"
    return schedule, why


def _means(schedule: ExpertParallelSchedule) -> tuple[object, ...]:
    """Return what makes a schedule the one that its name stands for: its placement, its division, what overlaps."""
    pipeline = schedule.pipeline
    return (
        schedule.placement.policy,
        schedule.parallel,
        pipeline.split,
        schedule.num_groups,
        pipeline.micro_batches,
        pipeline.shortcut,
    )


def headline(search: EpSearch, rival: ExpertParallelSchedule, why: str, best: EpPrediction) -> Headline:
    """Return the plan's best beside a rival on the reported steps; where that does not fit, as if it did, and the words say so."""
    try:
        found = search.predict(rival, REPORT, parts=True)
    except DoesNotFit:
        found = search.predict(rival, REPORT, parts=True, check_memory=False)
        why += ", which does not fit here"
    saved = gain(
        [(1, found), (-1, best)], search.simulation.uncertainties(), of_s=found.step_s, exact=search.evidence.exact
    )
    return Headline(rival=found, why=why, gain=saved)
