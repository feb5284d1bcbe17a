"""Plans over several cards: no card runs out, a division beats that by memory, what `--fit` does, and plans for no engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from long_runs import LONG
from moeplan import emit, plan
from moeplan.api.subject import open_subject, planned_simulation
from moeplan.base.errors import DoesNotFit, InputError
from moeplan.base.units import GIB
from moeplan.planner.emit.targets import render
from moeplan.planner.offload.plan import OffloadRequest
from moeplan.planner.served.cards import divided, filled_from_the_front
from moeplan.planner.served.llamacpp import FIT_MARGIN_BYTES, setting
from moeplan.sim.offload.simulate import Simulation
from moeplan.specs.card_split import by_counts, by_shares

BOX = "rtx-3090 + rtx-3060 + ryzen-9-5950x + ddr4-3200x2:64GiB"
LAYERS = 24


def simulation(memory: str) -> Simulation:
    return open_subject(model="gpt-oss-20b", hardware=BOX, memory=memory, prompt_tokens=16, reply_tokens=2).simulation


@pytest.mark.parametrize(
    ("memory", "host_layers"), [("24GiB,12GiB", 0), ("8GiB,7GiB", 0), ("5GiB,6GiB", 8), ("3GiB,4GiB", 20)]
)
def test_no_card_runs_out_and_no_other_division_is_faster(memory: str, host_layers: int) -> None:
    one = simulation(memory)
    chosen = setting(one, host_layers, 1, 512)
    split = divided(one, chosen.schedule, chosen.cached_experts)
    times = {}
    for first in range(LAYERS + 1):
        other = by_counts((first, LAYERS - first))
        at = one.divided(other)
        if at.lacking_bytes(chosen.schedule, cached_experts=chosen.cached_experts) <= 0:
            times[other] = int(at.run(at.resolve(chosen.schedule)).step_end[-1])
    assert split in times
    assert times[split] <= 1.002 * min(times.values())
    assert by_shares(LAYERS, split.shares) == split  # what `-ts` makes of it


def test_fit_fills_cards_from_the_front_and_leaves_its_margin() -> None:
    one = simulation("5GiB,7GiB")
    bare = setting(one, LAYERS, 1, 512)
    split, kept = filled_from_the_front(one, bare.schedule, FIT_MARGIN_BYTES)
    whole = setting(one, LAYERS - kept, 1, 512, front=True)
    cards = one.divided(split).card_memory(whole.schedule, cached_experts=kept * 32)
    assert 0 < kept < LAYERS and cards[0].resident_experts == 32 * len(cards[0].layers)
    for card in cards:
        assert card.budget_bytes is not None and card.num_bytes + FIT_MARGIN_BYTES <= card.budget_bytes


def test_a_plan_is_made_shown_and_emitted(tmp_path: Path) -> None:
    found = plan("gpt-oss-20b", BOX, memory="4GiB,6GiB", prompt_tokens=16, reply_tokens=2, target="llama.cpp")
    document = found.to_dict()
    told = document["for"]["setting"]
    for card in document["best"]["cards"]:
        assert card["bytes"] <= card["budget_bytes"] <= 8 * GIB
    assert "checked by simpy" in document["best"]["engine"]
    emit(found, "llamacpp", output=tmp_path / "emitted")
    written = (tmp_path / "emitted" / "llama-server.sh").read_text("utf-8")
    shares = ",".join(f"{share:g}" for share in told["split"]["shares"])
    assert f"--tensor-split {shares}" in written and "--split-mode layer" in written
    assert f"--n-cpu-moe {told['told_layers']}" in written


def test_what_no_search_divides_is_refused() -> None:
    few: Any = {"prompt_tokens": 16, "reply_tokens": 2}
    with pytest.raises(InputError, match="how ktransformers divides a model"):
        plan("gpt-oss-20b", BOX, target="ktransformers", **few)
    for target in ("llama.cpp", None):
        with pytest.raises(DoesNotFit, match="bytes are missing"):
            plan("gpt-oss-20b", BOX, memory="1GiB,1GiB", target=target, **few)


@pytest.mark.parametrize(
    ("model", "memory"), [("tiny-moe", "544MiB,543MiB"), *([("olmoe-1b-7b", "5GiB,4GiB")] if LONG else [])]
)
def test_a_plan_for_no_engine_divides_a_model_over_cards_too(model: str, memory: str) -> None:
    told: Any = {"prompt_tokens": 4, "reply_tokens": 4, "memory": memory}
    box = "2 x rtx-3060 + ryzen-9-5950x + ddr4-3200x2:64GiB"
    asked = OffloadRequest(objective="request_s", prefill_chunk_tokens=512)
    general = plan(model, box, request=asked, **told)
    served = plan(model, box, target="llama.cpp", request=asked, **told)
    assert (general.best.metrics.request_s or 0) <= (served.best.metrics.request_s or 0)
    assert general.best.engine.startswith("compiled, checked by simpy")
    document = json.loads(json.dumps(general.to_dict(), allow_nan=False))
    again = planned_simulation(document, None)
    assert sum(len(card["layers"]) for card in document["best"]["cards"]) == again.model.num_layers
    assert all(card["bytes"] <= card["budget_bytes"] for card in document["best"]["cards"])
    assert again.split == general.simulation.split and again.budgets == general.simulation.budgets
    flags = render(document, "llamacpp", again.model).files["flags.txt"]
    assert "--split-mode layer\n--tensor-split " in flags
