"""Counts of expert-parallel steps: every way of dividing them, against the placement room's count and by conservation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_strategies import ep_schedules
from long_runs import examples
from moeplan.base.errors import InputError
from moeplan.planner.placement.placement import contiguous
from moeplan.planner.placement.traffic import count_traffic
from moeplan.sim.parallel.traffic import Topology, count_step, expect_step, slot_groups, token_chunks
from moeplan.specs.schedules.parallel import ExpertParallelSchedule, load_ep_preset

TOPOLOGY = Topology(num_ranks=4, num_nodes=2, slots_per_rank=4)


def routing(rng, tokens, layers=2, top_k=3, slots=16):
    return np.argsort(rng.random((tokens, layers, slots)), axis=2)[:, :, :top_k]


@given(ep_schedules(), st.integers(0, 2**31), st.integers(1, 40))
@settings(max_examples=examples(150), deadline=None)
def test_tokens_and_rows_are_conserved(schedule, seed, tokens):
    rng = np.random.default_rng(seed)
    if schedule.num_groups > 4 and schedule.pipeline.split == "expert":
        schedule = schedule.with_options(pipeline__num_groups=4)
    slots, source = routing(rng, tokens), rng.integers(0, 4, tokens)
    load = count_step(slots, source, TOPOLOGY, schedule)
    assert load.rank_tokens.sum() == tokens
    # Every choice is computed once, whatever the division.
    assert (load.slot_rows.sum(axis=(1, 2)) == tokens * 3).all()
    assert np.array_equal(load.slot_rows.sum(axis=1)[0], np.bincount(slots[:, 0].ravel(), minlength=16))
    # What one rank sends another receives, tier by tier and part by part.
    assert np.array_equal(load.sent.sum(axis=3), load.received.sum(axis=3))
    # Links say the same again: rows add up to what ports send, columns to what they receive, tier by tier.
    far = np.arange(4)[:, None] // 2 != np.arange(4)[None, :] // 2
    for tier, mask in ((0, far), (1, ~far)):
        assert np.array_equal((load.links * mask).sum(axis=1), load.sent[:, :, tier].sum(axis=(0, 1)))
        assert np.array_equal((load.links * mask).sum(axis=0), load.received[:, :, tier].sum(axis=(0, 1)))
    assert not np.diag(load.links).any()


@given(st.integers(0, 2**31), st.integers(1, 60))
@settings(max_examples=examples(60), deadline=None)
def test_one_part_equals_the_count_of_the_placement_room(seed, tokens):
    rng = np.random.default_rng(seed)
    slots, source = routing(rng, tokens), rng.integers(0, 4, tokens)
    placement = contiguous(2, 16, 16, 4, 2)
    near = np.arange(4)[:, None] // 2 == np.arange(4)[None, :] // 2
    for kind in ("all-choices", "per-rank", "hierarchical"):
        load = count_step(slots, source, TOPOLOGY, ExpertParallelSchedule().with_options(all_to_all__kind=kind))
        for layer in range(2):
            traffic = count_traffic(slots[:, layer], source, placement)
            inter, intra = traffic.inter_node, traffic.intra_node
            if kind != "hierarchical":
                whole = traffic.choices if kind == "all-choices" else traffic.per_rank
                inter, intra = np.where(near, 0, whole), np.where(near & ~np.eye(4, dtype=bool), whole, 0)
            assert np.array_equal(load.sent[layer, 0], [inter.sum(1), intra.sum(1)])
            assert np.array_equal(load.received[layer, 0], [inter.sum(0), intra.sum(0)])
            assert np.array_equal(load.slot_rows[layer, 0], traffic.slot_rows)


def test_a_token_that_needs_a_rank_in_two_groups_travels_twice():
    slots, source = np.array([[[4, 7]]]), np.array([0])  # both experts on rank 1
    whole = count_step(slots, source, TOPOLOGY, ExpertParallelSchedule())
    halves = load_ep_preset("eps-moe").with_options(pipeline__num_groups=2)
    assert whole.sent[0, :, 1, 0].tolist() == [1]
    assert count_step(slots, source, TOPOLOGY, halves).sent[0, :, 1, 0].tolist() == [1, 1]


def test_hierarchical_exchange_crosses_once_and_forwards():
    # From rank 0 (node 0) to slots on ranks 2 and 3 (node 1): once to rank 2, which has rank 0's place, and on to rank 3.
    schedule = ExpertParallelSchedule().with_options(all_to_all__kind="hierarchical")
    load = count_step(np.array([[[8, 12]]]), np.array([0]), TOPOLOGY, schedule)
    assert load.sent[0, 0].tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert load.received[0, 0].tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]


def test_chunks_and_groups():
    assert token_chunks(np.array([0, 1, 0, 0, 1, 0]), 2, 2).tolist() == [0, 0, 0, 1, 1, 1]
    assert slot_groups(TOPOLOGY, 2).tolist() == [0, 0, 1, 1] * 4
    with pytest.raises(InputError, match="a rank has 4 experts"):
        slot_groups(TOPOLOGY, 5)


@pytest.mark.parametrize("kind", ["all-choices", "per-rank", "hierarchical"])
def test_expectations_are_means_of_independent_choices(kind):
    """Tokens drawn slot by slot with the given chances: their mean counts are what is expected."""
    rng = np.random.default_rng(3)
    chance = rng.uniform(0.02, 0.4, 16)
    schedule = ExpertParallelSchedule().with_options(all_to_all__kind=kind)
    tokens = 40_000
    drawn = rng.random((tokens, 16)) < chance
    source = np.arange(tokens) % 4
    expected = expect_step(chance[None, None, :], np.bincount(source), TOPOLOGY, schedule)
    sent, received, rows = np.zeros((2, 4)), np.zeros((2, 4)), np.zeros(16)
    for count in range(1, 17):  # `count_step` wants equally many choices for every token
        mine = np.flatnonzero(drawn.sum(axis=1) == count)
        if len(mine):
            slots = np.nonzero(drawn[mine])[1].reshape(len(mine), 1, count)
            load = count_step(slots, source[mine], TOPOLOGY, schedule)
            sent, received, rows = sent + load.sent[0, 0], received + load.received[0, 0], rows + load.slot_rows[0, 0]
    assert expected.sent[0, 0] == pytest.approx(sent, rel=0.03)
    assert expected.received[0, 0] == pytest.approx(received, rel=0.03)
    assert expected.slot_rows[0, 0] == pytest.approx(rows, rel=0.03)


@given(ep_schedules(), st.integers(0, 2**31))
@settings(max_examples=examples(60), deadline=None)
def test_expected_links_add_up_to_expected_ports(schedule, seed):
    if schedule.num_groups > 4 and schedule.pipeline.split == "expert":
        schedule = schedule.with_options(pipeline__num_groups=4)
    rng = np.random.default_rng(seed)
    load = expect_step(rng.uniform(0, 0.5, (2, 4, 16)), np.full(4, 5000), TOPOLOGY, schedule)
    far = np.arange(4)[:, None] // 2 != np.arange(4)[None, :] // 2
    most = load.sent.shape[0] * load.sent.shape[1]  # each part of each layer is rounded to whole tokens
    for tier, mask in ((0, far), (1, ~far)):
        assert (load.links * mask).sum(axis=1) == pytest.approx(load.sent[:, :, tier].sum(axis=(0, 1)), abs=most)
        assert (load.links * mask).sum(axis=0) == pytest.approx(load.received[:, :, tier].sum(axis=(0, 1)), abs=most)


def test_wrong_ids_and_chances_are_refused():
    with pytest.raises(InputError, match="whole numbers from 0 to 15"):
        count_step(np.array([[[16]]]), np.array([0]), TOPOLOGY, ExpertParallelSchedule())
    with pytest.raises(InputError, match="chances lie between 0 and 1"):
        expect_step(np.full((1, 1, 16), 1.5), np.full(4, 4), TOPOLOGY, ExpertParallelSchedule())
    with pytest.raises(InputError, match="equal nodes"):
        Topology(num_ranks=4, num_nodes=3, slots_per_rank=1)
