"""Splits by request, steps of whole requests, and comparing placements on them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.planner.placement.comparison import Candidate, assemble, choose_per_layer, evaluate, replay_layer
from moeplan.planner.placement.eplb import rebalance
from moeplan.planner.placement.objective import layer_time, mean_layer_seconds
from moeplan.planner.placement.placement import contiguous, round_robin
from moeplan.planner.placement.replica_choice import CappedChoice
from moeplan.planner.placement.splits import expert_load, request_batches, source_ranks, split_requests
from placement_cases import COSTS, clustered_step


@given(st.lists(st.integers(1, 30), min_size=12, max_size=40), st.integers(0, 5))
def test_splits_are_disjoint_complete_and_about_as_large_as_asked(lengths: list[int], seed: int) -> None:
    request = np.repeat(np.arange(len(lengths)) * 7, lengths)
    parts = split_requests(request, (0.5, 0.2, 0.3), seed)
    assert sorted(np.concatenate(parts).tolist()) == [7 * place for place in range(len(lengths))]
    for part, share in zip(parts, (0.5, 0.2, 0.3), strict=True):
        assert abs(np.isin(request, part).sum() - share * len(request)) <= 2 * max(lengths)
    assert [part.tolist() for part in split_requests(request, (0.5, 0.2, 0.3), seed)] == [
        part.tolist() for part in parts
    ]


@pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (1.2, -0.2), (1.0, 0.0)])
def test_fractions_must_sum_to_one(fractions: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="positive and sum to 1"):
        split_requests(np.arange(9), fractions)


def test_too_few_requests_for_the_parts_are_refused() -> None:
    with pytest.raises(InputError, match="too few for 3 parts"):
        split_requests(np.zeros(100, np.int64), (0.5, 0.2, 0.3))


def test_steps_hold_whole_requests_in_shuffled_order() -> None:
    lengths = [3, 5, 2, 4, 6]
    request = np.repeat([10, 11, 12, 13, 14], lengths)
    experts = np.arange(20)[:, None, None].astype(np.uint8)  # every token names itself
    wanted = np.array([10, 12, 13, 14])
    steps = request_batches(experts, request, wanted, batch_tokens=5, num_ranks=2, seed=1, shuffles=2)
    assert [step.num_tokens for step in steps] == [5] * 6
    for order in (steps[:3], steps[3:]):
        tokens = np.concatenate([step.experts.ravel() for step in order])
        assert (np.isin(request[tokens], wanted)).all() and len(set(tokens.tolist())) == 15
        # Tokens of one request stay together and in order: 15 rows, at most one change per request.
        assert (np.diff(request[tokens]) != 0).sum() <= 3
        assert all((np.diff(tokens[request[tokens] == r]) == 1).all() for r in wanted)
    assert [s.experts.ravel().tolist() for s in steps[:3]] != [s.experts.ravel().tolist() for s in steps[3:]]
    short = request_batches(experts, request, wanted, batch_tokens=500, num_ranks=2)
    assert [step.num_tokens for step in short] == [15]


def test_tokens_live_evenly_on_ranks() -> None:
    assert source_ranks(6, 4).tolist() == [0, 1, 2, 3, 0, 1]
    assert source_ranks(6, 4, "request").tolist() == [0, 0, 1, 2, 2, 3]


def test_batches_refuse_unknown_requests_and_tiny_steps() -> None:
    experts, request = np.zeros((4, 1, 1), np.uint8), np.zeros(4, np.int32)
    with pytest.raises(InputError, match="none of them has a token"):
        request_batches(experts, request, np.array([9]), batch_tokens=4, num_ranks=2)
    with pytest.raises(InputError, match="at least one token for each of 8 ranks"):
        request_batches(experts, request, np.array([0]), batch_tokens=4, num_ranks=8)


def test_expert_load_counts_every_choice() -> None:
    step = clustered_step(3)
    load = expert_load([step, step], 16)
    for layer in range(2):
        assert load[layer].tolist() == (2 * np.bincount(step.experts[:, layer].ravel(), minlength=16)).tolist()
    with pytest.raises(InputError, match="ids are 0 to 7"):
        expert_load([step], 8)


def test_evaluation_is_the_mean_over_steps() -> None:
    steps = [clustered_step(1), clustered_step(2)]
    candidate = Candidate(placement=rebalance(expert_load(steps, 16), 20, 4, 2), router=CappedChoice())
    found = evaluate(candidate, steps, COSTS)
    for layer in range(2):
        traffics = replay_layer(candidate, steps, layer)
        assert found.layer_s[layer] == pytest.approx(mean_layer_seconds(traffics, COSTS), rel=1e-12)
        assert found.compute_s[layer] == pytest.approx(np.mean([layer_time(t, COSTS).compute_s for t in traffics]))
        assert found.inter_node_tokens[layer] == np.mean([t.inter_node.sum() for t in traffics])
        assert found.intra_node_tokens[layer] == np.mean([t.intra_node.sum() for t in traffics])
    assert found.mean_layer_s == pytest.approx(found.layer_s.mean())
    with pytest.raises(InputError, match="the placement has 1 MoE layers"):
        evaluate(Candidate(placement=contiguous(1, 16, 16, 4, 2), router=CappedChoice()), steps, COSTS)
    with pytest.raises(InputError, match="at least one step"):
        evaluate(candidate, [], COSTS)


def test_layers_choose_for_themselves_and_ties_go_to_the_first() -> None:
    step = clustered_step(1)
    found = evaluate(Candidate(placement=contiguous(2, 16, 16, 4, 2), router=CappedChoice()), [step], COSTS)
    better = dataclasses.replace(found, layer_s=found.layer_s * np.array([1.0, 0.5]))
    chosen = choose_per_layer({"a": found, "b": better})
    assert chosen == ["a", "b"]
    placements = {"a": contiguous(2, 16, 16, 4, 2), "b": round_robin(2, 16, 16, 4, 2)}
    mixed = assemble(placements, chosen)
    assert mixed.physical_to_logical[0].tolist() == placements["a"].physical_to_logical[0].tolist()
    assert mixed.physical_to_logical[1].tolist() == placements["b"].physical_to_logical[1].tolist()
    with pytest.raises(InputError, match="differ"):
        assemble({"a": placements["a"], "b": contiguous(2, 16, 20, 4, 2)}, chosen)
