"""What each decision is worth: parts that add up, doubts from which shared errors cancel, and plans for engines."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest

from moeplan.base.errors import DoesNotFit, InputError, UnknownName
from moeplan.planner.emit.runs import runs_of
from moeplan.planner.emit.targets import render
from moeplan.planner.parallel.case import Ask, ParallelRequest, redundant_counts
from moeplan.planner.parallel.difference import COSTS, NOTHING, PAYS, UNDECIDED, Gain, gain
from moeplan.planner.parallel.plan import ParallelPlan, make_ep_plan
from moeplan.specs.machines.profile_file import load_hardware
from moeplan.specs.models.load import load_model
from moeplan.traces.recording import LoadProfile
from strategies import make_trace

MODEL = dataclasses.replace(load_model("deepseek-v2-lite"), num_layers=3, moe_layers=(1, 2), num_experts=16, top_k=3)
HARDWARE = load_hardware("h800-sxm")
REQUEST = ParallelRequest(
    num_nodes=2, ranks_per_node=2, num_redundant=4, context_tokens=400, tokens_per_rank=64, search_moves=500
)
NAMES = ("placement", "replicas", "all-to-all", "overlap")


def counts(skew: float = 0.2) -> LoadProfile:
    load = np.round(1000 * np.exp(-skew * np.arange(16))).astype(np.int64)
    return LoadProfile(
        counts=np.stack([load, load[::-1]]), model="", layer_ids=(1, 2), source="made up", licence="", top_k=3
    )


def tokens():  # type: ignore[no-untyped-def]
    trace = make_trace(
        np.random.default_rng(1), num_layers=2, num_experts=16, top_k=3, requests=[(0, 60)] * 40, skew=0.15
    )
    return dataclasses.replace(trace, layer_ids=(1, 2))


def planned(ask: Ask | None = None, recording=None, **changes) -> ParallelPlan:  # type: ignore[no-untyped-def]
    return make_ep_plan(MODEL, HARDWARE, recording or counts(), dataclasses.replace(REQUEST, **changes), ask=ask)


ASKED = {"placement": "eplb", "replicas": "4", "all-to-all": "all-choices", "overlap": "two-batch"}


@pytest.mark.parametrize("recording", [counts(), tokens()], ids=["counts", "tokens"])
def test_shares_and_interaction_add_up_to_the_whole(recording) -> None:  # type: ignore[no-untyped-def]
    table = planned(Ask(factors=ASKED), recording).factors
    steps = {frozenset(on): one.step_s for on, one, _ in table.combinations}
    names = [row.name for row in table.rows]
    assert set(NAMES) <= set(names) and len(steps) == 2 ** len(names)
    whole = steps[frozenset()] - steps[frozenset(names)]
    assert table.whole.saved_s == pytest.approx(whole, rel=1e-12)
    assert sum(row.share.saved_s for row in table.rows) == pytest.approx(whole, rel=1e-9, abs=1e-15)
    alone = sum(row.alone.saved_s for row in table.rows)
    assert alone + table.interaction.saved_s == pytest.approx(whole, rel=1e-9, abs=1e-15)
    # The share is what a decision saves on average over all orders of making them.
    for row in table.rows:
        saved = []
        for order in itertools.permutations(names):
            before = frozenset(order[: order.index(row.name)])
            saved.append(steps[before] - steps[before | {row.name}])
        assert row.share.saved_s == pytest.approx(np.mean(saved), rel=1e-9, abs=1e-15)
        assert row.alone.saved_s == pytest.approx(steps[frozenset()] - steps[frozenset({row.name})])
    json.dumps(table.to_dict(), allow_nan=False)


def test_no_combination_of_the_searched_decisions_beats_the_plan() -> None:
    found = planned()
    assert found.best.step_s <= min(one.step_s for _, one, _ in found.factors.combinations) * (1 + 1e-9)


def test_a_schedule_beside_itself_leaves_no_doubt_and_shared_errors_cancel() -> None:
    found = planned(Ask(factors=ASKED))
    one = {frozenset(on): each for on, each, _ in found.factors.combinations}
    base, moved = one[frozenset()], one[frozenset({"placement"})]
    wrong = found.search.simulation.uncertainties()
    same = gain([(1, base), (-1, base)], wrong, of_s=base.step_s, exact=False)
    assert (same.saved_s, same.uncertainty_s, same.verdict) == (0.0, 0.0, NOTHING)
    between = gain([(1, base), (-1, moved)], wrong, of_s=base.step_s, exact=False)
    apart = np.hypot(base.step_s * base.relative_uncertainty, moved.step_s * moved.relative_uncertainty)
    assert 0 < between.uncertainty_s < apart / 2
    # Twice as wrong: twice the doubt, but for what nothing in common explains.
    doubled = gain(
        [(1, base), (-1, moved)], {key: 2 * each for key, each in wrong.items()}, of_s=base.step_s, exact=False
    )
    assert between.uncertainty_s < doubled.uncertainty_s <= 2 * between.uncertainty_s


@pytest.mark.parametrize(("saved", "doubt", "verdict"), [
    (0.1, 0.05, PAYS), (-0.1, 0.05, COSTS), (0.1, 0.11, UNDECIDED), (0.004, 0.005, NOTHING), (0.0, 0.2, UNDECIDED),
])  # fmt: skip
def test_a_gain_within_its_doubt_is_undecided(saved: float, doubt: float, verdict: str) -> None:
    assert Gain(saved_s=saved, uncertainty_s=doubt, of_s=1.0).verdict == verdict


def test_the_number_of_copies_is_searched() -> None:
    assert redundant_counts(dataclasses.replace(REQUEST, num_redundant=None), 16) == (4, 8, 16)
    assert redundant_counts(REQUEST, 16) == (4,)
    found = planned(num_redundant=None)
    tried = {each.placement.num_redundant for each in (found.best.schedule, found.headline.rival.schedule)}
    assert tried <= {0, 4, 8, 16} and found.request.num_redundant in (4, 8, 16)


def test_the_headline_is_against_what_engines_ship_or_what_is_named() -> None:
    usual = planned().headline
    assert usual.rival.schedule.placement.policy.startswith("eplb") and "engines ship" in usual.why
    assert usual.rival.schedule.all_to_all.kind == "all-choices"  # low-latency kernels, in decode
    named = planned(Ask(against="tbo")).headline
    assert named.rival.schedule.name == "tbo" and named.why == "tbo"
    low, high = named.interval
    assert low <= named.ratio <= high
    with pytest.raises(UnknownName, match="against"):
        planned(Ask(against="nothing"))
    with pytest.raises(InputError, match="single tokens"):
        planned(Ask(against="grace"))


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_for_an_engine_the_figure_is_that_of_what_is_emitted(engine: str) -> None:
    found = planned(Ask(target=engine, runs=runs_of(engine, MODEL, decode=True)))
    emission = render(found.to_dict(), engine, MODEL)
    runs = emission.runs
    assert runs is not None
    assert runs.with_options(name="best") == found.best.schedule
    assert found.headline.why.startswith(engine)


@pytest.mark.parametrize(("factors", "said"), [
    ({"nonsense": "1"}, "not one of"), ({"placement": "nonsense"}, "not one of"), ({"replicas": "many"}, "count"),
    ({"overlap": "often"}, "two-batch"), ({"replicas": "3"}, "do not divide"),
])  # fmt: skip
def test_levels_that_there_are_not_are_refused(factors: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        planned(Ask(factors=factors))


def test_time_that_is_up_leaves_candidates_out_and_says_so() -> None:
    found = planned(Ask(seconds=1e-9))
    assert found.search.trials.tally.num_skipped > 0 and found.num_candidates >= 1


def test_an_engine_that_picks_its_own_exchange_is_refused() -> None:
    with pytest.raises(InputError, match="its own all-to-all"):
        planned(Ask(target="trtllm", runs=runs_of("trtllm", MODEL, decode=True)))


# A family for which TensorRT-LLM takes a placement.
KNOWN = dataclasses.replace(load_model("deepseek-v3"), num_layers=3, moe_layers=(1, 2), num_experts=16, top_k=3)


def of_engine(engine: str, **asked: object) -> ParallelPlan:
    ask = Ask(target=engine, runs=runs_of(engine, KNOWN, decode=True), **asked)  # type: ignore[arg-type]
    return make_ep_plan(KNOWN, HARDWARE, counts(), REQUEST, ask=ask)


def test_what_an_engine_decides_itself_is_no_row_of_the_table() -> None:
    found = of_engine("trtllm")
    assert found.factors.fixed == {"all-to-all": "all-choices", "overlap": "no overlap"}
    assert [row.name for row in found.factors.rows] == ["placement", "replicas"]
    assert sum(row.share.saved_s for row in found.factors.rows) == pytest.approx(found.factors.whole.saved_s)
    emission = render(found.to_dict(), "trtllm", KNOWN)
    assert emission.runs is not None and emission.runs.with_options(name="best") == found.best.schedule
    assert "FORCE_COMM_METHOD=DEEPEPLOWLATENCY" in emission.files["trtllm.env"]


@pytest.mark.parametrize(("engine", "asked", "said"), [
    ("sglang", {"against": "comet"}, "sglang cannot be told it"),
    ("trtllm", {"against": "tbo"}, "trtllm cannot be told it"),
    ("sglang", {"factors": {"all-to-all": "hierarchical"}}, "sglang runs all-choices instead"),
    ("sglang", {"factors": {"overlap": "expert-2"}}, "sglang runs no overlap instead"),
    ("trtllm", {"factors": {"overlap": "two-batch"}}, "trtllm runs no overlap instead"),
])  # fmt: skip
def test_what_the_engine_cannot_run_is_refused_by_name(engine: str, asked: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        of_engine(engine, **asked)


def test_what_does_not_fit_says_by_how_many_bytes_and_how_many_tokens_would() -> None:
    with pytest.raises(
        DoesNotFit, match=r"\(at most ([\d,]+) tokens a rank fit: --tokens-per-rank \1, .*\); \d+ bytes are missing"
    ):
        make_ep_plan(
            KNOWN, HARDWARE, counts(), dataclasses.replace(REQUEST, tokens_per_rank=2**20, context_tokens=2**20)
        )
    with pytest.raises(DoesNotFit, match="not even one token a rank fits"):
        make_ep_plan(KNOWN, HARDWARE, counts(), dataclasses.replace(REQUEST, memory_bytes=10**8))
