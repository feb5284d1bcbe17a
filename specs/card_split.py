"""How a model lies on several cards: whole layers one after another, or a part of every layer on each card.

Modelled: llama.cpp's rule of which layer goes to which card (`llama_model::load_tensors`): shares are added up and divided by their sum,
and layer l of n (the output matrix counts as one more) goes to the first card whose sum exceeds l / n, in 32-bit floats; without `-ts`
shares are each card's free memory. Ignored: cards that nothing lies on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..base.errors import InputError, UnknownName

LAYER, TENSOR, ROW = "layer", "tensor", "row"
MODES = (LAYER, TENSOR, ROW)


@dataclass(frozen=True, slots=True, kw_only=True)
class CardSplit:
    """Which card holds what."""

    mode: str
    """layer, tensor (a slice of every layer on each card), or row (rows of dense weights on all, experts with their layer)."""
    layer_card: tuple[int, ...]
    """The card of each decoder layer; with `tensor` all nought."""
    head_card: int
    """The card of the output matrix."""
    shares: tuple[float, ...] = ()
    """What `-ts` would be told, where layers were divided by shares."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UnknownName("split", self.mode, MODES)
        if any(after < before for before, after in itertools.pairwise((*self.layer_card, self.head_card))):
            raise InputError(
                "split",
                self.layer_card,
                "layers go back to an earlier card",
                "give each card layers that follow each other",
            )

    def layers_of(self, card: int) -> tuple[int, ...]:
        """Return the decoder layers on a card."""
        return tuple(layer for layer, at in enumerate(self.layer_card) if at == card)

    @property
    def words(self) -> str:
        """How many layers each card has, for people."""
        if self.mode == TENSOR:
            return "a slice of every layer on each card"
        count = max((*self.layer_card, self.head_card)) + 1
        return "layers on cards: " + ", ".join(str(len(self.layers_of(card))) for card in range(count))


def by_shares(num_layers: int, shares: Sequence[float], mode: str = LAYER) -> CardSplit:
    """Return the split of `num_layers` decoder layers by shares, as llama.cpp divides them; raises InputError for shares that are none."""
    if not shares or any(not 0 <= share < float("inf") for share in shares) or not sum(shares) > 0:
        raise InputError("-ts", ",".join(f"{share:g}" for share in shares), "not shares that add up to something",
                         "give one number of at least nought for each card")  # fmt: skip
    sums = np.cumsum(np.array(shares, np.float32), dtype=np.float32)
    points = sums / sums[-1]
    slots = num_layers + 1
    places = [np.float32(slot) / np.float32(slots) for slot in range(slots)]
    cards = [min(int(np.searchsorted(points, place, side="right")), len(shares) - 1) for place in places]
    return CardSplit(
        mode=mode, layer_card=tuple(cards[:-1]), head_card=cards[-1], shares=tuple(float(share) for share in shares)
    )


def by_counts(counts: Sequence[int], head_card: int | None = None) -> CardSplit:
    """Return the split that gives each card so many layers, the output matrix to the last one that has any; shares that yield it included.

    Raises InputError for counts that are none.
    """
    if not counts or min(counts) < 0 or sum(counts) < 1:
        raise InputError("split", tuple(counts), "not numbers of layers", "give one for each card")
    last = max(card for card, count in enumerate(counts) if count) if head_card is None else head_card
    layers = tuple(card for card, count in enumerate(counts) for _ in range(count))
    shares = tuple(float(count + (card == last)) for card, count in enumerate(counts))
    return CardSplit(mode=LAYER, layer_card=layers, head_card=last, shares=shares)


def tensor_split(num_layers: int) -> CardSplit:
    """Return the split that cuts every layer over all cards."""
    return CardSplit(mode=TENSOR, layer_card=(0,) * num_layers, head_card=0)
