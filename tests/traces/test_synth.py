"""Synthetic recordings: dials do what they say, one seed gives one file, and a fit comes close."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.base.errors import InputError, UnknownName
from moeplan.traces.domains import decode_domains
from moeplan.traces.format import RoutingTrace, load_trace
from moeplan.traces.readers import import_trace
from moeplan.traces.stats import trace_stats
from moeplan.traces.synthesis.closeness import LRU_SHARES, closeness
from moeplan.traces.synthesis.counter_random import shuffled, uniforms
from moeplan.traces.synthesis.dial import Dials, change_dials, dials_as_json, dials_from_json
from moeplan.traces.synthesis.fit import fit_like
from moeplan.traces.synthesis.kernel import alias_table
from moeplan.traces.synthesis.presets import PRESETS, preset
from moeplan.traces.synthesis.synthesise import RequestPlan, plan_requests, synth_trace, synthesise

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"
LONG = os.environ.get("MOEPLAN_LONG") == "1"
SMALL: dict[str, Any] = {"num_layers": 4, "num_experts": 16, "top_k": 2, "prompt_tokens": (20,), "decode_tokens": (30,)}
PLAIN = {"skew": 0.0, "request_shift": 0.0, "reuse_short": 0.0, "reuse_long": 0.0, "affinity": 0.0}


def sets_of(trace: RoutingTrace) -> np.ndarray:
    """Return the chosen experts of each token and layer in ascending order."""
    return np.sort(trace.experts, axis=2)


def splitmix(key: int) -> int:
    """Return the mixer's output, in Python's own integers."""
    mask = (1 << 64) - 1
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 & mask
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB & mask
    return key ^ (key >> 31)


def test_random_numbers_are_a_function_of_their_counter() -> None:
    mask, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15
    key = splitmix((splitmix((7 + golden) & mask) + 3 * 0x94D049BB133111EB) & mask)
    expected = [(splitmix((key + i * golden) & mask) >> 11) / 2**53 for i in range(10)]
    assert uniforms(7, 3, 0, 10).tolist() == expected
    assert uniforms(7, 3, 4, 2).tolist() == expected[4:6]
    many = uniforms(1, 1, 0, 100_000)
    assert many.min() >= 0 and many.max() < 1
    assert abs(many.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 100_000)
    assert np.corrcoef(many[1:], many[:-1])[0, 1] < 0.02
    assert sorted(shuffled(5, 2, 50)) == list(range(50)) and shuffled(5, 2, 50).tolist() != shuffled(5, 3, 50).tolist()


@settings(max_examples=examples(200), deadline=None)
@given(weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=40).filter(lambda w: sum(w) > 1e-3))
def test_alias_tables_hold_the_distribution(weights: list[float]) -> None:
    weight = np.array(weights)
    keep, other = np.empty(len(weight)), np.empty(len(weight), np.int64)
    alias_table(weight, keep, other)
    drawn = keep.copy()
    np.add.at(drawn, other, 1.0 - keep)
    assert np.allclose(drawn / len(weight), weight / weight.sum(), atol=1e-9)
    assert ((keep >= -1e-9) & (keep <= 1 + 1e-9)).all()


def test_one_seed_gives_one_file_however_it_is_chunked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dials = Dials(**SMALL, num_domains=3, requests_per_domain=2, guess_recall=((0.4, 0.6), (0.3, 0.5)))
    synthesise(dials, tmp_path / "a", num_tokens=5000, seed=3, model="m")
    synthesise(dials, tmp_path / "b", num_tokens=5000, seed=3, model="m")
    monkeypatch.setattr("moeplan.traces.synthesis.synthesise._CHUNK_BYTES", 1)  # 256 rows at a time
    shares: list[float] = []
    synthesise(dials, tmp_path / "c", num_tokens=5000, seed=3, model="m", progress=shares.append)
    synthesise(dials, tmp_path / "d", num_tokens=5000, seed=4, model="m")
    assert len(shares) == 20 and shares[-1] == 1.0
    files = {name: (tmp_path / name).read_bytes() for name in "abcd"}
    assert files["a"] == files["b"] == files["c"] != files["d"]
    trace, memory = load_trace(tmp_path / "a"), synth_trace(dials, num_tokens=5000, seed=3, model="m")
    assert np.array_equal(trace.experts, memory.experts) and np.array_equal(trace.predicted, memory.predicted)
    assert trace.source.endswith("seed 3") and dials_from_json(json.loads(trace.metadata["synthetic.dials"])) == dials


def test_lengths_phases_and_domains_follow_the_dials() -> None:
    dials = Dials(
        **{**SMALL, "prompt_tokens": (0, 10, 10), "decode_tokens": (5,)}, num_domains=2, requests_per_domain=3
    )
    trace = synth_trace(dials, num_requests=400, seed=1)
    starts = np.flatnonzero(np.diff(trace.request, prepend=-1))
    totals = np.diff(np.append(starts, trace.num_tokens))
    prompts = np.add.reduceat((trace.phase == 0).astype(int), starts)
    assert len(starts) == 400 and set((totals - prompts).tolist()) == {5}
    assert prompts.min() == 0 and prompts.max() == 10
    assert abs((prompts == 10).mean() - 0.525) < 5 * 0.025  # half, and what rounds up to 10
    names, domain = decode_domains(trace.metadata, np.arange(7, dtype=np.int32))
    assert names == ["domain 0", "domain 1"] and domain.tolist() == [0, 0, 0, 1, 1, 1, 0]
    # As many whole requests as reach a length: the last one decodes to its end like the others.
    long = synth_trace(dials, num_tokens=1234)
    assert 1234 <= long.num_tokens < 1234 + 15 and (long.phase[-5:] == 1).all()
    plan = plan_requests(dials, num_tokens=1)
    assert (plan.total - plan.prompt).tolist() == [5]


@pytest.mark.parametrize(
    "repeat", [{"reuse_short": 1.0, "short_span": 1.0}, {"reuse_short": 1.0, "short_span": 5.0}, {"reuse_long": 1.0}]
)
def test_certain_repetition_repeats_the_first_token_for_ever(repeat: dict[str, float]) -> None:
    trace = synth_trace(Dials(**{**SMALL, **PLAIN, **repeat}), num_requests=20)
    first = np.flatnonzero(np.diff(trace.request, prepend=-1))
    assert np.array_equal(sets_of(trace), sets_of(trace)[first][trace.request])
    assert len({row.tobytes() for row in sets_of(trace)[first, 0]}) > 10  # requests differ


def test_certain_affinity_maps_each_expert_to_one_of_the_next_layer() -> None:
    trace = synth_trace(Dials(**{**SMALL, **PLAIN, "affinity": 1.0, "affinity_spread": 0.0}), num_requests=40)
    stats = trace_stats(trace)
    assert stats.affinity_recall_fraction == 1.0 and stats.affinity_partner_fraction == 1.0
    partner = {}
    for here, there in zip(trace.experts[:, 0], trace.experts[:, 1], strict=True):
        for a, b in zip(here, there, strict=True):
            assert partner.setdefault(int(a), int(b)) == int(b)
    assert len(set(partner.values())) == 16


def test_without_any_structure_choices_are_even_and_independent() -> None:
    trace = synth_trace(Dials(**{**SMALL, **PLAIN}), num_tokens=20_000)
    stats = trace_stats(trace)
    chosen = 20_000 * 4 * 2
    spread = 5 * math.sqrt(0.125 * 0.875 / chosen)  # five standard deviations of a share of independent choices
    assert stats.reuse_fraction is not None and abs(stats.reuse_fraction - 2 / 16) < spread
    assert all(abs(share - 2 / 16) < 1.2 * spread for share in stats.overlap_fraction.values())
    assert stats.load_max_over_mean < 1.1 and stats.load_gini < 0.03
    assert abs(stats.affinity_recall_fraction - 2 / 16) < 0.03  # type: ignore[operator]


def test_popularity_sets_the_loads() -> None:
    weights = tuple(float(2**-i) for i in range(8))
    dials = Dials(num_layers=3, num_experts=8, top_k=1, **{**PLAIN, "popularity": weights})
    trace = synth_trace(dials, num_tokens=60_000)
    for layer in range(3):
        share = np.sort(np.bincount(trace.experts[:, layer, 0], minlength=8))[::-1] / 60_000
        assert np.allclose(share, np.array(weights) / sum(weights), atol=0.01)
    assert len({trace.experts[:, layer, 0].tobytes() for layer in range(3)}) == 3  # every layer orders its experts anew


def test_each_dial_moves_its_figure() -> None:
    base = Dials(**SMALL, num_domains=2, domain_share=0.5)
    figures = {}
    for name, change in {
        "base": {}, "skew": {"skew": 1.5}, "short": {"reuse_short": 0.6}, "long": {"reuse_long": 0.7, "long_decay": 0.2},
        "shift": {"request_shift": 2.0}, "affinity": {"affinity": 1.0}, "even": {"layer_reuse": (0.0, 2.0)},
    }.items():  # fmt: skip
        figures[name] = trace_stats(synth_trace(dataclasses.replace(base, **change), num_tokens=8000))
    plain = figures["base"]
    assert figures["skew"].load_gini > plain.load_gini + 0.1
    assert figures["short"].overlap_fraction[1] > plain.overlap_fraction[1] + 0.15
    assert figures["long"].overlap_fraction[16] > plain.overlap_fraction[16] + 0.1
    assert figures["shift"].overlap_fraction[32] > plain.overlap_fraction[32] + 0.1
    assert figures["shift"].load_gini < 0.6
    assert figures["affinity"].affinity_recall_fraction > plain.affinity_recall_fraction + 0.1  # type: ignore[operator]
    by_layer = figures["even"].reuse_fraction_by_layer
    assert by_layer is not None and by_layer[3] > by_layer[0] + 0.1


def test_guesses_are_right_as_often_as_asked() -> None:
    recall = ((0.42, 0.68, 0.78, 0.83), (0.2, 0.4, 0.6, 0.8), (0.0, 0.0, 0.5, 0.5))
    trace = synth_trace(Dials(**SMALL, guess_recall=recall), num_tokens=20_000)
    measured = trace_stats(trace).guess_recall_fraction
    assert measured is not None and np.allclose(measured, recall, atol=0.006)
    assert trace.predicted is not None and trace.predicted_prob is not None
    assert (trace.predicted[:, 0] == -1).all() and (trace.predicted[:, 1, 1:] == -1).all()
    assert (trace.predicted[:, 3] >= 0).all()
    assert np.allclose(trace.predicted_prob[0, 3, 0], [0.84, 0.52, 0.2, 0.1], atol=1e-3)
    everything = synth_trace(Dials(**SMALL, guess_recall=((0.5, 1.0),)), num_tokens=500)
    assert everything.predicted is not None
    assert np.array_equal(np.sort(everything.predicted[:, 1:, 0], axis=2), sets_of(everything)[:, 1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 17}, "top_k = 17"),
        ({"num_layers": 0}, "num_layers = 0"),
        ({"reuse_short": 1.5}, "reuse_short = 1.5: must be 0 to 1"),
        ({"reuse_short": 0.6, "reuse_long": 0.6}, "reuse_short . reuse_long = 1.2"),
        ({"short_span": 0.5}, "short_span = 0.5: must be 1 to 4096"),
        ({"skew": math.nan}, "skew"),
        ({"affinity": "high"}, "affinity = 'high': is not of the kind"),
        ({"num_domains": 1.5}, "num_domains = 1.5"),
        ({"layer_reuse": (3.0,)}, "layer_reuse"),
        ({"layer_ids": (1, 2, 2, 3)}, "layer_ids"),
        ({"popularity": (1.0, 2.0)}, "popularity = .*must be 16 numbers"),
        ({"prompt_tokens": (5, 3)}, "prompt_tokens"),
        ({"prompt_tokens": (0,), "decode_tokens": (0,)}, "at least one token"),
        ({"guess_recall": [[0.9]]}, r"guess_recall\[0\] = .*1/top_k"),
        ({"guess_recall": [[0.5, 0.4]]}, "must not fall"),
        ({"guess_recall": [[0.1] * 15]}, "at most num_experts − top_k"),
        ({"guess_recall": [[0.1], [0.1, 0.2]]}, "equally wide"),
        ({"reuse_shrt": 1}, "did you mean 'reuse_short'"),
    ],
)
def test_wrong_dials_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        change_dials(Dials(**SMALL), changes)


def test_dials_change_by_name_and_travel_as_json() -> None:
    dials = change_dials(Dials(**SMALL), {"affinity": "0.25", "prompt_tokens": "[1, 2]", "decode_tokens": 7, "skew": 1})
    assert (dials.affinity, dials.prompt_tokens, dials.decode_tokens, dials.skew) == (0.25, (1, 2), (7,), 1.0)
    weighted = dataclasses.replace(dials, popularity=tuple(float(i + 1) for i in range(16)))
    assert change_dials(weighted, {"skew": "0.5"}).popularity == ()  # a skew set by hand is not overruled
    assert dials_from_json(json.loads(json.dumps(dials_as_json(weighted)))) == weighted
    with pytest.raises(InputError, match="num_layers"):
        dials_from_json({"num_experts": 2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of num_tokens and num_requests"),
        ({"num_tokens": 5, "num_requests": 5}, "exactly one"),
        ({"num_tokens": 0}, "num_tokens = 0: must be 1"),
        ({"num_requests": -1}, "num_requests = -1"),
        ({"num_tokens": 5, "seed": -1}, "seed = -1"),
    ],
)
def test_wrong_lengths_and_seeds_write_nothing(arguments: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        synthesise(Dials(**SMALL), tmp_path / "t", **arguments)
    assert os.listdir(tmp_path) == []


def test_corner_shapes_work() -> None:
    for shape in ({"num_layers": 1, "num_experts": 1, "top_k": 1}, {"num_layers": 2, "num_experts": 3, "top_k": 3}):
        trace = synth_trace(Dials(**{**SMALL, **shape}), num_tokens=100)
        assert (sets_of(trace) == np.arange(shape["top_k"])).all()
    wide = synth_trace(Dials(num_layers=1, num_experts=300, top_k=4), num_tokens=300)
    assert wide.experts.dtype == np.uint16 and int(wide.experts.max()) > 255


def test_the_mixtral_preset_repeats_as_its_paper_says() -> None:
    trace = synth_trace(preset("mixtral-8x7b"), num_tokens=40_000)
    together = trace.request[1:] == trace.request[:-1]
    common = (trace.experts[1:, :, :, None] == trace.experts[:-1, :, None, :]).any(axis=(2, 3))[together].mean(axis=0)
    assert 0.45 <= common[0] <= 0.50 and 0.62 <= common[15] <= 0.67 and 0.45 <= common[31] <= 0.54
    stats = trace_stats(trace)
    assert 1.1 <= stats.load_max_over_mean <= 1.3
    assert stats.guess_recall_fraction is not None and abs(stats.guess_recall_fraction[0][1] - 0.8) < 0.01


def test_the_deepseek_r1_preset_has_its_published_skew() -> None:
    dials = preset("deepseek-r1")
    assert (dials.num_layers, dials.num_experts, dials.top_k, dials.layer_ids[:2]) == (58, 256, 8, (3, 4))
    few = dataclasses.replace(dials, num_layers=4, layer_ids=())
    assert 5.6 <= trace_stats(synth_trace(few, num_tokens=60_000)).load_max_over_mean <= 8.1
    with pytest.raises(UnknownName, match="did you mean 'deepseek-r1'"):
        preset("deepseek-r2")
    assert sorted(PRESETS) == ["deepseek-r1", "deepseek-v2-lite", "gpt-oss-20b", "mixtral-8x7b"]


@pytest.mark.parametrize(
    ("name", "recording"), [("gpt-oss-20b", "gpt-oss-20b_decode"), ("deepseek-v2-lite", "deepseek-v2-lite_prefill")]
)
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the recordings beside this checkout")
def test_fitted_presets_have_the_locality_of_their_recordings(name: str, recording: str) -> None:
    original = import_trace("npz", DATA / f"{recording}.npz")
    assert isinstance(original, RoutingTrace)
    dials = preset(name)
    shape = (dials.num_layers, dials.top_k, dials.num_experts, dials.layer_ids or tuple(range(dials.num_layers)))
    assert shape == (original.num_layers, original.top_k, original.num_experts, original.layer_ids)
    starts = np.flatnonzero(np.diff(original.request, prepend=-1))
    totals = np.diff(np.append(starts, original.num_tokens))
    plan = RequestPlan(prompt=totals, total=totals, domain=np.zeros(len(totals), np.int64))
    result = closeness(original, synth_trace(dials, plan=plan))  # with the recording's own lengths
    assert result.worst_lru_difference < 0.03


def test_a_fit_to_a_synthetic_recording_comes_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeplan.traces.synthesis.fit._ROUNDS", 2)
    dials = Dials(
        num_layers=3, num_experts=12, top_k=2, skew=0.6, request_shift=0.9, domain_share=0.7, num_domains=3,
        requests_per_domain=4, reuse_short=0.15, short_span=1.4, reuse_long=0.25, long_decay=0.8, affinity=0.7,
        prompt_tokens=(40, 80), decode_tokens=(50, 90), guess_recall=((0.4, 0.7),), layer_ids=(1, 3, 5),
    )  # fmt: skip
    synthesise(dials, tmp_path / "t", num_tokens=5000, seed=9)
    original = load_trace(tmp_path / "t")
    shares: list[float] = []
    fitted = fit_like(original, progress=shares.append)
    assert shares == [0.0, 0.5]
    assert (fitted.num_domains, fitted.requests_per_domain, fitted.layer_ids) == (3, 4, (1, 3, 5))
    assert fitted == fit_like(original)
    result = closeness(original, synth_trace(fitted, num_tokens=5000, seed=1))
    assert result.worst_lru_difference < 0.03
    by_name = {row.name: row for row in result.figures}
    for name, most in {
        "load_gini": 0.04, "reuse_chance_fraction": 0.02, "overlap_fraction at 1 tokens": 0.03,
        "overlap_fraction at 64 tokens": 0.03, "affinity_recall_fraction": 0.06,
        "guess_recall_fraction at distance 1, width 2": 0.03,
    }.items():  # fmt: skip
        difference = by_name[name].difference
        assert difference is not None and abs(difference) < most, name
    document = json.loads(json.dumps(result.as_json()))
    assert document["lru_hit_fractions"][0]["name"] == "lru_hit_fraction at 12.5% of the experts"
    assert len(document["lru_hit_fractions"]) == len(LRU_SHARES) == 5


def test_a_fit_to_almost_nothing_still_works() -> None:
    tiny = synth_trace(
        Dials(num_layers=1, num_experts=4, top_k=2, prompt_tokens=(1,), decode_tokens=(0,)), num_tokens=1
    )
    fitted = fit_like(tiny)
    assert (fitted.prompt_tokens, fitted.decode_tokens, fitted.guess_recall) == ((1,), (0,), ())
    assert synth_trace(fitted, num_tokens=10).num_tokens == 10


@pytest.mark.skipif(not (LONG and DATA.is_dir()), reason="minutes long, and needs the recordings beside this checkout")
@pytest.mark.parametrize("name", ["gpt-oss-20b_decode", "deepseek-v2-lite_prefill", "tiny-moe_16e_top2"])
def test_synthetic_recordings_come_within_three_points_of_real_ones(name: str) -> None:
    original = import_trace("npz", DATA / f"{name}.npz")
    assert isinstance(original, RoutingTrace)
    dials = fit_like(original)
    for seed in range(4):
        result = closeness(original, synth_trace(dials, num_tokens=original.num_tokens, seed=seed))
        assert result.worst_lru_difference < 0.03, seed
