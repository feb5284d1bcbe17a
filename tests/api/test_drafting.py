"""Drafting in `simulate`: tokens add up, both simulators agree, it pays where experts are there and costs where they are fetched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moeplan import simulate
from moeplan.base.errors import InputError

BOX = "rtx-3090 + ryzen-5-3600 + ddr4-3200x2:32GiB"
ASKED: Any = {"prompt_tokens": 8, "reply_tokens": 24}
CACHE = {"cache.experts_per_layer": "9"}


def test_every_token_of_a_reply_comes_out_once() -> None:
    for acceptance, length in (("1", 3), ("0", 2), ("0.6,0.3", 2)):
        found = simulate(
            "olmoe-1b-7b",
            BOX,
            draft_tokens=length,
            acceptance=acceptance,
            schedule="resident",
            simulator="both",
            **ASKED,
        )
        workload = found.subject.simulation.workload(found.schedule)
        decode = workload.step_phase == 1
        assert int(workload.yields[decode].sum()) == ASKED["reply_tokens"]
        assert np.all(workload.step_tokens[decode] == length + 1)
        assert found.to_dict()["simulator"] == "compiled, checked by simpy"
        assert int(workload.requests[0, 1]) == workload.num_steps - 1
    steps = simulate("olmoe-1b-7b", BOX, draft_tokens=3, acceptance=1, schedule="resident", **ASKED).metrics.num_steps
    assert steps == 1 + ASKED["reply_tokens"] // 4


def test_it_pays_where_experts_are_there_and_costs_where_they_are_fetched_in_vain() -> None:
    there, away = ({"schedule": "resident"}, {"schedule": "mixtral-offloading-code", "settings": CACHE})
    gains = {}
    for name, how in (("there", there), ("away", away)):
        plain = simulate("olmoe-1b-7b", BOX, **how, **ASKED).metrics.decode_tokens_per_s
        for acceptance in (0.0, 0.5, 1.0):
            drafted = simulate("olmoe-1b-7b", BOX, draft_tokens=3, acceptance=acceptance, **how, **ASKED).metrics
            assert plain is not None and drafted.decode_tokens_per_s is not None
            gains[name, acceptance] = drafted.decode_tokens_per_s / plain
    assert gains["there", 1.0] > 1 > gains["there", 0.0]
    for acceptance in (0.5, 1.0):
        assert gains["away", acceptance] < gains["there", acceptance]
    assert gains["away", 0.5] < 1


def test_what_drafts_costs_time_and_memory() -> None:
    told: Any = {"draft_tokens": 2, "acceptance": 0.7, "schedule": "resident"} | ASKED
    free = simulate("olmoe-1b-7b", BOX, draft="n-gram", **told)
    layer = simulate("olmoe-1b-7b", BOX, draft="mtp", **told)
    assert (layer.metrics.decode_tokens_per_s or 0) < (free.metrics.decode_tokens_per_s or 0)
    assert free.memory.num_bytes("draft") == 0 < layer.memory.num_bytes("draft")
    assert layer.to_dict()["drafting"]["draft"] == "mtp"


def test_several_requests_draft_together() -> None:
    told: Any = {"schedule": "resident", "concurrency": 3, "simulator": "both"} | ASKED
    plain = simulate("olmoe-1b-7b", BOX, **told)
    drafted = simulate("olmoe-1b-7b", BOX, draft_tokens=2, acceptance=1, **told)
    assert drafted.to_dict()["simulator"] == "compiled, checked by simpy"
    assert drafted.metrics.num_steps < plain.metrics.num_steps
    assert (drafted.metrics.decode_tokens_per_s or 0) > (plain.metrics.decode_tokens_per_s or 0)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"draft_tokens": 2}, "--acceptance"),
        ({"acceptance": 0.5}, "nothing is drafted"),
        ({"draft_tokens": 2, "acceptance": 1.5}, r"outside 0\.\.1"),
        ({"draft_tokens": 3, "acceptance": "0.9,0.5"}, "known for 2 positions"),
        ({"draft_tokens": 65, "acceptance": 0.5}, r"not within 0\.\.64"),
        ({"draft_tokens": 2, "acceptance": 0.5, "draft": "gpt-oss-20b"}, "words"),
    ],
)
def test_what_does_not_go_together_is_refused(told: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        simulate("olmoe-1b-7b", BOX, **told, **ASKED)
