"""How a model lies on several cards: whole layers one after another, or a part of every layer on each card.

Modelled: llama.cpp's rule of which layer goes to which card (`llama_model::load_tensors`): shares are added up and divided by their sum,
and layer l of n (the output matrix counts as one more) goes to the first card whose sum exceeds l / n, in 32-bit floats; without `-ts`
shares are each card's free memory. What a user says of a split: `layer`, `row` or `tensor`, with shares (`layer:3,1`) where cards are not
to be filled by their memory, or how many layers each card gets (`24,12`). Ignored: cards that nothing lies on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base.errors import InputError, UnknownName
from .machines.engines import load_engine
from .machines.profile import Profile

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

    def to_dict(self) -> dict[str, Any]:
        """Return the split as plain values for files."""
        return {
            "mode": self.mode, "layer_card": list(self.layer_card), "head_card": self.head_card, "shares": list(self.shares)
        }  # fmt: skip

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


def split_from_dict(data: object, num_layers: int, num_cards: int) -> CardSplit:
    """Return the split that `to_dict` wrote; raises InputError where it is none of such a model and machine."""
    remedy = "give a plan.json written by moeplan plan"
    try:
        if not isinstance(data, dict):
            raise TypeError
        found = CardSplit(
            mode=str(data["mode"]), layer_card=tuple(int(card) for card in data["layer_card"]), head_card=int(data["head_card"]),
            shares=tuple(float(share) for share in data["shares"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        raise InputError("plan.provenance.split", data, "not a split over cards", remedy) from None
    if len(found.layer_card) != num_layers or not 0 <= min(found.layer_card) <= found.head_card < num_cards:
        rule = f"not {num_layers} layers on {num_cards} cards"
        raise InputError("plan.provenance.split", list(found.layer_card), rule, remedy)
    return found


def divide(
    profile: Profile, num_layers: int, *, mode: str | None = None, shares: Sequence[float] | None = None,
    free_bytes: Sequence[int] | None = None,
) -> tuple[CardSplit | None, tuple[str, ...]]:  # fmt: skip
    """Return how a model lies on a machine's cards, and what was taken where nothing was said; None for one card.

    mode: None takes what the machine's engine does of itself. shares: None, or of another number of cards, takes `free_bytes`, or each
    card's memory. Raises InputError for shares that are none.
    """
    if not profile.cards:
        return None, ()
    assumed = []
    if mode is None:
        mode = load_engine(profile.engine.name).split if profile.engine is not None else LAYER
        assumed.append(f"placement.parallel: {mode}, as the engine does of itself")
    if mode == TENSOR:
        return tensor_split(num_layers), tuple(assumed)
    if shares is None or len(shares) != profile.num_cards:
        shares = free_bytes or profile.card_bytes
        assumed.append("placement.tensor_split: by the cards' memory")
    return by_shares(num_layers, tuple(float(share) for share in shares), mode), tuple(assumed)


def read_split(
    text: str | None, profile: Profile, num_layers: int, *, free_bytes: Sequence[int] | None = None, field: str = "--split"
) -> tuple[CardSplit | None, tuple[str, ...]]:  # fmt: skip
    """Return the split that a user asks for, as `divide` does; None asks for the engine's own.

    Raises InputError for a split on one card, shares or layers for another number of cards, layers that do not add up to the model's, and
    a tensor split over cards that nothing is said to join.
    """
    if text is None:
        return divide(profile, num_layers, free_bytes=free_bytes)
    if not profile.cards:
        raise InputError(field, text, f"{profile.name} has one card", "leave it out, or name several: 2 x rtx-3090 + …")
    mode, colon, listed = text.partition(":")
    mode = mode.strip().lower()
    if not colon and mode[:1].isdigit():
        return _counted(text, profile, num_layers, field), ()
    if mode not in MODES:
        raise UnknownName(field, text, (*MODES, "layer:3,1", "24,12"))
    if mode == TENSOR:
        if colon:
            raise InputError(field, text, "every card has an equal slice", "write tensor alone")
        if profile.links is None or profile.links.card_bytes_per_s is None:
            raise InputError(
                field, text, f"nothing says what joins the cards of {profile.name}", "name a link, e.g. + nvlink:56GB/s"
            )
    shares = _numbers(listed, profile, field, text) if colon else None
    return divide(profile, num_layers, mode=mode, shares=shares, free_bytes=free_bytes)


def _counted(text: str, profile: Profile, num_layers: int, field: str) -> CardSplit:
    counts = _numbers(text, profile, field, text)
    if any(count != int(count) for count in counts) or sum(counts) != num_layers:
        total = f"{sum(counts):g} layers in all"
        raise InputError(
            field, text, f"{total}, the model has {num_layers}", "give whole layers that add up, or layer:SHARES"
        )
    return by_counts([int(count) for count in counts])


def _numbers(listed: str, profile: Profile, field: str, text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(one) for one in listed.replace("/", ",").split(","))
    except ValueError:
        raise InputError(
            field, text, "not numbers with commas between them", "write for instance layer:3,1 or 24,12"
        ) from None
    if len(found) != profile.num_cards:
        rule = f"{len(found)} numbers for {profile.num_cards} cards"
        raise InputError(field, text, rule, "give one for each card")
    if any(not 0 <= one < float("inf") for one in found) or not sum(found) > 0:
        raise InputError(field, text, "not shares that add up to something", "give numbers of at least nought")
    return found
