"""The search for an expert-parallel schedule: placement and routing first, then how exchanges and kernels overlap.

Modelled: (1) every placement, router and exchange without overlap; (2) every pipeline and kernel choice on the best few of
them. All are simulated with the compiled simulator on requests that no placement has seen. A schedule that does not fit
in a rank's memory is left out by name. Ignored: schedules that change the model (a shortcut) or cannot be run (tiles without
loss): those are references, not candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ...base.errors import DoesNotFit, InputError
from ...sim.parallel.groups import check_groups, group_fits
from ...sim.parallel.memory import largest_batch
from ...sim.parallel.simulate import EpPrediction, ParallelSimulation
from ...specs.memory import MemoryBreakdown
from ...specs.schedules.parallel import ExpertParallelSchedule
from ..placement.placement import Placement
from ..trials import Trials
from .candidates import Placements
from .evidence import REPORT, Evidence

# Placements that go on to the second stage.
_KEPT = 3
# Further policies that go on, however they rank.
_RIVALS = 3
# Policies that only need loads: cheap enough for every number of copies.
_BY_LOAD = ("eplb", "eplb-hierarchical")
# Predictions after the search: presets, ingredients, factors.
AFTERWARDS = 60
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
    trials: Trials = field(default_factory=Trials)
    """Counts every prediction as evaluated; those after the search are among the total."""
    engine_runs: Callable[[ExpertParallelSchedule, Placement], ExpertParallelSchedule | None] | None = None
    """What the engine that is planned for makes of a schedule; None where no engine is named."""
    attention_ranks: int | None = None
    """Ranks that share attention in every candidate; None: one, and those of a node."""
    _seen: set[str] = field(default_factory=set)

    def told(self, schedule: ExpertParallelSchedule) -> ExpertParallelSchedule | None:
        """Return what the engine runs when it is told a schedule; the schedule itself where no engine is named."""
        if self.engine_runs is None:
            return schedule
        runs = self.engine_runs(schedule, self.placements.candidate(schedule).placement)
        return None if runs is None else runs.with_options(name=schedule.name)

    def predict(
        self,
        schedule: ExpertParallelSchedule,
        part: str,
        *,
        engine: str = "compiled",
        rows: bool = False,
        parts: bool = False,
        check_memory: bool = True,
    ) -> EpPrediction:
        """Return the prediction of a schedule on a part; raises DoesNotFit."""
        loads = self.evidence.loads(part, self.placements.candidate(schedule), schedule)
        self.trials.tally.num_evaluated += 1
        self.trials.tell(1, schedule.name)
        return self.simulation.predict(
            schedule, loads, engine=engine, rows=rows, parts=parts, check_memory=check_memory
        )

    def memory(self, schedule: ExpertParallelSchedule) -> tuple[MemoryBreakdown, int]:
        """Return what the fullest rank holds under a schedule, and the most tokens of a rank in a step that fit."""
        load = self.evidence.loads(REPORT, self.placements.candidate(schedule), schedule)[0]
        slots = load.topology.slots_per_rank
        held = self.simulation.memory_of(schedule, slots, int(load.rank_tokens.sum(axis=0).max()))
        most = largest_batch(
            lambda tokens: self.simulation.memory_of(schedule, slots, tokens), self.simulation.budget_bytes
        )
        return held, most

    def best(self, base: ExpertParallelSchedule, counts: Sequence[int], part: str) -> list[Scored]:
        """Return all schedules that fit, best first; raises DoesNotFit where none does.

        counts: redundant slots to choose among: EPLB tries them all, further policies those with which it does best.
        """
        misfits: list[DoesNotFit] = []
        base = self._sharing(base)
        first = [*self.divided(base), *self.placed(base, [(policy, 0) for policy in self.policies()])]
        copied = [(policy, copies) for copies in counts if copies for policy in _BY_LOAD]
        more = [policy for policy in self.policies() if policy not in (*_BY_LOAD, "contiguous", "round-robin", "grace")]
        second = len(list(self.placed(base, [(policy, 1) for policy in more]))) if copied else 0
        searched = len(first) + len(list(self.placed(base, copied))) + second
        overlapped = (_KEPT + _RIVALS) * (1 + len(_SM_FRACTIONS) * (2 + len(_GROUPS) + len(_CHUNKS)))
        trials = self.trials
        trials.total = trials.done + searched + overlapped + AFTERWARDS
        self.placements.progress, self.placements.deadline_s = lambda words: trials.tell(0, words), trials.until
        placed = self._score(first, part, misfits)
        with_copies = self._score(self.placed(base, copied), part, misfits)
        if with_copies:
            copies = with_copies[0].schedule.placement.num_redundant
            with_copies += self._score(self.placed(base, [(policy, copies) for policy in more]), part, misfits)
        placed = sorted([*placed, *with_copies], key=lambda each: each.prediction.step_s)
        if not placed:
            if misfits:
                raise min(misfits, key=lambda reason: reason.missing_bytes)
            raise InputError("--for", "(no schedule)", "nothing says which schedule the engine runs (it picks its own all-to-all)",
                             "plan without --for, and emit for it")  # fmt: skip
        found = list(placed)
        kept = placed[:_KEPT]
        # What is best when exchanges hide need not be best before: other policies are overlapped as well, each at its best.
        others = {each.schedule.placement.policy: each for each in reversed(placed)}
        for each in kept:
            others.pop(each.schedule.placement.policy, None)
        rivals = sorted(others.values(), key=lambda each: each.prediction.step_s)[:_RIVALS]
        for scored in [*kept, *rivals]:
            found += self._score(self.pipelined(scored.schedule), part, misfits)
        trials.done = max(trials.done, trials.total - AFTERWARDS)
        return sorted(found, key=lambda each: each.prediction.step_s)

    def divided(self, base: ExpertParallelSchedule) -> Iterator[ExpertParallelSchedule]:
        """Yield the ways of dividing the model that share attention, as engines start and balanced by load."""
        if self.attention_ranks == 1:
            return
        simulation = self.simulation
        for experts in ("expert", "sharded", "node", "tensor"):
            for policy in ("contiguous", "eplb"):
                found = base.with_options(
                    parallel__attention="tensor", parallel__experts=experts, placement__policy=policy
                )
                if group_fits(found, simulation.num_nodes, simulation.ranks_per_node):
                    yield found

    def _sharing(self, base: ExpertParallelSchedule) -> ExpertParallelSchedule:
        """Return a base whose attention is shared as was asked for; raises InputError where the machine has no such groups."""
        if self.attention_ranks in (None, 1):
            return base
        shared = base.with_options(parallel__attention="tensor", parallel__attention_ranks=self.attention_ranks)
        check_groups(shared, self.simulation.num_nodes, self.simulation.ranks_per_node)
        return shared

    def placed(
        self, base: ExpertParallelSchedule, policies: Sequence[tuple[str, int]]
    ) -> Iterator[ExpertParallelSchedule]:
        """Yield every router and exchange of placements (policy, redundant slots), without overlap."""
        exact = self.evidence.exact
        kinds = ["per-rank"]
        if self.simulation.num_nodes > 1:
            kinds.append("hierarchical")
        if not self.simulation.prefill:
            kinds.append("all-choices")  # low-latency kernels
        for kind in kinds:
            for policy, copies in policies:
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
                                            all_to_all__kind=kind)  # fmt: skip

    def policies(self) -> list[str]:
        """Return the policies worth trying on this evidence."""
        found = ["contiguous", "round-robin", *_BY_LOAD, "occult", "search", "grace"]
        if not self.simulation.prefill:
            found.append("metro")
        return [policy for policy in found if self.placements.available(policy)]

    def pipelined(self, placed: ExpertParallelSchedule) -> Iterator[ExpertParallelSchedule]:
        """Yield every way of overlapping for one placement and router."""
        yield placed.with_options(kernel__choice="best")
        if placed.parallel.experts in ("tensor", "node"):
            return  # nothing is exchanged that could be overlapped
        slots = self.placements.candidate(placed).placement.slots_per_rank
        quiet = placed.all_to_all.kind == "all-choices" and not self.simulation.prefill
        for fraction in (0.0,) if quiet else _SM_FRACTIONS:
            common = {"pipeline__all_to_all_sm_fraction": fraction, "kernel__choice": "best"}
            yield placed.with_options(pipeline__micro_batches=2, **common)
            for groups in sorted({n for n in (*_GROUPS, slots) if 1 < n <= slots}):
                yield placed.with_options(pipeline__split="expert", pipeline__num_groups=groups, **common)
            for chunks in _CHUNKS:
                yield placed.with_options(pipeline__split="token", pipeline__num_groups=chunks, **common)

    def _score(self, schedules: Iterable[ExpertParallelSchedule], part: str, misfits: list[DoesNotFit]) -> list[Scored]:
        """Return those of some schedules, as the engine runs them, that fit and were not scored before, best first."""
        found = []
        # One at a time: placements are made on the way, each with all cores.
        for (schedule,) in self.trials.batches(list(schedules), lambda: bool(self._seen), size=1):
            told = self.told(schedule)
            if told is None or (key := repr(told)) in self._seen:
                self.trials.done += 1
                continue
            self._seen.add(key)
            try:
                found.append(Scored(schedule=told, prediction=self.predict(told, part)))
            except DoesNotFit as reason:
                misfits.append(reason)
        return sorted(found, key=lambda each: each.prediction.step_s)


def describe(schedule: ExpertParallelSchedule) -> str:
    """Return a schedule in a few words: "eplb + 32 copies, nearest, hierarchical, expert x 5, best kernels"."""
    pipeline, placement = schedule.pipeline, schedule.placement
    words = [f"{placement.policy} + {placement.num_redundant} copies" if placement.num_redundant else placement.policy]
    words += [schedule.replica.choice] if placement.num_redundant or placement.policy == "grace" else []
    if schedule.parallel.experts not in ("tensor", "node"):
        words.append(schedule.all_to_all.kind)
    if schedule.parallel.attention == "tensor":
        words.append(_PARALLELISMS[schedule.parallel.experts])
        if schedule.parallel.attention_ranks:
            words.append(f"attention over {schedule.parallel.attention_ranks} ranks")
    if pipeline.micro_batches > 1:
        words.append(f"{pipeline.micro_batches} batches in alternation")
    if schedule.num_groups > 1:
        words.append(f"{schedule.num_groups} {pipeline.split} groups")
    if schedule.overlaps and pipeline.all_to_all_sm_fraction:
        words.append(f"{pipeline.all_to_all_sm_fraction:.0%} of multiprocessors for exchanges")
    return ", ".join([*words, f"{schedule.kernel.choice} kernels"])
