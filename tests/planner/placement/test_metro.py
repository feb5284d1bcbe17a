"""METRO: one copy per active expert, and as few activated experts on the fullest rank as any assignment can have."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.planner.placement.metro import (
    FewestActiveChoice,
    active_frequency,
    level_active,
    metro_placement,
)
from moeplan.planner.placement.placement import Placement
from moeplan.planner.placement.replica_choice import CappedChoice
from moeplan.planner.placement.splits import StepTokens
from placement_cases import tokens_for, topologies


@given(st.data())
def test_no_assignment_has_a_less_activated_fullest_rank(data: st.DataObject) -> None:
    placement = data.draw(topologies())
    active = data.draw(st.lists(st.integers(0, placement.num_logical - 1), max_size=7, unique=True))
    chosen = level_active(active, placement, 0)
    assert sorted(chosen) == sorted(active)
    width = placement.slots_per_rank
    assert all(placement.physical_to_logical[0][slot] == expert for expert, slot in chosen.items())
    counts = np.bincount([slot // width for slot in chosen.values()], minlength=placement.num_ranks)
    copies = placement.logical_to_physical(0)
    options = [sorted({slot // width for slot in copies[expert]}) for expert in active]
    best = min((max(np.bincount(ranks, minlength=1)) for ranks in itertools.product(*options)), default=0)
    assert counts.max(initial=0) == (best if active else 0)


def active_per_rank(slots: np.ndarray, placement: Placement) -> np.ndarray:
    """Return how many slots of every rank compute at least one row."""
    return np.bincount(np.unique(slots) // placement.slots_per_rank, minlength=placement.num_ranks)


@given(st.data())
def test_router_sends_all_tokens_of_an_expert_to_one_copy(data: st.DataObject) -> None:
    placement = data.draw(topologies())
    experts, source = data.draw(tokens_for(placement))
    slots = FewestActiveChoice().slots(experts, source, placement, 0)
    assert np.array_equal(placement.physical_to_logical[0][slots], experts)
    assert len(np.unique(slots)) == len(np.unique(experts))
    capped = CappedChoice().slots(experts, source, placement, 0)
    assert active_per_rank(slots, placement).max() <= active_per_rank(capped, placement).max()


def test_a_chain_of_two_moves_is_found() -> None:
    # Expert 2 can only go to rank 0, expert 1 to ranks 0 and 1, expert 0 to ranks 1 and 2.
    placement = Placement(physical_to_logical=np.array([[2, 1, 3, 1, 0, 4, 0, 5, 4]]), num_logical=6, num_ranks=3)
    chosen = level_active([0, 1, 2, 3], placement, 0)
    counts = np.bincount([slot // 3 for slot in chosen.values()], minlength=3)
    assert counts.tolist() == [2, 1, 1]


def test_activity_counts_steps_not_tokens() -> None:
    busy = StepTokens(experts=np.array([[[0]], [[0]], [[1]]], dtype=np.int32), source_rank=np.zeros(3, np.int32))
    calm = StepTokens(experts=np.array([[[0]]], dtype=np.int32), source_rank=np.zeros(1, np.int32))
    assert active_frequency([busy, calm], 3).tolist() == [[1.0, 0.5, 0.0]]
    placement = metro_placement([busy, calm], 3, 4, 2)
    assert placement.replica_counts().tolist() == [[2, 1, 1]]
    with pytest.raises(InputError, match="at least one step"):
        active_frequency([], 3)
    with pytest.raises(InputError, match="experts = 1: ids are 0 to 0"):
        active_frequency([busy], 1)
