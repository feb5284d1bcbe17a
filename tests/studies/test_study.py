"""A study's file: every key is known, every level of its type, every run known by what goes into its answer."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import moeplan
from house import ROOT
from moeplan.base.errors import InputError, UnknownName
from moeplan.studies import keys
from moeplan.studies.fields import OPTIONS, checked_value
from moeplan.studies.keys import Keys
from moeplan.studies.study import open_study

BASE = {"model": "tiny-moe", "hardware": "t4", "trace": "bundled", "window": 6}


def test_the_last_axis_changes_fastest_and_levels_may_set_several_fields() -> None:
    link = {"slow": {"machine.host_to_device.pinned_bytes_per_s": "6GB/s", "engine.layer_s": "1ms"}, "fast": {}}
    machine = {"hardware": "rtx-4090 + ryzen-9-7950x + ddr5-5600x2:96GiB"}
    study = open_study(
        {"base": {"model": "tiny-moe"} | machine, "grid": {"link": link, "memory": ["6GB", "7GB", None]}, "repeats": 2}
    )
    asked = list(study.asked())
    assert (len(asked), study.num_runs) == (12, 12)
    assert asked[0]["seed"] == 0 and asked[1]["seed"] == 1
    assert [one.get("memory") for one in asked[:6:2]] == ["6GB", "7GB", None]
    assert asked[0]["machine.engine.layer_s"] == "1ms"
    assert "machine.engine.layer_s" not in asked[6]
    assert list(study.labels()) == ["link", "memory", "seed"]


def test_a_list_of_cases_is_an_axis_of_combinations() -> None:
    cases = [{"memory": "450MiB", "cache.experts_per_layer": 2}, {"memory": "460MiB"}]
    study = open_study({"base": BASE, "cases": cases})
    assert [one["memory"] for one in study.asked()] == ["450MiB", "460MiB"]
    assert study.labels() == {"case": ["memory=450MiB, cache.experts_per_layer=2", "memory=460MiB"]}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"base": BASE, "gird": {"memory": ["6GB"]}}, "'grid'"),
        ({"base": BASE | {"modle": "tiny-moe"}}, "'model'"),
        ({"base": BASE, "grid": {"cache.polcy": ["lru"]}}, "'cache.policy'"),
        ({"base": BASE, "grid": {"memroy": ["6GB"]}}, "'memory'"),
        ({"base": BASE, "grid": {"machine.host_to_device.pinned_bytes_per": [1]}}, "'machine.host_to_device.pinned_bytes_per_s'"),
        ({"base": BASE, "grid": {"model.topk": [1]}}, "'model.top_k'"),
        ({"base": BASE, "grid": {"request.concurency": [1]}}, "'request.concurrency'"),
        ({"base": BASE, "predict": "simulat"}, "'simulate'"),
        ({"base": BASE, "grid": {"quant": ["Q4_K_M", "Q4KM"]}}, "'Q4_K_M'"),
        ({"base": BASE, "grid": {"schedule": ["mixtral-ofloading"]}}, "'mixtral-offloading'"),
        ({"base": BASE | {"model": "tiny-mo"}, "grid": {"model.top_k": [1]}}, "'tiny-moe'"),
    ],
)  # fmt: skip
def test_a_typo_names_the_nearest_key(content: dict[str, Any], named: str) -> None:
    with pytest.raises(UnknownName, match=f"did you mean {named}"):
        open_study(content)


@pytest.mark.parametrize(
    "content",
    [
        {"base": {"model": "tiny-moe"}},
        {"base": BASE, "grid": {"memory": "6GB"}},
        {"base": BASE, "grid": {"memory": []}},
        {"base": BASE, "grid": {"memory": ["6GB", "6GB"]}},
        {"base": BASE, "grid": {"window": [7]}},
        {"base": BASE | {"window": "six"}},
        {"base": BASE, "grid": {"memory": [[1]]}},
        {"base": BASE, "grid": {"memory": ["6 gigs"]}},
        {"base": BASE, "grid": {"cache.experts_per_layer": ["few"]}},
        {"base": BASE, "grid": {"machine.host_to_device.pinned_bytes_per_s": ["12GB/s", "12 parsecs"]}},
        {"base": BASE, "seeds": [0], "repeats": 1},
        {"base": BASE, "seeds": [-1]},
        {"base": BASE, "repeats": 0},
        {"base": BASE, "cases": []},
        {"base": BASE, "study": ""},
        {"base": BASE, "grid": {f"axis {n}": {str(at): {f"cache.{k}": at} for at in range(1000)} for n, k in
                                enumerate(("experts_per_layer", "pooled_experts", "host_layers"))}},
    ],
)  # fmt: skip
def test_what_is_no_study_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        open_study(content)


def test_files_are_found_beside_the_study(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("prompt_tokens,reply_tokens\n3,4\n")
    (tmp_path / "s.yaml").write_text("base: {model: tiny-moe, hardware: t4, lengths: own.csv}\n")
    study = open_study(tmp_path / "s.yaml")
    (asked,) = study.asked()
    assert asked["lengths"] == str(tmp_path / "own.csv")
    assert study.name == "s"
    before = Keys("simulate").key(asked)
    (tmp_path / "own.csv").write_text("prompt_tokens,reply_tokens\n3,5\n")
    assert Keys("simulate").key(asked) != before, "a run is known by what its files hold"


def test_a_key_holds_everything_that_goes_into_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study({"base": BASE, "grid": {"memory": ["450MiB", "460MiB"], "cache.experts_per_layer": [2, 3]}})
    asked = list(study.asked())
    found = [Keys("simulate").key(one) for one in asked]
    assert len(set(found)) == 4
    assert Keys("simulate").key(dict(reversed(asked[0].items()))) == found[0]
    assert Keys("plan").key(asked[0]) != found[0]
    monkeypatch.setattr(keys, "rules_sha256", lambda: "other sources")
    assert Keys("simulate").key(asked[0]) != found[0]


def test_the_example_is_a_study() -> None:
    study = open_study(ROOT / "examples/studies/pcie_generations.yaml")
    assert study.num_runs == 3 * 8 * 3 * 2
    keys_of = Keys(study.predict)
    assert len({keys_of.key(one) for one in study.asked()}) == study.num_runs


def test_a_study_may_set_every_argument_of_the_functions_it_calls() -> None:
    apart = {"settings", "timeline", "seed", "request", "evaluate_on", "against", "factors", "seconds", "progress"}
    apart |= {"period", "rebalance_every", "count_window", "moves"}  # of many ranks, which studies do not plan
    for name, function in (("simulate", moeplan.simulate), ("plan", moeplan.plan)):
        assert set(inspect.signature(function).parameters) - apart == set(OPTIONS[name])


def test_whether_drafts_are_chosen_is_true_or_false() -> None:
    assert checked_value("speculative", True, "study", ROOT) is True
    with pytest.raises(InputError, match="true or false"):
        checked_value("speculative", 1, "study", ROOT)
