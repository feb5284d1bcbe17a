"""No rank ever holds an expert twice: every placement an expert-parallel plan can choose, on drawn loads, ranks and slots."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.base.errors import InputError
from moeplan.planner.parallel.candidates import Placements
from moeplan.planner.parallel.evidence import CHOOSE, PLAN, REPORT, TokenEvidence
from moeplan.planner.placement.placement import Placement
from moeplan.planner.placement.search import SearchSettings
from moeplan.specs.schedules.parallel import ALL_TO_ALLS, PLACEMENTS
from placement_cases import COSTS, clustered_step


def placements(nodes: int, per_node: int, experts: int, seed: int) -> Placements:
    ranks = nodes * per_node
    parts = {
        name: [clustered_step(seed + at, num_tokens=96, num_logical=experts, num_ranks=ranks)]
        for at, name in enumerate((PLAN, CHOOSE, REPORT))
    }
    costs = dict.fromkeys(ALL_TO_ALLS, COSTS)
    return Placements(TokenEvidence(parts, experts), experts, ranks, nodes, costs, SearchSettings(num_moves=400))


def most_on_a_rank(placement: Placement) -> int:
    """Return how often a rank holds an expert at most, counted without the placement's own check."""
    by_rank = placement.physical_to_logical.reshape(-1, placement.slots_per_rank)
    return max(int(np.bincount(held).max()) for held in by_rank)


@settings(max_examples=examples(12))
@given(st.integers(1, 2), st.integers(1, 3), st.integers(4, 14), st.data())
def test_no_policy_places_an_expert_twice_on_a_rank(
    nodes: int, per_node: int, experts: int, data: st.DataObject
) -> None:
    ranks = nodes * per_node
    made = placements(nodes, per_node, max(experts, ranks), data.draw(st.integers(0, 999)))
    width = data.draw(st.integers(-(-made.num_experts // ranks), made.num_experts))
    redundant = ranks * width - made.num_experts
    for policy in PLACEMENTS:
        if policy == "search":
            found = made.searched(redundant, "per-rank", planned=True).placement
        else:
            found = made.placement(policy, redundant)
        assert most_on_a_rank(found) == 1, policy
        assert found.slots_per_rank == width or policy == "grace"


def test_more_slots_than_experts_are_refused_in_one_line() -> None:
    made = placements(1, 2, 6, 0)
    assert made.num_slots(6) == 12
    with pytest.raises(
        InputError, match=r"redundant = 8: a rank would hold some of the 6 experts twice; use at most 6"
    ):
        made.num_slots(8)
