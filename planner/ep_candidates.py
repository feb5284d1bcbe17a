"""Placements and run-time routers that an expert-parallel plan chooses among, made from its evidence by name.

Modelled: the policies of `ep_schedule.PLACEMENTS`, each with the number of redundant slots asked for; ours (`search`) starts
from the others and minimises the predicted layer time on the planning tokens. A policy that needs to know which
experts are chosen together is left out, by name, where only counts were recorded. Ignored: schedules (`ep_search`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..ep_schedule import ExpertParallelSchedule
from ..errors import InputError
from ..sim.ep_costs import EpCosting
from ..specs import weight_format
from .ep_evidence import PLAN, Evidence, TokenEvidence
from .placement.comparison import Candidate
from .placement.eplb import rebalance
from .placement.grace import GracePlan, grace_plan
from .placement.metro import FewestActiveChoice, metro_placement
from .placement.objective import LayerCosts
from .placement.occult import occult_placement
from .placement.placement import Placement, contiguous, round_robin
from .placement.replica_choice import CappedChoice, ReplicaChoice, StaticChoice, WeightedChoice, nearest_table
from .placement.search import SearchResult, SearchSettings, search_placement

NEEDS_TOKENS = ("grace", "occult", "metro", "search")
# Expert groups of a hierarchical EPLB where the model's own number is not given: DeepSeek-V3's `n_group`.
DEFAULT_EXPERT_GROUPS = 8


@dataclass(slots=True)
class Placements:
    """Placements by (policy, redundant slots), made once."""

    evidence: Evidence
    num_experts: int
    num_ranks: int
    num_nodes: int
    layer_costs: LayerCosts
    search: SearchSettings
    num_groups: int | None = None
    workers: int = 1
    _made: dict[tuple[str, int], Placement] = field(default_factory=dict)
    _grace: dict[int, GracePlan] = field(default_factory=dict)
    _searched: dict[int, SearchResult] = field(default_factory=dict)
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
        return slots

    def available(self, policy: str) -> bool:
        """Return whether the evidence is enough for a policy."""
        return policy not in NEEDS_TOKENS or isinstance(self.evidence, TokenEvidence)

    def placement(self, policy: str, redundant: int) -> Placement:
        """Return the policy's placement; raises InputError where the evidence is not enough."""
        key = (policy, 0 if policy == "grace" else redundant)
        if key not in self._made:
            self._made[key] = self._make(policy, redundant)
        return self._made[key]

    def candidate(self, schedule: ExpertParallelSchedule) -> Candidate:
        """Return the placement and router a schedule names, the same objects each time."""
        policy, redundant, replica = schedule.placement.policy, schedule.placement.num_redundant, schedule.replica
        key = (policy, 0 if policy == "grace" else redundant, replica)
        if key not in self._routers:
            placement = self.placement(policy, redundant)
            self._routers[key] = Candidate(placement=placement, router=self._router(schedule, placement))
        return self._routers[key]

    def searched(self, redundant: int) -> SearchResult:
        """Return our search with so many redundant slots, started from every heuristic of that shape."""
        if redundant not in self._searched:
            if not isinstance(self.evidence, TokenEvidence):
                raise InputError(
                    "placement.policy", "search", "needs the routing of single tokens", "record tokens, not counts"
                )
            starts = {
                name: self.placement(name, redundant) for name in ("eplb", "eplb-hierarchical", "occult", "contiguous")
            }
            steps = self.evidence.parts[PLAN]
            self._searched[redundant] = search_placement(steps, starts, self.layer_costs, self.search, self.workers)
        return self._searched[redundant]

    def expert_groups(self) -> int:
        """Return the expert groups a hierarchical EPLB keeps together."""
        if self.num_groups is not None:
            return self.num_groups
        fits = self.num_experts % DEFAULT_EXPERT_GROUPS == 0 and DEFAULT_EXPERT_GROUPS % self.num_nodes == 0
        return DEFAULT_EXPERT_GROUPS if fits else self.num_nodes

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
        if not isinstance(self.evidence, TokenEvidence):
            raise InputError(
                "placement.policy", policy, "needs the routing of single tokens", "record tokens, not counts"
            )
        steps = self.evidence.parts[PLAN]
        if policy == "grace":
            self._grace[0] = grace_plan(steps, self.num_experts, ranks, nodes)
            return self._grace[0].placement
        if policy == "occult":
            return occult_placement(steps, self.num_experts, slots, ranks, nodes)
        if policy == "metro":
            return metro_placement(steps, self.num_experts, slots, ranks, nodes)
        return self.searched(redundant).placement

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
            return StaticChoice(table=self.searched(schedule.placement.num_redundant).table)
        return StaticChoice(table=nearest_table(placement))


def layer_costs(costing: EpCosting, schedule: ExpertParallelSchedule, rows_per_slot: int) -> LayerCosts:
    """Return the constants of the search's objective under a schedule's kernels and exchange.

    A row costs what one row more costs beside `rows_per_slot`: where weights bound kernels, nearly nothing.
    """
    hidden, constants = costing.costs.model.hidden_size, costing.constants
    fmt = weight_format(schedule.kernel.bits)
    few, many = max(1, rows_per_slot), 2 * max(1, rows_per_slot)
    seconds = costing.item_s(np.array([few, many]), fmt, rate=constants.grouped_rate)
    return LayerCosts(
        token_bytes_dispatch=schedule.exchange.dispatch_bytes_per_value * hidden,
        token_bytes_combine=schedule.exchange.combine_bytes_per_value * hidden,
        intra_bytes_per_s=constants.intra.bytes_per_s,
        inter_bytes_per_s=(constants.inter or constants.intra).bytes_per_s,
        row_s=float(seconds[1] - seconds[0]) / (many - few),
    )
