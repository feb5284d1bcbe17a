"""Traffic and layer time: a step by hand, equality with the slow reference, conservation, and bad input."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.planner.placement.objective import LayerCosts, balanced_row_s, layer_time, mean_layer_seconds
from moeplan.planner.placement.placement import Placement, contiguous
from moeplan.planner.placement.replica_choice import WeightedChoice
from moeplan.planner.placement.traffic import Traffic, count_traffic
from placement_cases import COSTS, tokens_for, topologies
from plain_traffic import count_traffic_slowly

FIELDS = [field.name for field in dataclasses.fields(Traffic)]


def by_hand() -> Traffic:
    """Two nodes of two ranks, two slots each; three tokens."""
    placement = contiguous(1, 8, 8, 4, 2)
    slots = np.array(
        [
            [0, 1, 4],  # from rank 0: twice to itself, once to rank 2 in the other node
            [6, 7, 5],  # from rank 1: rank 3 twice (its own seat there), rank 2 once
            [2, 6, 4],  # from rank 3: rank 1, itself, rank 2
        ]
    )
    return count_traffic(slots, np.array([0, 1, 3]), placement)


def test_three_tokens_by_hand() -> None:
    traffic = by_hand()
    assert traffic.choices.tolist() == [[2, 0, 1, 0], [0, 0, 1, 2], [0, 0, 0, 0], [0, 1, 1, 1]]
    assert traffic.per_rank.tolist() == [[1, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]]
    # Token 0 crosses to rank 2 (seat 0), token 1 to rank 3 (seat 1), token 2 to rank 1 (seat 1).
    assert traffic.inter_node.tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
    # Token 1 goes on from rank 3 to 2; token 2 from home rank 3 to 2.
    assert traffic.intra_node.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0]]
    assert traffic.slot_rows.tolist() == [1, 1, 1, 0, 2, 1, 2, 1]
    assert traffic.rows.tolist() == [2, 1, 3, 3]
    assert traffic.ports().tolist() == [[1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 2], [0, 0, 2, 0], [2, 1, 3, 3]]


def test_layer_time_by_hand() -> None:
    costs = LayerCosts(
        token_bytes_dispatch=100.0, token_bytes_combine=200.0, intra_bytes_per_s=50.0, inter_bytes_per_s=10.0, row_s=7.0
    )
    time = layer_time(by_hand(), costs)
    # Largest node port 1 token, largest rank port 2 tokens, fullest rank 3 rows.
    assert time.dispatch_s == pytest.approx(1 * 100 / 10 + 2 * 100 / 50)
    assert time.combine_s == pytest.approx(1 * 200 / 10 + 2 * 200 / 50)
    assert time.compute_s == 21.0
    assert time.total_s == 1 * (300 / 10) + 2 * (300 / 50) + 3 * 7.0
    assert mean_layer_seconds([by_hand(), by_hand()], costs) == time.total_s


@given(st.data())
def test_fast_count_equals_the_reference(data: st.DataObject) -> None:
    placement = data.draw(topologies())
    experts, source = data.draw(tokens_for(placement))
    slots = WeightedChoice(seed=3).slots(experts, source, placement, 0)
    fast, slow = count_traffic(slots, source, placement), count_traffic_slowly(slots, source, placement)
    for name in FIELDS:
        assert np.array_equal(getattr(fast, name), getattr(slow, name)), name


@given(st.data())
def test_tokens_and_rows_are_conserved(data: st.DataObject) -> None:
    placement = data.draw(topologies())
    experts, source = data.draw(tokens_for(placement))
    slots = WeightedChoice(seed=5).slots(experts, source, placement, 0)
    traffic = count_traffic(slots, source, placement)
    assert traffic.rows.sum() == traffic.slot_rows.sum() == experts.size
    assert np.array_equal(
        traffic.choices.sum(axis=1), np.bincount(source, minlength=placement.num_ranks) * experts.shape[1]
    )
    ranks = slots // placement.slots_per_rank
    assert traffic.per_rank.sum() == sum(len(set(row)) for row in ranks.tolist())
    assert (traffic.per_rank <= traffic.choices).all()
    # Every delivery is forwarded inside the node, or has arrived: at home, or where the token crossed to.
    node = placement.rank_node()
    same_seat = (
        np.arange(placement.num_ranks)[:, None] - np.arange(placement.num_ranks)
    ) % placement.ranks_per_node == 0
    arrived = int(traffic.per_rank[same_seat].sum())
    assert traffic.intra_node.sum() + arrived == traffic.per_rank.sum()
    assert np.array_equal(
        traffic.intra_node.sum(axis=0) + (traffic.per_rank * same_seat).sum(axis=0), traffic.per_rank.sum(axis=0)
    )
    assert not traffic.inter_node[node[:, None] == node].any() and not traffic.intra_node[node[:, None] != node].any()
    away = sum(
        len({r // placement.ranks_per_node for r in row} - {node[s]})
        for row, s in zip(ranks.tolist(), source, strict=True)
    )
    assert traffic.inter_node.sum() == away


def test_row_cost_at_which_compute_equals_the_exchange() -> None:
    traffic = by_hand()
    row_s = balanced_row_s([traffic], COSTS, 3.0)
    ports = traffic.ports()
    exchange = ports[0].mean() * COSTS.inter_token_s + ports[2].mean() * COSTS.intra_token_s
    assert row_s * traffic.rows.mean() == pytest.approx(3 * exchange)


def test_ids_of_another_model_are_refused() -> None:
    placement = contiguous(1, 4, 4, 2)
    with pytest.raises(InputError, match=r"slots = 4: ids are 0 to 3"):
        count_traffic(np.array([[4]]), np.array([0]), placement)
    with pytest.raises(InputError, match=r"source_rank = 2: ids are 0 to 1"):
        count_traffic(np.array([[3]]), np.array([2]), placement)
    with pytest.raises(InputError, match="one rank per token"):
        count_traffic(np.array([[3]]), np.array([0, 1]), placement)
    with pytest.raises(InputError, match="whole numbers"):
        count_traffic(np.array([[0.5]]), np.array([0]), placement)


@pytest.mark.parametrize(
    ("field", "value"), [("row_s", -1.0), ("inter_bytes_per_s", 0.0), ("intra_bytes_per_s", float("inf"))]
)
def test_costs_that_make_no_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{field} = .*finite and positive"):
        dataclasses.replace(COSTS, **{field: value})


def test_an_empty_step_takes_no_time() -> None:
    placement = Placement(physical_to_logical=np.array([[0, 1]]), num_logical=2, num_ranks=2)
    traffic = count_traffic(np.empty((0, 2), np.int64), np.empty(0, np.int64), placement)
    assert layer_time(traffic, COSTS).total_s == 0.0


def test_parts_that_overlap_leave_the_busier_of_compute_and_network() -> None:
    traffic = by_hand()
    for row_s in (1e-9, 1e-6, 1e-3):
        alone = layer_time(traffic, dataclasses.replace(COSTS, row_s=row_s))
        out, kernels, back = alone.dispatch_s, alone.compute_s, alone.combine_s
        for groups in (1, 2, 8):
            together = layer_time(traffic, dataclasses.replace(COSTS, row_s=row_s, groups=groups)).total_s
            assert together == pytest.approx(
                max(out / groups + kernels + back / groups, out + kernels / groups + back), rel=1e-12
            )
            assert max(kernels, out + back) < together <= alone.total_s * (1 + 1e-12)
