"""Run-time routers: SGLang's table by its rule, weighted draws, the load cap; every choice holds its expert."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.planner.placement.placement import Placement
from moeplan.planner.placement.replica_choice import (
    CappedChoice,
    ReplicaChoice,
    StaticChoice,
    WeightedChoice,
    nearest_table,
)
from moeplan.planner.placement.traffic import count_traffic
from placement_cases import tokens_for, topologies


def placed(rows: list[list[int]], experts: int, ranks: int, nodes: int) -> Placement:
    return Placement(physical_to_logical=np.array(rows), num_logical=experts, num_ranks=ranks, num_nodes=nodes)


@given(st.data())
def test_every_router_chooses_a_slot_of_the_expert(data: st.DataObject) -> None:
    placement = data.draw(topologies())
    experts, source = data.draw(tokens_for(placement))
    routers: list[ReplicaChoice] = [
        StaticChoice(table=nearest_table(placement)),
        WeightedChoice(seed=1),
        WeightedChoice(seed=1, nearest_first=True),
        CappedChoice(),
    ]
    for router in routers:
        slots = router.slots(experts, source, placement, 0)
        assert np.array_equal(placement.physical_to_logical[0][slots], experts)
        assert np.array_equal(slots, router.slots(experts, source, placement, 0))


@given(topologies(max_layers=2))
def test_static_table_follows_the_rule(placement: Placement) -> None:
    table, width, ranks_per_node = nearest_table(placement), placement.slots_per_rank, placement.ranks_per_node
    for layer in range(placement.num_layers):
        for expert, copies in enumerate(placement.logical_to_physical(layer)):
            far = []
            for rank, slot in enumerate(table[layer, expert].tolist()):
                on_rank = [c for c in copies if c // width == rank]
                on_node = [c for c in copies if c // width // ranks_per_node == rank // ranks_per_node]
                if on_rank or on_node:
                    assert slot == (on_rank or on_node)[0]
                else:
                    far.append(slot)
            shares = [far.count(copy) for copy in copies]
            assert sum(shares) == len(far) and max(shares) - min(shares) <= 1


def test_static_table_by_hand() -> None:
    # Expert 0 sits on ranks 0 and 1 of node 0; ranks 2 and 3 share its copies, once each, in the order that a generator
    # of seed 42 shuffles them into. Nothing is drawn where every rank has a near copy or there is only one.
    placement = placed([[0, 1, 0, 2, 3, 4, 5, 1]], 6, 4, 2)
    table = nearest_table(placement)[0]
    shared = [0, 2]
    random.Random(42).shuffle(shared)
    assert table[0].tolist() == [0, 2, *shared]
    assert table[1].tolist() == [1, 1, 7, 7]
    assert table[2].tolist() == [3] * 4


def test_planned_table_must_belong_to_the_placement() -> None:
    placement = placed([[0, 1, 1, 0]], 2, 2, 1)
    table = nearest_table(placement)
    table[0, 1, 0] = 3
    with pytest.raises(InputError, match=r"table\[0\]\[1\]\[0\] = 3: that slot does not hold expert 1"):
        StaticChoice(table=table).slots(np.array([[0]]), np.array([0]), placement, 0)


def test_weighted_draws_follow_the_weights() -> None:
    placement = placed([[0, 1, 0, 2, 0, 3]], 4, 3, 1)
    experts, source = np.zeros((6000, 1), np.int64), np.zeros(6000, np.int64)
    even = np.bincount(WeightedChoice(seed=7).slots(experts, source, placement, 0).ravel(), minlength=6)
    assert even.sum() == 6000 and (np.abs(even[[0, 2, 4]] - 2000) < 5 * np.sqrt(6000 * 2 / 9)).all()
    weight = np.array([[1.0, 1, 3, 1, 0, 1]])
    drawn = np.bincount(
        WeightedChoice(seed=7, slot_weight=weight).slots(experts, source, placement, 0).ravel(), minlength=6
    )
    assert drawn[4] == 0 and abs(drawn[2] - 4500) < 5 * np.sqrt(6000 * 3 / 16)


def test_weighted_draws_depend_on_seed_step_and_layer_only_through_the_hash() -> None:
    placement = placed([[0, 1, 0, 2], [0, 1, 0, 2]], 3, 2, 1)
    experts, source = np.zeros((64, 1), np.int64), np.zeros(64, np.int64)
    seen = {
        tuple(WeightedChoice(seed=seed).slots(experts, source, placement, layer, step).ravel().tolist())
        for seed in (0, 1)
        for layer in (0, 1)
        for step in (0, 1)
    }
    assert len(seen) == 8
    # A prefix of the tokens gets the same choices.
    long = WeightedChoice().slots(experts, source, placement, 0)
    assert np.array_equal(WeightedChoice().slots(experts[:10], source[:10], placement, 0), long[:10])


def test_nearest_first_stays_on_the_rank_then_on_the_node() -> None:
    placement = placed([[0, 1, 0, 2, 0, 3, 4, 5]], 6, 4, 2)
    experts = np.zeros((4, 1), np.int64)
    slots = WeightedChoice(nearest_first=True).slots(experts, np.arange(4), placement, 0).ravel().tolist()
    assert slots[:3] == [0, 2, 4] and slots[3] == 4
    # A nearest tier whose weights are all zero is passed over.
    weight = np.array([[1.0, 1, 1, 1, 0, 1, 1, 1]])
    router = WeightedChoice(nearest_first=True, slot_weight=weight)
    assert router.slots(experts, np.arange(4), placement, 0).ravel()[2] in (0, 2)


def test_capped_choice_by_hand() -> None:
    # One node, two ranks, expert 0 on both; mean rows per rank = 3, so rank 0 is full after three rows.
    placement = placed([[0, 1, 0, 2]], 3, 2, 1)
    experts = np.array([[0], [0], [0], [0], [1], [0]])
    slots = CappedChoice().slots(experts, np.zeros(6, np.int64), placement, 0)
    # Expert 1 takes a row of rank 0 first; two tokens of expert 0 stay at home, the rest goes to rank 1.
    assert slots.ravel().tolist() == [0, 0, 2, 2, 1, 2]
    loose = CappedChoice(load_cap=2.0).slots(experts, np.zeros(6, np.int64), placement, 0)
    assert loose.ravel().tolist() == [0, 0, 0, 0, 1, 0]


def test_capped_choice_prefers_a_rank_the_token_visits_anyway() -> None:
    placement = placed([[0, 1, 2, 3, 0, 4, 5, 6]], 7, 4, 2)
    # From rank 1: expert 4 forces rank 2, where expert 0 has a copy as well; on its own, expert 0 stays on the node.
    slots = CappedChoice(load_cap=9.0).slots(np.array([[0, 4], [0, 3]]), np.array([1, 1]), placement, 0)
    assert slots.tolist() == [[4, 5], [0, 3]]


@given(st.data())
def test_load_alone_never_makes_a_token_cross(data: st.DataObject) -> None:
    placement = data.draw(topologies())
    experts, source = data.draw(tokens_for(placement))
    tight, loose = (
        count_traffic(
            CappedChoice(load_cap=cap).slots(experts, source, placement, 0), source, placement
        ).inter_node.sum()
        for cap in (1e-9, 1e9)
    )
    node = placement.rank_node()
    rank = placement.slot_rank()
    must = 0
    for token, home in zip(experts.tolist(), node[source].tolist(), strict=True):
        reach = [{int(node[rank[slot]]) for slot in placement.logical_to_physical(0)[expert]} for expert in token]
        must += len({next(iter(nodes)) for nodes in reach if len(nodes) == 1} - {home})
    assert tight >= must and loose >= must
    if placement.num_nodes <= 2:
        assert tight == loose == must


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan")])
def test_caps_that_make_no_sense_are_refused(cap: float) -> None:
    with pytest.raises(InputError, match="load_cap"):
        CappedChoice(load_cap=cap).slots(np.array([[0]]), np.array([0]), placed([[0, 1]], 2, 2, 1), 0)


def test_experts_of_another_model_are_refused() -> None:
    placement = placed([[0, 1]], 2, 2, 1)
    for router in (CappedChoice(), WeightedChoice(), StaticChoice(table=nearest_table(placement))):
        with pytest.raises(InputError, match=r"experts = 2: ids are 0 to 1"):
            router.slots(np.array([[2]]), np.array([0]), placement, 0)
    with pytest.raises(InputError, match="slot_weight"):
        WeightedChoice(slot_weight=np.array([[1.0, -1.0]])).slots(np.array([[0]]), np.array([0]), placement, 0)
