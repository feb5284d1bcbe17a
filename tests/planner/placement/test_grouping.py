"""Grouping by affinity: co-activation, clusters, controlled sizes, GRACE's steps by hand, Occult's exchange."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.planner.placement.affinity import (
    affinity_within,
    co_activation,
    kmeans,
    sized_groups,
    spectral_clusters,
)
from moeplan.planner.placement.grace import (
    RATIOS,
    Replication,
    grace_plan,
    knee_ratio,
    node_groups,
    predict_load,
    rank_groups,
    replicate,
)
from moeplan.planner.placement.occult import fill_spare_slots, occult_groups, occult_placement, uniform_groups
from moeplan.planner.placement.splits import StepTokens, expert_load
from placement_cases import clustered_step


def planted(sizes: list[int], inside: int = 20, across: int = 1) -> np.ndarray:
    """Return an affinity with the given blocks, experts in order."""
    label = np.repeat(np.arange(len(sizes)), sizes)
    table = np.where(label[:, None] == label[None, :], inside, across)
    np.fill_diagonal(table, 0)
    return table


@st.composite
def affinities(draw: st.DrawFn, *, least: int = 1, most: int = 14) -> np.ndarray:
    """Return a random symmetric affinity with a zero diagonal, often sparse."""
    size = draw(st.integers(least, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    table = rng.integers(0, draw(st.sampled_from([1, 3, 100])) + 1, (size, size)) * (rng.random((size, size)) < 0.6)
    table = np.triu(table, 1)
    return table + table.T


def is_partition(groups: list[list[int]], size: int) -> bool:
    return sorted(itertools.chain(*groups)) == list(range(size)) and all(groups)


def test_co_activation_by_hand() -> None:
    experts = np.array([[[0, 1]], [[1, 2]], [[0, 1]]], dtype=np.int32)
    step = StepTokens(experts=experts, source_rank=np.zeros(3, np.int32))
    assert co_activation([step, step], 0, 4).tolist() == [[0, 4, 0, 0], [4, 0, 2, 0], [0, 2, 0, 0], [0, 0, 0, 0]]
    with pytest.raises(InputError, match="experts = 2: ids are 0 to 1"):
        co_activation([step], 0, 2)


def test_kmeans_finds_separated_points_and_leaves_no_cluster_empty() -> None:
    points = np.array([[0.0], [0.1], [5.0], [5.1], [9.0]])
    labels = kmeans(points, 3)
    assert labels[0] == labels[1] and labels[2] == labels[3] and len(set(labels.tolist())) == 3
    same = kmeans(np.zeros((4, 2)), 3)
    assert sorted(np.bincount(same, minlength=3).tolist()) == [1, 1, 2]


def test_spectral_clusters_recover_planted_groups() -> None:
    sizes = [5, 3, 4]
    assert spectral_clusters(planted(sizes), 3) == [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]]
    order = np.random.default_rng(0).permutation(12)
    shuffled = planted(sizes)[np.ix_(order, order)]
    found = {frozenset(order[group].tolist()) for group in spectral_clusters(shuffled, 3)}
    assert found == {frozenset(range(5)), frozenset(range(5, 8)), frozenset(range(8, 12))}
    with pytest.raises(InputError, match="num_clusters = 4"):
        spectral_clusters(planted([3]), 4)


@given(affinities(), st.data())
def test_sized_groups_partition_within_their_bounds(affinity: np.ndarray, data: st.DataObject) -> None:
    size = len(affinity)
    count = data.draw(st.integers(1, size))
    smallest = data.draw(st.integers(1, size // count))
    largest = data.draw(st.integers(-(-size // count), size))
    groups = sized_groups(affinity, count, smallest, largest)
    assert is_partition(groups, size) and len(groups) == count
    assert all(smallest <= len(group) <= largest for group in groups)
    assert groups == sized_groups(affinity, count, smallest, largest)


def test_sizes_that_cannot_add_up_are_refused() -> None:
    with pytest.raises(InputError, match="cannot hold 6 experts"):
        sized_groups(planted([6]), 2, 1, 2)


@given(affinities(least=4), st.integers(1, 2), st.integers(1, 2), st.sampled_from(RATIOS))
def test_grace_groups_respect_ranks_and_sizes(
    affinity: np.ndarray, nodes: int, ranks_per_node: int, ratio: float
) -> None:
    parts = node_groups(affinity, nodes, ranks_per_node)
    assert is_partition(parts, len(affinity)) and min(len(part) for part in parts) >= ranks_per_node
    groups = rank_groups(affinity, parts, ranks_per_node, ratio)
    assert is_partition(groups, len(affinity))
    for place, group in enumerate(groups):
        even = len(parts[place // ranks_per_node]) // ranks_per_node
        slack = max(1, round(even * ratio))
        assert max(1, even - slack) <= len(group) <= even + slack
        assert set(group) <= set(parts[place // ranks_per_node])


def test_knee_is_where_affinity_stops_paying() -> None:
    # Groups of 13, 9, 9, 9 under E = 10. Sizes 10 ± 1, ± 2 and ± 3 keep 0.764, 0.809 and 0.862 of the affinity at size
    # deviations 1, 1.22 and 1.73; ± 2, first reached by r = 0.15, lies farthest above the line between the ends.
    affinity, everything = planted([13, 9, 9, 9]), [list(range(40))]
    assert knee_ratio(affinity, everything, 4) == 0.15
    used = [affinity_within(affinity, rank_groups(affinity, everything, 4, r)) for r in (0.0, 0.15, 0.3, 0.5)]
    assert [round(share, 3) for share in used] == [0.764, 0.809, 0.862, 0.862]
    # A curve without a knee (here: convex) and one where no ratio changes anything keep the smallest ratio.
    assert knee_ratio(planted([9, 3, 6, 6]), [list(range(24))], 4) == 0.0
    assert knee_ratio(planted([2, 2]), [[0, 1, 2, 3]], 2) == 0.0


def test_replication_by_hand() -> None:
    groups = [[0, 1, 2], [3], [4], [5]]
    load = np.array([60, 30, 10, 20, 40, 40])
    # W = 100, 20, 40, 40: mean 50, ρ = 2, n = 2; the prefix must reach 100·2/3, so experts 0 and 1, to ranks 1 and 2.
    copied = replicate(groups, load)
    assert copied == Replication(source=0, experts=(0, 1), targets=(1, 2))
    # Wr = 90 over three instances, 30 each (the corrected W'p).
    assert predict_load(groups, load, copied).tolist() == [40.0, 50.0, 70.0, 40.0]
    assert predict_load(groups, load, copied).sum() == load.sum()


def test_replication_always_copies_at_least_once_and_never_to_all() -> None:
    even = replicate([[0], [1]], np.array([5, 5]))
    assert even == Replication(source=0, experts=(0,), targets=(1,))
    skewed = replicate([[0], [1], [2]], np.array([1000, 0, 0]))
    assert skewed.targets == (1, 2)
    assert replicate([[0, 1]], np.array([5, 5])).targets == ()
    assert replicate([[0], [1]], np.array([0, 0])).targets == ()


def test_grace_plan_holds_what_its_steps_say() -> None:
    steps = [clustered_step(0)]
    plan = grace_plan(steps, 16, 4, 2)
    load = expert_load(steps, 16)
    placement = plan.placement
    assert placement.num_layers == 2 and placement.num_nodes == 2
    assert (placement.slots_per_rank * 4 >= np.array(plan.num_instances)).all()
    for layer in range(2):
        held = placement.physical_to_logical[layer].reshape(4, -1)
        weight = plan.slot_weight[layer].reshape(4, -1)
        planned = [row[used > 0].tolist() for row, used in zip(held, weight, strict=True)]
        assert sum(len(row) for row in planned) == plan.num_instances[layer]
        assert all(len(set(row.tolist())) == len(row) for row in held)
        assert plan.predicted_load[layer].sum() == pytest.approx(load[layer].sum())
        for rank in range(4):
            assert np.allclose(weight[rank][weight[rank] > 0] * plan.predicted_load[layer][rank], 1)
    again = grace_plan(steps, 16, 4, 2)
    assert again.placement.same_as(placement) and again.ratios == plan.ratios
    slots = plan.router().slots(steps[0].experts[:, 1], steps[0].source_rank, placement, 1)
    assert np.array_equal(placement.physical_to_logical[1][slots], steps[0].experts[:, 1])


def test_grace_refuses_ragged_topologies_and_bad_ratios() -> None:
    with pytest.raises(InputError, match="num_nodes = 3"):
        grace_plan([clustered_step(0)], 16, 4, 3)
    with pytest.raises(InputError, match=r"ratio = -0\.1"):
        grace_plan([clustered_step(0)], 16, 4, 2, ratio=-0.1)


@given(affinities(least=2), st.data())
def test_uniform_groups_cannot_gain_by_any_exchange(affinity: np.ndarray, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(affinity)))
    groups = uniform_groups(affinity, count)
    assert is_partition(groups, len(affinity))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    kept = sum(int(affinity[np.ix_(g, g)].sum()) for g in groups)
    for a, b in itertools.combinations(range(count), 2):
        for i, j in itertools.product(groups[a], groups[b]):
            swapped = [list(g) for g in groups]
            swapped[a][groups[a].index(i)], swapped[b][groups[b].index(j)] = j, i
            assert sum(int(affinity[np.ix_(g, g)].sum()) for g in swapped) <= kept


def test_occult_divides_nodes_first() -> None:
    affinity = planted([4, 4], inside=10) + planted([2, 2, 2, 2], inside=10, across=0)
    assert occult_groups(affinity, 2, 2) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_spare_slots_go_to_hot_experts_on_cool_ranks() -> None:
    # Expert 0 (load 8) is copied to the coolest rank that lacks it, then shares 4 + 4.
    assert fill_spare_slots([[0], [1], [2]], np.array([8, 3, 1]), 2) == [[0, 1], [1, 0], [2, 0]]
    # A rank that holds everything already stays short.
    assert fill_spare_slots([[0, 1], [2]], np.array([1, 1, 1]), 5) == [[0, 1, 2], [2, 0, 1]]


def test_occult_placement_has_the_slots_asked_for() -> None:
    steps = [clustered_step(0)]
    for slots in (16, 20, 24):
        placement = occult_placement(steps, 16, slots, 4, 2)
        assert placement.num_slots == slots and placement.replica_counts().min() == 1
    with pytest.raises(InputError, match="not divisible by 4 ranks"):
        occult_placement(steps, 16, 18, 4, 2)
