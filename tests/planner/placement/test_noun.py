"""The placement noun: what it derives, what it refuses, and the placements made without a recording."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.planner.placement.placement import (
    Placement,
    contiguous,
    from_rank_lists,
    round_robin,
)
from placement_cases import topologies


def small() -> Placement:
    return Placement(
        physical_to_logical=np.array([[0, 1, 2, 3, 0, 2], [3, 2, 1, 0, 3, 2]], dtype=np.int32),
        num_logical=4,
        num_ranks=2,
        num_nodes=2,
    )


def test_derived_maps_of_a_small_placement() -> None:
    placement = small()
    assert (placement.num_layers, placement.num_slots, placement.num_redundant) == (2, 6, 2)
    assert (placement.slots_per_rank, placement.ranks_per_node) == (3, 1)
    assert placement.slot_rank().tolist() == [0, 0, 0, 1, 1, 1]
    assert placement.rank_node().tolist() == [0, 1]
    assert placement.replica_counts().tolist() == [[2, 1, 2, 1], [1, 1, 2, 2]]
    assert placement.logical_to_physical(0) == [[0, 4], [1], [2, 5], [3]]
    assert placement.logical_to_physical(1) == [[3], [2], [1, 5], [0, 4]]
    start, slots = placement.replica_lists(1)
    assert (start.tolist(), slots.tolist()) == ([0, 1, 2, 4, 6], [3, 2, 1, 5, 0, 4])


def test_contiguous_and_round_robin_by_hand() -> None:
    assert contiguous(1, 4, 4, 2).physical_to_logical.tolist() == [[0, 1, 2, 3]]
    assert contiguous(2, 4, 6, 2).physical_to_logical.tolist() == [[0, 1, 2, 3, 0, 1]] * 2
    assert round_robin(1, 4, 4, 2).physical_to_logical.tolist() == [[0, 2, 1, 3]]
    assert round_robin(1, 4, 6, 2).physical_to_logical.tolist() == [[0, 2, 1, 1, 3, 2]]


def test_ragged_ranks_are_filled_up_with_experts_they_lack() -> None:
    placement = from_rank_lists([[[2, 0], [1]], [[1], [2, 0]]], 3)
    assert placement.physical_to_logical.tolist() == [[2, 0, 1, 0], [1, 0, 2, 0]]
    assert from_rank_lists([[[2, 0], [1]]], 3, num_slots=6).physical_to_logical.tolist() == [[2, 0, 1, 1, 0, 2]]
    with pytest.raises(InputError, match="widest rank holds 2"):
        from_rank_lists([[[2, 0], [1]]], 3, num_slots=2)
    with pytest.raises(InputError, match="an empty rank"):
        from_rank_lists([[[2, 0, 1], []]], 3)


@given(topologies(max_layers=3))
def test_every_slot_is_listed_once_and_every_expert_has_one(placement: Placement) -> None:
    for layer in range(placement.num_layers):
        listed = placement.logical_to_physical(layer)
        assert sorted(slot for slots in listed for slot in slots) == list(range(placement.num_slots))
        assert all(slots == sorted(slots) and slots for slots in listed)
        start, slots = placement.replica_lists(layer)
        assert [slots[start[e] : start[e + 1]].tolist() for e in range(placement.num_logical)] == listed
        assert placement.replica_counts()[layer].tolist() == [len(slots) for slots in listed]


def test_placement_is_read_only_and_compares_by_content() -> None:
    placement = small()
    with pytest.raises(ValueError, match="read-only"):
        placement.physical_to_logical[0, 0] = 1
    assert placement.same_as(small())
    other = Placement(physical_to_logical=placement.physical_to_logical, num_logical=4, num_ranks=2, num_nodes=1)
    assert not placement.same_as(other)


@pytest.mark.parametrize(
    ("slots", "ranks", "nodes", "message"),
    [
        (9, 2, 1, r"num_slots = 9: not divisible by 2 ranks; use 2 redundant slots instead of 1"),
        (6, 2, 1, r"num_slots = 6: fewer slots than the 8 experts"),
        (18, 9, 1, r"num_ranks = 9: more ranks than the 8 experts"),
        (8, 4, 3, r"num_nodes = 3: 4 ranks do not divide into equal nodes"),
        (
            18,
            2,
            1,
            r"num_slots = 18: a rank of 9 slots would hold some of the 8 experts twice; use at most 8 redundant",
        ),
        (8, 0, 1, r"num_ranks = 0: must be at least 1"),
    ],
)
def test_topologies_that_form_no_rectangle_are_refused(slots: int, ranks: int, nodes: int, message: str) -> None:
    for make in (contiguous, round_robin):
        with pytest.raises(InputError, match=message):
            make(1, 8, slots, ranks, nodes)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[0, 1, 1]], r"no slot of expert 2"),
        ([[0, 1, 3]], r"physical_to_logical\[0\]\[2\] = 3: expert ids are 0 to 2"),
        ([[0, 1, -1]], r"physical_to_logical\[0\]\[2\] = -1"),
        ([0, 1, 2], r"whole numbers \[num_layers, num_slots\]"),
        ([[0.0, 1.0, 2.0]], r"whole numbers"),
    ],
)
def test_tables_that_are_no_placement_are_refused(table: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Placement(physical_to_logical=np.array(table), num_logical=3, num_ranks=1)


def test_no_rank_holds_an_expert_twice() -> None:
    with pytest.raises(
        InputError, match=r"physical_to_logical\[1\] = 'expert 2 twice on rank 1': a rank holds an expert once"
    ):
        Placement(physical_to_logical=np.array([[0, 1, 2, 0], [0, 1, 2, 2]]), num_logical=3, num_ranks=2)


@given(st.integers(1, 4), st.integers(0, 8), st.integers(1, 8))
def test_placements_without_a_recording_hold_what_is_asked_or_are_refused(ranks: int, more: int, width: int) -> None:
    experts = ranks + more
    for make in (contiguous, round_robin):
        if -(-experts // ranks) <= width <= experts:
            made = make(2, experts, ranks * width, ranks)  # the noun itself refuses an expert twice on a rank
            assert made.slots_per_rank == width
        else:
            with pytest.raises(InputError, match="num_slots"):
                make(2, experts, ranks * width, ranks)
