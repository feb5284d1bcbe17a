"""Costs of several cards: sums of what each card costs alone, hand-overs and reductions from stated constants."""

from __future__ import annotations

import pytest

from moeplan.base.errors import InputError
from moeplan.calibrate.costs.load import load_costs
from moeplan.specs.card_split import by_counts, by_shares, tensor_split
from moeplan.specs.machines.compose import compose_text
from moeplan.specs.models import weight_format
from moeplan.specs.models.load import load_model

MODEL = load_model("gpt-oss-120b")
BOX = compose_text("rtx-3090 + rtx-3060 + pcie-3.0x4 + ryzen-9-5950x + ddr4-3200x2:64GiB")


def test_a_layer_costs_what_its_card_costs_and_a_hand_over_where_the_card_changes() -> None:
    split = by_counts((24, 12))
    costs, alone = load_costs(BOX, MODEL, split=split), [load_costs(BOX.of_card(card), MODEL) for card in (0, 1)]
    seconds = [costs.dense_layer(layer, 1, 512).seconds for layer in range(36)]
    expected = [alone[split.layer_card[layer]].dense_layer(layer, 1, 512).seconds for layer in range(36)]
    links = BOX.links
    assert links is not None and links.card_bytes_per_s is not None
    hop = links.hop_s.value + MODEL.hidden_size * 4 / links.card_bytes_per_s.value
    expected[24] += hop
    assert seconds == pytest.approx(expected)
    assert costs.head(1).seconds == pytest.approx(alone[1].head(1).seconds)
    fmt = weight_format(MODEL.native_bits)
    fast, slow = (each.grouped_item(1, fmt).seconds for each in costs.each_card)
    assert slow / fast == pytest.approx(936 / 360, rel=0.2)
    assert [costs.card_of(layer) for layer in (0, 23, 24, 35)] == [0, 0, 1, 1]


def test_a_tensor_split_waits_for_the_slowest_card_and_reduces_twice_a_layer() -> None:
    box = compose_text("2 x rtx-3090 + ryzen-9-5950x + ddr4-3200x2:64GiB", "vllm")
    costs, one = load_costs(box, MODEL, split=tensor_split(36)), load_costs(box.of_card(0), MODEL)
    fmt = weight_format(MODEL.native_bits)
    assert costs.grouped_item(1, fmt).seconds == pytest.approx(one.grouped_item(1, fmt).seconds / 2, rel=0.01)
    assert box.links is not None and box.links.card_bytes_per_s is not None
    # A prompt's reduction: 2 steps, and the hidden state once over the link, twice a layer.
    reduced = 2 * (2 * box.links.reduce_step_s.value + 2048 * MODEL.hidden_size * 2 / box.links.card_bytes_per_s.value)
    half = costs.dense_layer(0, 2048, 2048).seconds - reduced
    assert half < one.dense_layer(0, 2048, 2048).seconds
    uploads = [each.host_to_device(2**24).seconds for each in (costs, one)]
    assert uploads[0] == pytest.approx(uploads[1] / 2, rel=0.02)
    shared = compose_text("2 x rtx-3090 + ryzen-9-5950x + ddr4-3200x2:64GiB + switch-4.0x16", "vllm")
    behind = load_costs(shared, MODEL, split=tensor_split(36)).host_to_device(2**24).seconds
    assert uploads[0] < behind <= uploads[1]
    writer = compose_text("2 x rtx-3090 + ryzen-9-5950x + ddr4-3200x2:64GiB", "ktransformers")
    assert load_costs(writer, MODEL, split=tensor_split(36)).host_to_device(2**24).seconds == pytest.approx(
        load_costs(writer.of_card(0), MODEL).host_to_device(2**24).seconds
    )


def test_rows_read_less_and_collect_more() -> None:
    box = compose_text("2 x rtx-3090 + ryzen-9-5950x + ddr4-3200x2:64GiB")
    rows, layers = (load_costs(box, MODEL, split=by_shares(36, (1, 1), mode)) for mode in ("row", "layer"))
    assert rows.dense_layer(3, 1, 512).seconds > layers.dense_layer(3, 1, 512).seconds


def test_several_cards_are_never_taken_for_one() -> None:
    with pytest.raises(InputError, match="several cards"):
        load_costs(BOX, MODEL)
    with pytest.raises(InputError, match="heads 64"):
        load_costs(compose_text("3 x rtx-3090", "vllm"), MODEL, split=tensor_split(36))
