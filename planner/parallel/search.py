"""The search for an expert-parallel schedule: placement and routing first, then how exchanges and kernels overlap.

Modelled: (1) every placement, router and exchange without overlap; (2) every pipeline and kernel choice on the best few of
them. All are simulated with the compiled twin on requests that no placement has seen. A schedule that does not fit
in a rank's memory is left out by name. Ignored: schedules that change the model (a shortcut) or cannot be run (tiles without
loss): those are references, not candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ...base.errors import DoesNotFit
from ...sim.parallel.simulate import EpPrediction, ParallelSimulation
from ...specs.schedules.parallel import ExpertParallelSchedule
from .candidates import Placements
from .evidence import Evidence

# (done, expected, what): as the other planner reports its progress.
EpProgress = Callable[[int, int, str], None]
# Placements that go on to the second stage.
_KEPT = 3
# Further policies that go on, however they rank.
_RIVALS = 3
_GROUPS = (2, 3, 4, 5, 8)
_CHUNKS = (2, 4)
# Shares of multiprocessors kept for exchanges: 16 of 132 (arXiv 2410.12247) and 24 of 132 (deepseek-ai/profile-data).
_SM_FRACTIONS = (16 / 132, 24 / 132)


# Divisions with attention shared inside nodes, in a few words.
_PARALLELISMS = {
    "expert": "attention sliced in nodes", "sharded": "attention and experts sliced in nodes",
    "node": "attention sliced and experts spread in each node", "tensor": "all sliced in each node",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One schedule and its prediction."""

    schedule: ExpertParallelSchedule
    prediction: EpPrediction


@dataclass(slots=True)
class EpSearch:
    """Scores schedules on parts of the evidence."""

    simulation: ParallelSimulation
    evidence: Evidence
    placements: Placements
    progress: EpProgress | None = None
    num_evaluated: int = 0
    expected: int = 0

    def predict(
        self,
        schedule: ExpertParallelSchedule,
        part: str,
        *,
        engine: str = "twin",
        rows: bool = False,
        parts: bool = False,
    ) -> EpPrediction:
        """Return the prediction of a schedule on a part; raises DoesNotFit."""
        loads = self.evidence.loads(part, self.placements.candidate(schedule), schedule)
        self.num_evaluated += 1
        if self.progress is not None:
            self.progress(self.num_evaluated, max(self.expected, self.num_evaluated), schedule.name)
        return self.simulation.predict(schedule, loads, engine=engine, rows=rows, parts=parts)

    def best(self, base: ExpertParallelSchedule, redundant: int, part: str) -> list[Scored]:
        """Return all schedules that fit, best first; raises DoesNotFit where none does."""
        misfits: list[DoesNotFit] = []
        first = list(self.placed(base, redundant))
        self.expected = self.num_evaluated + len(first) + (_KEPT + _RIVALS) * 2 * (len(_GROUPS) + len(_CHUNKS) + 2)
        placed = self._score(first, part, misfits)
        if not placed:
            raise min(misfits, key=lambda reason: reason.missing_bytes)
        found = list(placed)
        kept = placed[:_KEPT]
        # What is best when exchanges hide need not be best before: other policies are overlapped as well, each at its best.
        others = {each.schedule.placement.policy: each for each in reversed(placed)}
        for each in kept:
            others.pop(each.schedule.placement.policy, None)
        rivals = sorted(others.values(), key=lambda each: each.prediction.step_s)[:_RIVALS]
        for scored in [*kept, *rivals]:
            found += self._score(self.pipelined(scored.schedule), part, misfits)
        return sorted(found, key=lambda each: each.prediction.step_s)

    def divided(self, base: ExpertParallelSchedule) -> Iterator[ExpertParallelSchedule]:
        """Yield the ways of dividing the model that share attention inside nodes, as engines start and balanced by load."""
        for experts in ("expert", "sharded", "node", "tensor"):
            for policy in ("contiguous", "eplb"):
                yield base.with_options(
                    parallel__attention="tensor", parallel__experts=experts, placement__policy=policy
                )

    def placed(self, base: ExpertParallelSchedule, redundant: int) -> Iterator[ExpertParallelSchedule]:
        """Yield every division, and every placement, router and exchange without overlap."""
        yield from self.divided(base)
        exact = self.evidence.exact
        for kind in ("per-rank", "hierarchical") if self.simulation.num_nodes > 1 else ("per-rank",):
            for policy, copies in self.policies(redundant):
                routers: tuple[str, ...] = ("nearest",)
                if copies or policy == "grace":
                    routers = ("nearest", "capped", "even") if exact else ("nearest", "even")
                if policy == "grace":
                    routers = (*routers, "weighted")
                if policy == "metro":
                    routers = (*routers, "activated")
                if policy == "search":
                    routers = (*routers, "planned")
                for choice in routers:
                    yield base.with_options(placement__policy=policy, placement__num_redundant=copies, replica__choice=choice,
                                            exchange__kind=kind)  # fmt: skip

    def policies(self, redundant: int) -> list[tuple[str, int]]:
        """Return the (policy, redundant slots) worth trying on this evidence."""
        counts = (0, redundant) if redundant else (0,)
        found = [("contiguous", 0), ("round-robin", 0)]
        found += [(policy, copies) for policy in ("eplb", "eplb-hierarchical", "occult", "search") for copies in counts]
        found.append(("grace", 0))
        if not self.simulation.prefill:
            found.append(("metro", redundant))
        return [(policy, copies) for policy, copies in found if self.placements.available(policy)]

    def pipelined(self, placed: ExpertParallelSchedule) -> Iterator[ExpertParallelSchedule]:
        """Yield every way of overlapping for one placement and router."""
        yield placed.with_options(kernel__choice="best")
        if placed.parallel.experts in ("tensor", "node"):
            return  # nothing is exchanged that could be overlapped
        slots = self.placements.candidate(placed).placement.slots_per_rank
        for fraction in _SM_FRACTIONS:
            common = {"pipeline__exchange_sm_fraction": fraction, "kernel__choice": "best"}
            yield placed.with_options(pipeline__micro_batches=2, **common)
            for groups in sorted({n for n in (*_GROUPS, slots) if 1 < n <= slots}):
                yield placed.with_options(pipeline__split="expert", pipeline__num_groups=groups, **common)
            for chunks in _CHUNKS:
                yield placed.with_options(pipeline__split="token", pipeline__num_groups=chunks, **common)

    def _score(self, schedules: Iterable[ExpertParallelSchedule], part: str, misfits: list[DoesNotFit]) -> list[Scored]:
        found = []
        for schedule in schedules:
            try:
                found.append(Scored(schedule=schedule, prediction=self.predict(schedule, part)))
            except DoesNotFit as reason:
                misfits.append(reason)
        return sorted(found, key=lambda each: each.prediction.step_s)


def describe(schedule: ExpertParallelSchedule) -> str:
    """Return a schedule in a few words: "eplb + 32 copies, nearest, hierarchical, expert x 5, best kernels"."""
    pipeline, placement = schedule.pipeline, schedule.placement
    words = [f"{placement.policy} + {placement.num_redundant} copies" if placement.num_redundant else placement.policy]
    words += [schedule.replica.choice] if placement.num_redundant or placement.policy == "grace" else []
    if schedule.parallel.experts not in ("tensor", "node"):
        words.append(schedule.exchange.kind)
    if schedule.parallel.attention == "tensor":
        words.append(_PARALLELISMS[schedule.parallel.experts])
    if pipeline.micro_batches > 1:
        words.append(f"{pipeline.micro_batches} batches in alternation")
    if schedule.num_groups > 1:
        words.append(f"{schedule.num_groups} {pipeline.split} groups")
    if schedule.overlaps and pipeline.exchange_sm_fraction:
        words.append(f"{pipeline.exchange_sm_fraction:.0%} of multiprocessors for exchanges")
    return ", ".join([*words, f"{schedule.kernel.choice} kernels"])
