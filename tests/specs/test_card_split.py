"""How layers lie on cards: llama.cpp's rule on small cases, every layer on one card, and what is refused."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.base.errors import InputError, UnknownName
from moeplan.specs.card_split import CardSplit, by_counts, by_shares, tensor_split
from moeplan.specs.machines.compose import compose_text
from moeplan.specs.machines.notation import describe_parts, parse_parts
from moeplan.specs.machines.profile import profile_to_json
from moeplan.specs.machines.profile_file import profile_from_json
from moeplan.specs.models.divided import divided
from moeplan.specs.models.load import load_model


def test_shares_divide_layers_as_llama_cpp_does() -> None:
    # 4 layers and the output matrix: places 0, .2, .4, .6, .8 of sums .5 and 1.
    assert by_shares(4, (1, 1)) == CardSplit(mode="layer", layer_card=(0, 0, 0, 1), head_card=1, shares=(1.0, 1.0))
    assert by_shares(4, (0, 3)).layer_card == (1, 1, 1, 1)
    assert by_shares(94, (25, 75)).words == "layers on cards: 24, 70"


@given(st.integers(1, 130), st.lists(st.integers(0, 80), min_size=1, max_size=16).filter(sum))
def test_every_layer_has_a_card_and_cards_follow_each_other(num_layers: int, shares: list[int]) -> None:
    split = by_shares(num_layers, shares)
    held = list(itertools.chain.from_iterable(split.layers_of(card) for card in range(len(shares))))
    assert held == list(range(num_layers))
    assert all(shares[card] for card in {*split.layer_card, split.head_card})


@given(st.lists(st.integers(0, 40), min_size=1, max_size=16).filter(sum))
def test_the_shares_of_counts_give_the_counts_back(counts: list[int]) -> None:
    split = by_counts(counts)
    assert by_shares(sum(counts), split.shares) == split
    assert tuple(len(split.layers_of(card)) for card in range(len(counts))) == tuple(counts)


def test_what_is_no_split_is_refused() -> None:
    for shares in ((), (0, 0), (1, -1), (float("inf"), 1)):
        with pytest.raises(InputError, match="-ts"):
            by_shares(4, shares)
    for counts in ((), (0, 0), (-1, 3)):
        with pytest.raises(InputError, match="numbers of layers"):
            by_counts(counts)
    with pytest.raises(InputError, match="earlier card"):
        CardSplit(mode="layer", layer_card=(1, 0), head_card=1)
    with pytest.raises(UnknownName, match="split"):
        CardSplit(mode="graph", layer_card=(0,), head_card=0)
    assert tensor_split(3).words == "a slice of every layer on each card"


@pytest.mark.parametrize("text", [
    "2 x rtx-3090 + ryzen-9-7950x + ddr5-6000x2:96GiB", "rtx-3090 + rtx-3060 + pcie-3.0x4 + ryzen-9-5950x + ddr4-3200x2:64GiB",
    "2 x rtx-3090 + pcie-4.0x8 + ryzen-9-5950x + switch-4.0x16 + nvlink:56GB/s", "8 x h100-sxm5-80gb",
])  # fmt: skip
def test_boxes_of_several_cards_are_read_and_written_again(text: str) -> None:
    parts = parse_parts(text)
    assert describe_parts(parts) == text
    profile = compose_text(text)
    assert profile.num_cards == len(parts.slots) == len(profile.cards)
    assert profile.memory_bytes == sum(slot.gpu.memory_bytes for slot in parts.slots)
    assert profile_from_json(profile_to_json(profile)) == profile
    alone = profile.of_card(0)
    assert alone.cards == () and alone.links is None and alone.device == profile.device


def test_each_card_has_its_own_link_and_the_slowest_joins_them() -> None:
    profile = compose_text("rtx-3090 + rtx-3060 + pcie-3.0x4 + ryzen-9-5950x + ddr4-3200x2:64GiB")
    fast, slow = (card.host_to_device.pinned_bytes_per_s.value for card in profile.cards)
    assert fast / slow == pytest.approx(8, rel=0.01)
    assert profile.links is not None and profile.links.kind == "pcie" and profile.links.card_bytes_per_s is not None
    assert profile.links.card_bytes_per_s.value == pytest.approx(0.8 * 3.94e9)
    modules = compose_text("8 x h100-sxm5-80gb").links
    assert modules is not None and modules.card_bytes_per_s is not None and modules.card_bytes_per_s.value == 450e9


def test_a_divided_model_has_its_part_of_heads_experts_and_words() -> None:
    model = load_model("gpt-oss-120b")
    half = divided(model, 2)
    assert half.expert_matrix_parameters * 2 == model.expert_matrix_parameters
    assert (
        half.attention.num_heads * 2 == model.attention.num_heads
        and half.attention.num_kv_heads * 2 == model.attention.num_kv_heads
    )
    assert divided(model, 16).attention.num_kv_heads == 1
    with pytest.raises(InputError, match="heads 64"):
        divided(model, 3)
