"""Statistics of a recording against slow, obvious references, hand-worked cases and known figures."""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.base.errors import InputError
from moeplan.traces.format import LoadProfile, RoutingTrace
from moeplan.traces.readers import import_trace
from moeplan.traces.stack_distance import lru_curve
from moeplan.traces.stats import BATCH_SIZES, OVERLAP_DISTANCES, load_stats, trace_stats

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"
LONG = os.environ.get("MOEPLAN_LONG") == "1"


def trace_of(
    experts: np.ndarray, request: list[int], position: list[int], num_experts: int, **more: object
) -> RoutingTrace:
    """Return a decode recording of the given choices."""
    return RoutingTrace(
        experts=experts.astype(np.uint8), request=np.array(request, np.int32), position=np.array(position, np.int32),
        phase=np.ones(len(experts), np.uint8), num_experts=num_experts, model="", source="", licence="",
        layer_ids=tuple(range(experts.shape[1])), **more,
    )  # fmt: skip


@st.composite
def traces(draw: st.DrawFn) -> RoutingTrace:
    """Small recordings with gaps in positions, several requests and any order of choices."""
    num_experts = draw(st.integers(1, 7))
    top_k = draw(st.integers(1, num_experts))
    layers, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    popularity = np.exp(-draw(st.floats(0, 2)) * np.arange(num_experts))
    keys = rng.random((tokens, layers, num_experts)) ** (1 / popularity)
    experts = np.argsort(-keys, axis=2)[:, :, :top_k]
    request = np.sort(rng.integers(0, 3, tokens))
    position = np.zeros(tokens, int)
    for t in range(1, tokens):
        position[t] = position[t - 1] + rng.choice([1, 1, 1, 2]) if request[t] == request[t - 1] else rng.integers(0, 5)
    return trace_of(experts, request.tolist(), position.tolist(), num_experts)


def lru_hits_by_hand(trace: RoutingTrace, layer: int, capacity: int, reset: bool) -> int:
    """Return the hits of one explicit LRU cache."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits, before = 0, None
    for t in range(trace.num_tokens):
        if reset and trace.request[t] != before:
            cache.clear()
        before = trace.request[t]
        chosen = [int(e) for e in trace.experts[t, layer]]
        hits += sum(e in cache for e in chosen)  # all are looked up before any is inserted
        for e in chosen:  # then touched or inserted one by one
            cache.pop(e, None)
            while len(cache) >= capacity:
                cache.popitem(last=False)
            cache[e] = None
    return hits


@settings(max_examples=1000 if LONG else 60, deadline=None)
@given(trace=traces(), reset=st.sampled_from(["request", "never"]))
def test_one_pass_gives_the_hits_of_every_capacity(trace: RoutingTrace, reset: str) -> None:
    curve = lru_curve(trace, reset)  # type: ignore[arg-type]
    assert curve.lookups == trace.num_tokens * trace.top_k
    for layer in range(trace.num_layers):
        for capacity in range(1, trace.num_experts + 1):
            expected = lru_hits_by_hand(trace, layer, capacity, reset == "request")
            assert curve.hits[layer, capacity - 1] == expected, (layer, capacity)


def test_an_lru_trace_worked_by_hand() -> None:
    # Tokens {0,1} {1,2} {3,0} {0,1}. Room for 1: expert 1 and, last, expert 0 hit. Room for 2: the same two. Room for 3:
    # expert 1, then 0 (looked up before 3 evicts it), then 0 again (1 is gone). Room for 4: every repeat hits.
    trace = trace_of(np.array([[[0, 1]], [[1, 2]], [[3, 0]], [[0, 1]]]), [0] * 4, [0, 1, 2, 3], 4)
    curve = lru_curve(trace)
    assert curve.hits.tolist() == [[2, 2, 3, 4]]
    assert curve.hit_rates() == [2 / 8, 2 / 8, 3 / 8, 4 / 8]
    assert curve.hit_rate(0) == 0.0 and curve.hit_rate(99) == 4 / 8
    with pytest.raises(InputError, match="request"):
        lru_curve(trace, "step")  # type: ignore[arg-type]


@settings(max_examples=1000 if LONG else 60, deadline=None)
@given(trace=traces())
def test_every_figure_equals_its_definition(trace: RoutingTrace) -> None:
    stats = trace_stats(trace)
    chosen = [[set(map(int, row)) for row in token] for token in trace.experts]
    tokens, layers, top_k, num_experts = trace.num_tokens, trace.num_layers, trace.top_k, trace.num_experts
    loads = [[sum(e in token[layer] for token in chosen) for e in range(num_experts)] for layer in range(layers)]
    assert stats.load_max_over_mean_by_layer == pytest.approx([max(row) * num_experts / sum(row) for row in loads])
    gini = [
        sum(abs(a - b) for a in row for b in row) / (2 * num_experts * num_experts * (sum(row) / num_experts))
        for row in loads
    ]
    assert stats.load_gini_by_layer == pytest.approx(gini)
    assert stats.load_gini == pytest.approx(np.mean(gini))
    chance = [sum((load / tokens) ** 2 for load in row) / top_k for row in loads]
    assert stats.reuse_chance_fraction == pytest.approx(np.mean(chance))

    for distance in OVERLAP_DISTANCES:
        shares = [
            len(chosen[t][layer] & chosen[t - distance][layer]) / top_k
            for t in range(distance, tokens)
            for layer in range(layers)
            if trace.request[t] == trace.request[t - distance]
            and trace.position[t] - trace.position[t - distance] == distance
        ]
        assert stats.overlap_fraction.get(distance) == (pytest.approx(np.mean(shares)) if shares else None)
    assert stats.reuse_fraction == stats.overlap_fraction.get(1)

    found = {top_k: 0, 2 * top_k: 0}
    strongest = []
    for layer in range(layers - 1):
        pair = [
            [sum(a in t[layer] and b in t[layer + 1] for t in chosen) for b in range(num_experts)]
            for a in range(num_experts)
        ]
        strongest.append(sum(max(row) for row in pair) / (tokens * top_k))
        for token in chosen:
            score = [sum(pair[a][b] for a in token[layer]) for b in range(num_experts)]
            ranking = sorted(range(num_experts), key=lambda b: (-score[b], b))
            for width in found:
                found[width] += len(set(ranking[:width]) & token[layer + 1])
    total = tokens * top_k * (layers - 1)
    if total:
        assert stats.affinity_recall_fraction == pytest.approx(found[top_k] / total)
        assert stats.affinity_recall_2k_fraction == pytest.approx(found[2 * top_k] / total)
        assert stats.affinity_partner_fraction == pytest.approx(np.mean(strongest))
    else:
        assert stats.affinity_recall_fraction is None and stats.affinity_recall_2k_fraction is None
        assert stats.affinity_partner_fraction is None
    assert stats.num_affinity_tokens == (tokens if layers > 1 else 0)

    for batch in BATCH_SIZES:
        if batch > tokens:
            assert batch not in stats.active_fraction
            continue
        unused = [math.comb(tokens - load, batch) / math.comb(tokens, batch) for row in loads for load in row]
        assert stats.active_fraction[batch] == pytest.approx(1 - np.mean(unused))

    lengths = [int((trace.request == r).sum()) for r in set(trace.request.tolist())]
    assert (stats.num_requests, stats.max_tokens_per_request) == (len(lengths), max(lengths))
    assert (stats.num_tokens, stats.num_prefill_tokens, stats.num_decode_tokens) == (tokens, 0, tokens)
    assert stats.guess_recall_fraction is None
    assert json.loads(json.dumps(stats.as_json()))["top_k"] == top_k


@settings(max_examples=300 if LONG else 25, deadline=None)
@given(trace=traces(), step=st.integers(1, 5))
def test_figures_do_not_depend_on_how_rows_are_chunked(trace: RoutingTrace, step: int) -> None:
    whole = trace_stats(trace)

    def chunks(rows: int, *_: int) -> list[tuple[int, int]]:
        return [(t, min(rows, t + step)) for t in range(0, rows, step)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeplan.traces.stats.row_chunks", chunks)
        patch.setattr("moeplan.traces.stack_distance.row_chunks", chunks)
        assert trace_stats(trace) == whole


def test_affinity_of_long_recordings_is_scored_on_evenly_spaced_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    experts = rng.random((1000, 2, 8)).argsort(axis=2)[:, :, :2]
    trace = trace_of(experts, [0] * 1000, list(range(1000)), 8)
    full = trace_stats(trace)
    monkeypatch.setattr("moeplan.traces.stats._MAX_AFFINITY_TOKENS", 300)
    sampled = trace_stats(trace)
    assert (full.num_affinity_tokens, sampled.num_affinity_tokens) == (1000, 250)
    assert abs(full.affinity_recall_fraction - sampled.affinity_recall_fraction) < 0.05
    assert full.overlap_fraction == sampled.overlap_fraction


def test_recall_of_guesses_counts_only_layers_that_could_be_guessed() -> None:
    experts = np.array([[[0, 1], [1, 2], [2, 3]]] * 2)
    predicted = np.full((2, 3, 2, 3), -1, np.int16)
    predicted[:, 1, 0] = [1, 0, 2]  # layer 1, one layer early: hit, miss, hit
    predicted[:, 2, 0] = [0, 1, 3]  # layer 2: miss, miss, hit
    predicted[0, 2, 1] = [3, 2, -1]  # layer 2, two layers early, first token only: hit, hit
    stats = trace_stats(trace_of(experts, [0, 0], [0, 1], 4, predicted=predicted))
    # distance 1: 2 layers × 2 tokens × 2 choices = 8 wanted; distance 2: 1 layer × 2 tokens × 2 choices = 4 wanted.
    assert stats.guess_recall_fraction == [[2 / 8, 2 / 8, 6 / 8], [1 / 4, 2 / 4, 2 / 4]]


def test_statistics_of_loads_alone() -> None:
    counts = np.array([[3, 1], [4, 0]], dtype=np.int64)
    profile = LoadProfile(counts=counts, model="", layer_ids=(0, 1), source="", licence="", windows=counts[None])
    stats = load_stats(profile)
    assert stats.load_max_over_mean_by_layer == [1.5, 2.0] and stats.load_max_over_mean == 1.75
    assert stats.load_gini_by_layer == [0.25, 0.5] and stats.num_windows == 1
    assert json.loads(json.dumps(stats.as_json()))["num_layers"] == 2


KNOWN = {
    # The exact LRU hit rates with 25 and 50 % of the experts, and further figures known to two digits.
    "gpt-oss-20b_decode": (0.6584, 0.8914, {"reuse_chance_fraction": 0.19, "affinity_recall_fraction": 0.58}),
    "deepseek-v2-lite_prefill": (
        0.4914,
        0.7101,
        {"load_max_over_mean": 2.70, "reuse_fraction": 0.28, "reuse_chance_fraction": 0.12},
    ),
    "tiny-moe_16e_top2": (
        0.3873,
        0.6748,
        {
            "load_max_over_mean": 1.94,
            "reuse_fraction": 0.22,
            "reuse_chance_fraction": 0.15,
            "affinity_recall_fraction": 0.44,
            "affinity_recall_2k_fraction": 0.65,
        },
    ),
}


@pytest.mark.skipif(not DATA.is_dir(), reason="no recordings beside this checkout")
@pytest.mark.parametrize("name", sorted(KNOWN))
def test_known_figures_of_real_recordings(name: str) -> None:
    quarter, half, figures = KNOWN[name]
    trace = import_trace("npz", DATA / f"{name}.npz")
    assert isinstance(trace, RoutingTrace)
    stats = trace_stats(trace)
    assert (round(stats.lru_hit_at(0.25), 4), round(stats.lru_hit_at(0.5), 4)) == (quarter, half)
    for figure, value in figures.items():
        assert round(getattr(stats, figure), 2) == value, figure


@pytest.mark.skipif(not DATA.is_dir(), reason="no recordings beside this checkout")
def test_known_recall_of_early_guesses() -> None:
    stats = trace_stats(import_trace("npz", DATA / "tiny-moe_16e_top2.npz"))  # type: ignore[arg-type]
    assert stats.guess_recall_fraction is not None
    measured = [[round(cell, 2) for cell in row[1:]] for row in stats.guess_recall_fraction]
    assert measured == [[0.68, 0.78, 0.83], [0.60, 0.70, 0.77], [0.54, 0.64, 0.71]]
    assert [round(stats.active_fraction[batch], 2) for batch in (8, 32, 128)] == [0.63, 0.96, 1.0]
