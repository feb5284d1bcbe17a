"""How a report's model lay on its cards: as stated, else as its engine divides models when it is told nothing.

    placement.parallel      layer, tensor or row; without it, the engine's own way
    placement.tensor_split  shares of the cards, as -ts takes them; also read from "-ts 25,75" in the note; without them, cards' memory
    note                    "experts of layers 35-93 on the cores": the first layers' experts are on the cards, not the last ones'

Modelled: what a report says; the split itself is made as everywhere (`specs.card_split.divide`). Ignored: which tensors a pattern of -ot
names.
"""

from __future__ import annotations

import re

from ...specs.card_split import LAYER, ROW, TENSOR, CardSplit, divide
from ...specs.machines.profile import Profile
from ...specs.models import ModelSpec
from .rows import Report

_SHARES = re.compile(r"(?:-ts|--tensor-split|-sm layer -ts)[ =]+([0-9]+(?:\.[0-9]+)?(?:[,/][0-9]+(?:\.[0-9]+)?)+)")
_ON_CORES = re.compile(r"layers? ([0-9]{1,3})\s?[-–]\s?([0-9]{1,3}) on the (?:cores|cpu)", re.IGNORECASE)
_MODES = {"layer": LAYER, "pipeline": LAYER, "tensor": TENSOR, "row": ROW}


def split_of(report: Report, model: ModelSpec, profile: Profile, assumed: list[str]) -> CardSplit | None:
    """Return how the model lies on the report's cards; None for one card."""
    mode = _MODES.get(str(report.part("placement").get("parallel")))
    split, taken = divide(profile, model.num_layers, mode=mode, shares=_shares(report))
    assumed += taken
    return split


def first_layers_on_cards(report: Report, model: ModelSpec) -> bool:
    """Return whether the note says that the experts of the last layers, not of the first ones, are on the cores."""
    found = _ON_CORES.search(str(report.row.get("note") or ""))
    return found is not None and int(found[1]) > model.moe_layers[0] and int(found[2]) >= model.moe_layers[-1]


def _shares(report: Report) -> tuple[float, ...] | None:
    stated = report.part("placement").get("tensor_split")
    if isinstance(stated, list) and stated and all(_is_share(one) for one in stated) and sum(stated) > 0:
        return tuple(float(one) for one in stated)
    text = stated if isinstance(stated, str) else str(report.row.get("note") or "")
    found = _SHARES.search(text if not isinstance(stated, str) else f"-ts {stated}")
    shares = None if found is None else tuple(float(one) for one in re.split("[,/]", found[1]))
    return shares if shares is not None and sum(shares) > 0 else None


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9
