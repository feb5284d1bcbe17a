"""The memory breakdown card by card: what each card of a box holds under a split, and how many bytes a card lacks.

Modelled: a card holds its layers' dense weights, keys, values and states, their resident experts, the output matrix where that lies, and
buffers and a runtime of its own; where every layer is sliced, each card has its part of all of it. Where an engine keeps inputs of a pass
several times, so that micro-batches could overlap, each card has those copies of attention's mask. Ignored: those of smaller inputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..base.errors import DoesNotFit
from ..base.units import format_bytes
from .card_split import TENSOR, CardSplit
from .memory import DEVICE, MemoryBreakdown, MemoryItem, MemoryNeeds, break_down_memory

_BY_LAYER = ("dense weights", "kv cache", "states", "resident experts")
_OF_THE_HEAD = ("embeddings", "draft")
_MASK_BYTES = 2
"""Of one entry of attention's mask: 16 bits (llama.cpp; with a context of 2^20 and micro-batches of 512, Kimi-K3 on 4 cards takes 4.0 GiB a
card, four times one mask: github.com/unslothai/unsloth pull request 7637)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardMemory:
    """What one card holds."""

    card: int
    layers: tuple[int, ...]
    """Decoder layers; all of them where each is sliced."""
    resident_experts: int
    items: tuple[MemoryItem, ...]
    name: str = ""
    """What the card is called."""
    budget_bytes: int | None = None
    """What it may hold, where that was said."""

    def to_dict(self) -> dict[str, object]:
        """Return the card as plain values for files and reports."""
        return {
            "card": self.card, "name": self.name, "layers": list(self.layers), "resident_experts": self.resident_experts,
            "bytes": self.num_bytes, "budget_bytes": self.budget_bytes,
            "items": [{"name": item.name, "bytes": item.num_bytes, "note": item.note} for item in self.items],
        }  # fmt: skip

    @property
    def num_bytes(self) -> int:
        """The sum."""
        return sum(item.num_bytes for item in self.items)


def break_down_cards(
    needs: MemoryNeeds, split: CardSplit, resident: Sequence[int], num_cards: int, *, input_copies: int = 1
) -> tuple[CardMemory, ...]:
    """Return what each of `num_cards` cards holds; resident: experts on cards, of each MoE layer in order.

    input_copies: how many times a card that holds layers keeps the inputs of a pass; the first is part of its buffers.

    The sums of dense weights, caches and experts over cards are those of one card that held everything.
    """
    model = needs.model
    whole = break_down_memory(needs, cached_experts=sum(resident), offloaded=False)
    items = {item.name: item for item in whole.items if item.place == DEVICE}
    if split.mode == TENSOR:
        shared = [
            item if item.name == "runtime" else dataclasses.replace(item, num_bytes=-(-item.num_bytes // num_cards))
            for item in items.values()
        ]
        everything = tuple(range(model.num_layers))
        return tuple(
            CardMemory(card=card, layers=everything, resident_experts=sum(resident), items=tuple(shared))
            for card in range(num_cards)
        )
    parts = {name: [0] * num_cards for name in _BY_LAYER}
    dense = [model.dense_layer_bytes(layer, needs.dense_format) for layer in range(model.num_layers)]
    caches = [model.kept_values(layer, needs.context_tokens, 0) for layer in range(model.num_layers)]
    states = [int(model.is_recurrent(layer)) for layer in range(model.num_layers)]
    experts = [0] * model.num_layers
    for layer, count in zip(model.moe_layers, resident, strict=True):
        experts[layer] = count
    for name, weights in (
        ("dense weights", dense),
        ("kv cache", caches),
        ("states", states),
        ("resident experts", experts),
    ):
        if name in items:
            parts[name] = _divided(items[name].num_bytes, weights, split, num_cards)
    found = []
    for card in range(num_cards):
        mine = []
        for name, item in items.items():
            if name in _BY_LAYER:
                mine.append(dataclasses.replace(item, num_bytes=parts[name][card]))
            elif name in _OF_THE_HEAD:
                mine += [item] if card == split.head_card else []
            else:  # buffers and runtime: each card has its own
                mine.append(item)
        if input_copies > 1:
            mine.append(_copies(needs, input_copies))
        layers = split.layers_of(card)
        used = layers or card == split.head_card
        found.append(
            CardMemory(
                card=card,
                layers=layers,
                resident_experts=sum(experts[layer] for layer in layers),
                items=tuple(mine) if used else (),
            )
        )
    return tuple(found)


def together(cards: Sequence[CardMemory], host: MemoryBreakdown) -> MemoryBreakdown:
    """Return one breakdown: every card's items added up by name, and what the host holds."""
    sums: dict[str, MemoryItem] = {}
    for card in cards:
        for item in card.items:
            before = sums[item.name].num_bytes if item.name in sums else 0
            sums[item.name] = dataclasses.replace(
                item, num_bytes=before + item.num_bytes, note=f"{item.note}; over all cards"
            )
    return MemoryBreakdown(items=(*sums.values(), *(item for item in host.items if item.place != DEVICE)))


def lacking_most(cards: Sequence[CardMemory], budgets: Sequence[int]) -> tuple[CardMemory, int]:
    """Return the card that lacks the most, or has the least left, and the bytes it lacks (nought or less where all fit)."""
    worst = max(cards, key=lambda one: one.num_bytes - budgets[one.card])
    return worst, worst.num_bytes - budgets[worst.card]


def require_cards_fit(cards: Sequence[CardMemory], budgets: Sequence[int], names: Sequence[str], what: str) -> None:
    """Return nothing; raises DoesNotFit for the card that lacks the most, with its name and bytes."""
    worst, missing = lacking_most(cards, budgets)
    if missing > 0:
        has = format_bytes(budgets[worst.card])
        raise DoesNotFit(
            f"{what} needs {format_bytes(worst.num_bytes)} on card {worst.card} ({names[worst.card]}), of which {has} may be filled",
            missing,
        )


def _copies(needs: MemoryNeeds, input_copies: int) -> MemoryItem:
    """Return what further copies of a pass's inputs take on one card."""
    tokens = needs.pass_tokens or needs.concurrency
    cells = needs.context_tokens * needs.concurrency
    note = f"{input_copies - 1} more masks of {tokens} by {cells} tokens, 16 bits each; given up where they do not fit"
    return MemoryItem(
        name="copies of inputs", place=DEVICE, num_bytes=(input_copies - 1) * tokens * cells * _MASK_BYTES, note=note
    )


def _divided(total: int, weights: Sequence[int], split: CardSplit, num_cards: int) -> list[int]:
    """Return a total divided over cards by what their layers weigh; whole bytes that add up to it."""
    weight = sum(weights)
    if weight == 0:
        return [total if card == split.head_card else 0 for card in range(num_cards)]
    sums, found = 0, []
    before = 0
    for card in range(num_cards):
        sums += sum(weights[layer] for layer in split.layers_of(card))
        upto = math.floor(total * sums / weight) if card < num_cards - 1 else total
        found.append(upto - before)
        before = upto
    return found
