"""Memory card by card: what cards hold adds up to what one card would, and a card that is too small is named with its bytes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long_runs import examples
from moeplan.base.errors import DoesNotFit
from moeplan.specs.card_memory import break_down_cards, require_cards_fit
from moeplan.specs.card_split import by_counts
from moeplan.specs.memory import MemoryNeeds, break_down_memory
from moeplan.specs.models import weight_format
from moeplan.specs.models.load import load_model

MODEL = load_model("gpt-oss-20b")
NEEDS = MemoryNeeds(model=MODEL, expert_format=weight_format("mxfp4"), context_tokens=8192)


@settings(max_examples=examples(15))
@given(st.integers(0, 24), st.lists(st.integers(0, 32), min_size=24, max_size=24))
def test_weights_caches_and_experts_of_all_cards_are_those_of_one(first: int, resident: list[int]) -> None:
    cards = break_down_cards(NEEDS, by_counts((first, 24 - first)), resident, 2)
    whole = break_down_memory(NEEDS, cached_experts=sum(resident), offloaded=False)
    for name in ("embeddings", "dense weights", "kv cache", "resident experts"):
        held = sum(item.num_bytes for card in cards for item in card.items if item.name == name)
        assert held == whole.num_bytes(name)
    assert [card.resident_experts for card in cards] == [sum(resident[:first]), sum(resident[first:])]


def test_the_card_that_is_too_small_is_named_with_its_bytes() -> None:
    cards = break_down_cards(NEEDS, by_counts((12, 12)), [32] * 24, 2)
    budgets = [cards[0].num_bytes, cards[1].num_bytes - 5]
    with pytest.raises(DoesNotFit, match=r"card 1 \(rtx-3060\)") as error:
        require_cards_fit(cards, budgets, ("rtx-3090", "rtx-3060"), "a split")
    assert error.value.missing_bytes == 5
    require_cards_fit(cards, [card.num_bytes for card in cards], ("rtx-3090", "rtx-3060"), "a split")
