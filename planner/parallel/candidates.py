"""Placements and run-time routers that an expert-parallel plan chooses among, made from its evidence by name.

Modelled: the policies of `ep_schedule.PLACEMENTS`, each with the number of redundant slots asked for; ours (`search`) starts
from the others, minimises the predicted layer time on the planning tokens under the schedule's exchange, and gives way to
the best heuristic in every layer where other requests say so. A policy that needs to know which experts are chosen together
is left out, by name, where only counts were recorded. Ignored: schedules (`ep_search`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError, UnknownName
from ...specs.schedules.parallel import PLACEMENTS, ExpertParallelSchedule
from ..placement.comparison import Candidate, assemble, choose_per_layer, evaluate, judge, replay
from ..placement.eplb import rebalance
from ..placement.grace import GracePlan, grace_plan
from ..placement.metro import FewestActiveChoice, metro_placement
from ..placement.objective import LayerCosts
from ..placement.occult import fill_spare_slots, occult_placement
from ..placement.placement import Placement, contiguous, from_rank_lists, round_robin
from ..placement.replica_choice import CappedChoice, ReplicaChoice, StaticChoice, WeightedChoice, nearest_table
from ..placement.search import SearchResult, SearchSettings, search_placement
from ..placement.splits import StepTokens
from ..placement.traffic import Traffic
from .evidence import CHOOSE, PLAN, Evidence, TokenEvidence

# What our search starts from, and what every layer of it has to beat.
STARTS = ("eplb", "eplb-hierarchical", "occult", "contiguous")
# Parts in which a schedule that overlaps is taken to run a layer while its placement is searched; what parts it really has is
# tried afterwards.
OVERLAP_GROUPS = 4
# Multiprocessors that its kernels go without (16 of 132, arXiv 2410.12247).
OVERLAP_SM_FRACTION = 16 / 132
# Tokens that a placement is searched on: with four times as many a move takes as much longer and gains next to nothing.
MOST_PLANNING_TOKENS = 1 << 15
NEEDS_TOKENS = ("grace", "occult", "metro", "search")
# Expert groups of a hierarchical EPLB where the model's own number is not given: DeepSeek-V3's `n_group`.
DEFAULT_EXPERT_GROUPS = 8


def enough_steps(steps: list[StepTokens]) -> list[StepTokens]:
    """Return steps evenly spaced over those given, of `MOST_PLANNING_TOKENS` tokens together, one at least."""
    count = max(1, MOST_PLANNING_TOKENS // steps[0].num_tokens)
    if count >= len(steps):
        return steps
    return [steps[place * len(steps) // count] for place in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Searched:
    """Our placement after every layer was judged on requests it was not made for."""

    placement: Placement
    table: npt.NDArray[np.int32]
    """int32 [layers, experts, ranks]: the planned slot per source rank; the nearest where a heuristic won."""
    layers_from: tuple[str, ...]
    """What each layer comes from: search, or the heuristic that did better."""


@dataclass(slots=True)
class Placements:
    """Placements by (policy, redundant slots; ours also by kind of exchange), made once."""

    evidence: Evidence
    num_experts: int
    num_ranks: int
    num_nodes: int
    layer_costs: Mapping[str, LayerCosts]
    """What a layer costs, by kind of exchange."""
    search: SearchSettings
    num_groups: int | None = None
    workers: int = 1
    deadline_s: float | None = None
    """Clock reading (`time.monotonic`) after which layers are no longer searched."""
    progress: Callable[[str], None] | None = None
    """Told in words what of a placement is being searched."""
    _made: dict[tuple[str, int], Placement] = field(default_factory=dict)
    _grace: dict[int, GracePlan] = field(default_factory=dict)
    _results: dict[tuple[int, str, bool], SearchResult] = field(default_factory=dict)
    _searched: dict[tuple[int, str, bool, bool], Searched] = field(default_factory=dict)
    _traffic: dict[tuple[str, int, bool], list[list[Traffic]]] = field(default_factory=dict)
    _routers: dict[tuple[object, ...], Candidate] = field(default_factory=dict)

    def num_slots(self, redundant: int) -> int:
        """Return the slots of a layer: one per expert, rounded up to whole ranks, and the redundant ones.

        Raises InputError where ranks do not divide them.
        """
        base = -(-self.num_experts // self.num_ranks) * self.num_ranks
        slots = max(base, self.num_experts + redundant)
        if slots % self.num_ranks:
            better = -(-slots // self.num_ranks) * self.num_ranks - self.num_experts
            raise InputError(
                "redundant", redundant, f"{slots} slots do not divide over {self.num_ranks} ranks", f"use {better}"
            )
        if slots > self.num_ranks * self.num_experts:
            raise InputError(
                "redundant", redundant, f"a rank would hold some of the {self.num_experts} experts twice",
                f"use at most {(self.num_ranks - 1) * self.num_experts}",
            )  # fmt: skip
        return slots

    def available(self, policy: str) -> bool:
        """Return whether the evidence is enough for a policy."""
        return policy not in NEEDS_TOKENS or isinstance(self.evidence, TokenEvidence)

    def placement(self, policy: str, redundant: int) -> Placement:
        """Return a heuristic's placement; raises InputError where the evidence is not enough."""
        key = (policy, 0 if policy == "grace" else redundant)
        if key not in self._made:
            self._made[key] = self._make(policy, redundant)
        return self._made[key]

    def candidate(self, schedule: ExpertParallelSchedule) -> Candidate:
        """Return the placement and router a schedule names, the same objects each time."""
        policy, redundant, replica = schedule.placement.policy, schedule.placement.num_redundant, schedule.replica
        ours = policy == "search"
        key = (policy, 0 if policy == "grace" else redundant, replica,
               (schedule.all_to_all.kind, schedule.overlaps) if ours else ())  # fmt: skip
        if key not in self._routers:
            placement = self.searched_for(schedule).placement if ours else self.placement(policy, redundant)
            self._routers[key] = Candidate(placement=placement, router=self._router(schedule, placement))
        return self._routers[key]

    def searched_for(self, schedule: ExpertParallelSchedule) -> Searched:
        """Return our placement for a schedule's slots, exchange, router and overlap."""
        planned = schedule.replica.choice == "planned"
        return self.searched(
            schedule.placement.num_redundant, schedule.all_to_all.kind, planned=planned, overlapped=schedule.overlaps
        )

    def searched(self, redundant: int, exchange: str, *, planned: bool, overlapped: bool = False) -> Searched:
        """Return our placement with so many redundant slots, every layer judged on the requests to choose by.

        A layer in which a heuristic does better there is the heuristic's. planned: tokens follow the table that was searched
        (the nearest copy, for a heuristic), otherwise the capped replica choice. overlapped: exchanges hide behind experts,
        so that balance counts for more. Raises InputError where only counts were recorded.
        """
        key = (redundant, exchange, planned, overlapped)
        if key not in self._searched:
            result, costs = self._search(redundant, exchange, overlapped), self._costs(exchange, overlapped)
            # Ours first, so that a tie keeps it.
            placements = {"search": result.placement} | {name: self.placement(name, redundant) for name in STARTS}
            tables = {"search": result.table} | {
                name: nearest_table(self.placement(name, redundant)) for name in STARTS
            }
            router = StaticChoice(table=result.table) if planned else CappedChoice()
            steps = self.evidence_steps(CHOOSE)
            ours = evaluate(Candidate(placement=result.placement, router=router), steps, costs)
            theirs = {name: judge(self._replayed(name, redundant, planned), costs) for name in STARTS}
            names = choose_per_layer({"search": ours} | theirs)
            table = np.stack([tables[name][layer] for layer, name in enumerate(names)])
            self._searched[key] = Searched(placement=assemble(placements, names), table=table, layers_from=tuple(names))
        return self._searched[key]

    def _replayed(self, name: str, redundant: int, planned: bool) -> list[list[Traffic]]:
        """Return the traffic of a heuristic's placement on the requests to choose by; what it costs is another question."""
        key = (name, redundant, planned)
        if key not in self._traffic:
            placement = self.placement(name, redundant)
            router = StaticChoice(table=nearest_table(placement)) if planned else CappedChoice()
            candidate = Candidate(placement=placement, router=router)
            self._traffic[key] = replay(candidate, self.evidence_steps(CHOOSE))
        return self._traffic[key]

    def _costs(self, exchange: str, overlapped: bool) -> LayerCosts:
        costs = self.layer_costs[exchange]
        if not overlapped:
            return costs
        return dataclasses.replace(costs, groups=OVERLAP_GROUPS, row_s=costs.row_s / (1 - OVERLAP_SM_FRACTION))

    def evidence_steps(self, part: str, policy: str = "search") -> list[StepTokens]:
        """Return the recorded steps of a part for a policy; raises InputError where only counts were recorded."""
        if not isinstance(self.evidence, TokenEvidence):
            raise InputError(
                "placement.policy", policy, "needs the routing of single tokens", "record tokens, not counts"
            )
        return self.evidence.parts[part]

    def _search(self, redundant: int, exchange: str, overlapped: bool) -> SearchResult:
        """Return our search from every heuristic of its shape and, with copies, from what it finds without any."""
        key = (redundant, exchange, overlapped)
        if key not in self._results:
            starts = {name: self.placement(name, redundant) for name in STARTS}
            if overlapped:
                starts["search without overlap"] = self._search(redundant, exchange, False).placement
            slots = self.num_slots(redundant)
            if slots > self.num_slots(0):
                fewer = self._search(0, exchange, overlapped).placement
                by_rank = [row.reshape(self.num_ranks, -1).tolist() for row in fewer.physical_to_logical]
                by_rank = [
                    fill_spare_slots(held, load, slots // self.num_ranks)
                    for held, load in zip(by_rank, self.evidence.load, strict=True)
                ]
                starts["search without copies"] = from_rank_lists(by_rank, self.num_experts, self.num_nodes, slots)
            costs, steps = self._costs(exchange, overlapped), enough_steps(self.evidence_steps(PLAN))
            what = f"placement with {redundant} copies for {exchange}"
            self._results[key] = search_placement(
                steps, starts, costs, self.search, self.workers, deadline_s=self.deadline_s,
                progress=lambda done, layers: self._tell(f"{what}, layer {done} of {layers}"),
            )  # fmt: skip
        return self._results[key]

    def _tell(self, words: str) -> None:
        if self.progress is not None:
            self.progress(words)

    def expert_groups(self) -> int:
        """Return the expert groups a hierarchical EPLB keeps together."""
        if self.num_groups is not None:
            return self.num_groups
        if self.num_experts % DEFAULT_EXPERT_GROUPS == 0 and DEFAULT_EXPERT_GROUPS % self.num_nodes == 0:
            return DEFAULT_EXPERT_GROUPS
        # Groups that nodes do not divide mean the global rule, as in the published algorithm.
        return self.num_nodes if self.num_experts % self.num_nodes == 0 else 1

    def _make(self, policy: str, redundant: int) -> Placement:
        slots, ranks, nodes = self.num_slots(redundant), self.num_ranks, self.num_nodes
        load = self.evidence.load
        if policy in ("contiguous", "round-robin"):
            make = contiguous if policy == "contiguous" else round_robin
            return make(len(load), self.num_experts, slots, ranks, nodes)
        if policy == "eplb":
            return rebalance(load, slots, ranks, nodes)
        if policy == "eplb-hierarchical":
            return rebalance(load, slots, ranks, nodes, self.expert_groups())
        steps = self.evidence_steps(PLAN, policy)
        if policy == "grace":
            self._grace[0] = grace_plan(steps, self.num_experts, ranks, nodes)
            return self._grace[0].placement
        if policy == "occult":
            return occult_placement(steps, self.num_experts, slots, ranks, nodes)
        if policy == "metro":
            return metro_placement(steps, self.num_experts, slots, ranks, nodes)
        raise UnknownName("placement.policy", policy, PLACEMENTS)

    def _router(self, schedule: ExpertParallelSchedule, placement: Placement) -> ReplicaChoice:
        replica, policy = schedule.replica, schedule.placement.policy
        if replica.choice == "capped":
            return CappedChoice(load_cap=replica.load_cap)
        if replica.choice == "activated":
            return FewestActiveChoice()
        if replica.choice == "even":
            return WeightedChoice(seed=replica.seed)
        if replica.choice == "weighted":
            if policy == "grace":
                return self._grace[0].router(replica.seed)
            return WeightedChoice(seed=replica.seed, nearest_first=True)
        if replica.choice == "planned" and policy == "search":
            return StaticChoice(table=self.searched_for(schedule).table)
        return StaticChoice(table=nearest_table(placement))
