"""Plans that choose how many tokens to draft: none where it costs, some where it pays; the same plan again; what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from moeplan import plan
from moeplan.api.subject import planned_simulation
from moeplan.base.errors import InputError
from moeplan.planner.emit.targets import render
from moeplan.planner.offload.break_even import _crossing
from moeplan.reports.offload.drafting import drafting_sections

BOX = "rtx-3060 + ryzen-5-3600 + ddr4-3200x2:32GiB"
ASKED: Any = {"prompt_tokens": 16, "reply_tokens": 24, "target": "llama.cpp", "memory": "7GiB"}


def planned(acceptance: str, **more: Any) -> dict[str, Any]:
    found = plan("olmoe-1b-7b", more.pop("hardware", BOX), acceptance=acceptance, **(ASKED | more))
    document: dict[str, Any] = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    return document


@pytest.fixture(scope="module")
def pays() -> dict[str, Any]:
    return planned("1,1,0.9", speculative=True)


def test_drafts_that_are_always_right_pay(pays: dict[str, Any]) -> None:
    drafting = pays["drafting"]
    assert drafting["length"] > 0 and drafting["gain"] > 1.03 and "drafting pays" in drafting["verdict"]
    assert [one["length"] for one in drafting["tried"]] == [0, 1, 2, 3]  # as far as the acceptance is known
    assert drafting["tried"][0]["searched"] and any(one["searched"] for one in drafting["tried"][1:])
    chosen = next(one for one in drafting["tried"] if one["length"] == drafting["length"])
    assert chosen["request_s"] == pays["best"]["request_s"]
    assert drafting["tried"][0]["request_s"] / chosen["request_s"] == pytest.approx(drafting["gain"])
    assert pays["best"]["engine"].startswith("compiled, checked by simpy")


def test_the_surface_rises_with_acceptance_and_its_ends_are_those_of_the_gains(pays: dict[str, Any]) -> None:
    surface = pays["drafting"]["break_even"]
    rates = [level["hit_rate"] for level in surface["levels"]]
    assert rates == sorted(rates) and rates[-1] == 1 and rates[0] < 0.5
    for level in surface["levels"]:
        for gains, least in zip(level["gains"], level["break_even"], strict=True):
            assert (least is None) == (gains[-1] <= 1)
            if least is not None:
                assert np.interp(least, surface["chances"], gains) == pytest.approx(1, abs=1e-6) or least == 0
    assert drafting_sections(pays)[0].id == "drafting"


def test_a_plan_with_drafts_is_simulated_and_emitted_as_planned(pays: dict[str, Any]) -> None:
    simulation = planned_simulation(pays, None)
    length = pays["drafting"]["length"]
    assert simulation.drafting is not None and simulation.drafting.length == length
    emission = render(pays, "llamacpp", simulation.model)
    (name, text), *others = emission.files.items()
    assert name == "llama-server.sh" and not others  # llama-bench drafts nothing
    assert f"--spec-type ngram-simple \\\n  --spec-ngram-simple-size-m {length}\n" in text
    assert any("pay from an acceptance" in fact for fact in emission.facts)


def test_drafts_that_are_never_right_are_left_out() -> None:
    document = planned("0.05", speculative=True, draft_tokens=2)
    assert document["drafting"]["length"] == 0 and "does not pay" in document["drafting"]["verdict"]
    assert "drafting" not in document["provenance"]
    assert [one["length"] for one in document["drafting"]["tried"]] == [0, 1, 2]


def test_a_length_that_was_asked_for_is_planned() -> None:
    roomy = {"hardware": BOX.replace("rtx-3060", "rtx-3090"), "memory": "23GiB"}
    document = planned("0.5", draft_tokens=2, draft="olmoe-1b-7b", **roomy)  # as large as the model itself
    assert document["drafting"]["length"] == 2 and not document["drafting"]["chosen"]
    again = planned_simulation(document, None)
    assert (
        again.drafting is not None and again.drafting.model is not None and again.drafting.model.name == "olmoe-1b-7b"
    )
    items = {item["name"]: item["bytes"] for item in document["best"]["memory_breakdown"]["items"]}
    assert items["draft"] > 0


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"speculative": True}, "--acceptance"),
        ({"speculative": True, "acceptance": 1.2}, r"outside 0\.\.1"),
        ({"speculative": True, "acceptance": 0.5, "draft_tokens": 65}, r"not within 1\.\.64"),
        ({"speculative": True, "acceptance": "0.9,0.5", "draft_tokens": 3}, "known for 2 positions"),
        ({"speculative": True, "acceptance": 0.5, "draft": "mtp"}, "no draft layers"),
        ({"speculative": True, "acceptance": 0.5, "draft": "gpt-oss-20b"}, "words"),
        ({"acceptance": 0.5}, "nothing is drafted"),
        ({"draft": "mtp"}, "nothing is drafted"),
        ({"draft_tokens": 2}, "--acceptance"),
    ],
)
def test_what_does_not_go_together_is_refused(told: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        plan("olmoe-1b-7b", BOX, **ASKED, **told)


def test_where_gains_cross_one() -> None:
    chances = (0.0, 0.5, 1.0)
    assert _crossing(chances, np.array([0.5, 0.8, 1.2])) == pytest.approx(0.75)
    assert _crossing(chances, np.array([1.1, 1.2, 1.3])) == 0.0
    assert _crossing(chances, np.array([0.5, 0.8, 1.0])) is None
