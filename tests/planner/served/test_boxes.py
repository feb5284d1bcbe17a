"""gpt-oss-120b on two boxes of two cards: planned, simulated by both simulators, shown and emitted; bytes and times by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moeplan import plan
from moeplan.planner.emit.targets import render
from moeplan.planner.offload.plan import OffloadRequest
from moeplan.reports.offload.page import plan_report
from moeplan.specs.provenance import model_of

EXPERT = 3 * 2880 * 2880 * 17 // 32 + 3 * 2880 * 4
"""Bytes: three matrices, 17 bytes for 32 weights (MXFP4), and three vectors of 32 bits, as files of it have them."""
LAYERS, EXPERTS, USED = 36, 128, 4
DDR5 = 2 * 8 * 6.0e9
"""Bytes a second of two channels at 6000 MT/s, as no core ever reads them."""
CARDS = {"rtx-3090": 936e9, "rtx-3060": 360e9}
BOXES = {
    "twins": ("2 x rtx-3090 + ryzen-9-7950x + ddr5-6000x2:96GiB", "23GiB,20GiB"),
    "unequal": ("rtx-3090 + rtx-3060 + ryzen-9-7950x + ddr5-6000x2:96GiB", None),
}


@pytest.mark.parametrize("name", sorted(BOXES))
def test_two_cards_are_planned_simulated_shown_and_emitted(name: str) -> None:
    hardware, memory = BOXES[name]
    asked = OffloadRequest(objective="request_s", prefill_chunk_tokens=512)
    found = plan(
        "gpt-oss-120b", hardware, memory=memory, target="llama.cpp", prompt_tokens=32, reply_tokens=8, request=asked
    )
    document: dict[str, Any] = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    best, setting = document["best"], document["for"]["setting"]
    assert best["engine"].startswith("compiled, checked by simpy")
    cards, away = best["cards"], setting["host_layers"]
    assert all(card["layers"] for card in cards)  # none idles
    first = 0
    for card in cards:  # whole layers in order; the first ones' experts are on the host
        assert card["layers"] == list(range(first, first + len(card["layers"])))
        with_experts = len([layer for layer in card["layers"] if layer >= away])
        sizes = {item["name"]: item["bytes"] for item in card["items"]}
        assert sizes["resident experts"] == with_experts * EXPERTS * EXPERT
        assert card["bytes"] == sum(sizes.values()) <= card["budget_bytes"]
        first += len(card["layers"])
    assert first == LAYERS and 0 < away < LAYERS
    # As few layers on the host as there is room for: no card has room for the experts of one layer more.
    assert all(card["budget_bytes"] - card["bytes"] < EXPERTS * EXPERT for card in cards)
    # A step takes at least what reading its weights takes at full bandwidth, and less than three times that.
    read = away * USED * EXPERT / DDR5
    for card in cards:
        sizes = {item["name"]: item["bytes"] for item in card["items"]}
        on_card = len([layer for layer in card["layers"] if layer >= away])
        matrices = sizes.get("dense weights", 0) + sizes.get("embeddings", 0)
        read += (on_card * USED * EXPERT + matrices) / CARDS[card["name"]]
    assert read < best["step_s"]["mean"] < 3 * read
    page = plan_report(document)
    assert "Card by card" in page and all(f"{card['card']}: {card['name']}" in page for card in cards)
    flags = render(document, "llamacpp", model_of(document)).files["llama-server.sh"]
    shares = ",".join(f"{share:g}" for share in setting["split"]["shares"])
    assert f"--n-cpu-moe {away}" in flags and f"--tensor-split {shares}" in flags
