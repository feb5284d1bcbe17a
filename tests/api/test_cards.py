"""Several cards in `simulate`: what is asked for, what each card holds, which card is too small, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moeplan import simulate
from moeplan.base.errors import DoesNotFit, InputError, UnknownName
from moeplan.specs.machines.compose import compose_text

BOX = "rtx-3090 + rtx-3060 + ryzen-9-5950x + ddr4-3200x2:64GiB"
TWINS = "2 x rtx-3090 + ryzen-9-7950x + ddr5-6000x2:96GiB"
FEW: Any = {"prompt_tokens": 16, "reply_tokens": 2}


def test_two_unequal_cards_in_both_simulators() -> None:
    found = simulate("gpt-oss-20b", BOX, simulator="both", **FEW)
    cards = found.to_dict()["cards"]
    assert [card["name"] for card in cards] == ["rtx-3090", "rtx-3060"]
    assert sum(card["bytes"] for card in cards) == found.memory.device_bytes
    assert [len(card["layers"]) for card in cards] == [17, 7]
    assert found.to_dict()["simulator"] == "compiled, checked by simpy"
    assert any(note.startswith("cards: layers on cards: 17, 7") for note in found.notes)


def test_experts_that_cards_have_no_room_for_are_on_the_host() -> None:
    found = simulate("gpt-oss-120b", TWINS, memory="24GiB,20GiB", **FEW)
    assert found.schedule.name == "n-cpu-moe"
    for card in found.prediction.cards:
        assert card.budget_bytes is not None and card.num_bytes <= card.budget_bytes
    kept = found.schedule.cache.pooled_experts
    assert kept is not None and sum(card.resident_experts for card in found.prediction.cards) == kept
    more = found.schedule.with_options(cache__pooled_experts=kept + 128)
    with pytest.raises(DoesNotFit, match=r"on card 1 \(rtx-3090\), of which 20.00 GiB may be filled; [0-9]+ bytes"):
        simulate("gpt-oss-120b", TWINS, memory="24GiB,20GiB", schedule=more, **FEW)


def test_a_card_that_cannot_hold_its_share_is_named() -> None:
    with pytest.raises(DoesNotFit, match=r"card 1 \(rtx-3060\)") as error:
        simulate("gpt-oss-20b", BOX, schedule="resident", split="2,22", memory="24GiB,10GiB", **FEW)
    assert error.value.exit_status == 3 and error.value.missing_bytes > 0


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ("20,5", "25 layers in all, the model has 24"),
        ("12,6,6", "3 numbers for 2 cards"),
        ("layer:0,0", "add up to something"),
        ("tensor:1,1", "an equal slice"),
        ("layer:a,b", "not numbers"),
        ("1.5,22.5", "25|24|whole layers"),
    ],
)
def test_splits_that_are_none_are_refused(split: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        simulate("gpt-oss-20b", BOX, split=split, **FEW)


def test_what_belongs_to_other_machines_is_refused() -> None:
    with pytest.raises(InputError, match="has one card"):
        simulate("gpt-oss-20b", "rtx-3090", split="layer", **FEW)
    with pytest.raises(UnknownName, match="did you mean 'layer'"):
        simulate("gpt-oss-20b", BOX, split="layers", **FEW)
    with pytest.raises(InputError, match="3 sizes for 2 cards"):
        simulate("gpt-oss-20b", BOX, memory="8GiB,8GiB,8GiB", **FEW)
    with pytest.raises(InputError, match="one pool for all layers"):
        simulate("gpt-oss-20b", BOX, settings={"cache.policy": "lru", "cache.pooled_experts": "300"}, schedule="on-demand",
                 **FEW)  # fmt: skip


def test_a_tensor_split_over_cards_that_nothing_joins_is_refused() -> None:
    profile = compose_text(TWINS)
    assert profile.links is not None
    apart = dataclasses.replace(profile, links=dataclasses.replace(profile.links, card_bytes_per_s=None))
    with pytest.raises(InputError, match="nothing says what joins the cards") as error:
        simulate("gpt-oss-20b", apart, split="tensor", **FEW)
    assert error.value.exit_status == 2


@pytest.mark.parametrize("engine", ["llama.cpp", "ik_llama.cpp", "ollama"])
@pytest.mark.parametrize("box", ["2x3090 + 7950X + 96GB DDR5-6000", "3090 + 3060 + 7950X + 96GB DDR5-6000"])
def test_a_second_card_helps_where_nothing_is_said_of_the_division(box: str, engine: str) -> None:
    """Experts of the first layers stay with the host: divided by memory alone, the first card would stand empty and help nothing."""
    one = simulate("gpt-oss-120b", "3090 + 7950X + 96GB DDR5-6000", engine=engine, **FEW)
    both = simulate("gpt-oss-120b", box, engine=engine, **FEW)
    speeds = [found.metrics.decode_tokens_per_s for found in (one, both)]
    assert speeds[0] is not None and speeds[1] is not None and speeds[1] > 1.05 * speeds[0]
    if engine != "ollama":  # which leaves whole layers to the cores
        assert all(card.num_bytes > 0.8 * (card.budget_bytes or 0) for card in both.prediction.cards)
        assert any(note.startswith("cards: ") and "--n-cpu-moe" in note for note in both.notes)
        by_memory = simulate("gpt-oss-120b", box, engine=engine, split="layer", **FEW).metrics.decode_tokens_per_s
        assert by_memory is not None and by_memory < speeds[1]


def test_whole_layers_off_are_no_slices() -> None:
    with pytest.raises(InputError, match="divide by layers"):
        simulate("gpt-oss-120b", TWINS, engine="ollama", split="tensor", **FEW)
