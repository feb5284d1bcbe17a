"""How a report's model lay on its cards: as stated, else as its engine divides models when it is told nothing.

    placement.parallel      layer, tensor or row; without it, the engine's own way
    placement.tensor_split  shares of the cards, as -ts takes them; also read from "-ts 25,75" in the note; without them, cards' memory
    note                    "experts of layers 35-93 on the cores": the first layers' experts are on the cards, not the last ones'

Modelled: the engine's rule of which layer goes to which card. Ignored: which tensors a pattern of -ot names.
"""

from __future__ import annotations

import re

from ...specs.card_split import LAYER, ROW, TENSOR, CardSplit, by_shares, tensor_split
from ...specs.machines.engines import load_engine
from ...specs.machines.profile import Profile
from ...specs.models import ModelSpec
from .rows import Report

_SHARES = re.compile(r"(?:-ts|--tensor-split|-sm layer -ts)[ =]+([0-9]+(?:\.[0-9]+)?(?:[,/][0-9]+(?:\.[0-9]+)?)+)")
_ON_CORES = re.compile(r"layers? ([0-9]{1,3})\s?[-–]\s?([0-9]{1,3}) on the (?:cores|cpu)", re.IGNORECASE)
_MODES = {"layer": LAYER, "pipeline": LAYER, "tensor": TENSOR, "row": ROW}


def split_of(report: Report, model: ModelSpec, profile: Profile, assumed: list[str]) -> CardSplit | None:
    """Return how the model lies on the report's cards; None for one card."""
    if not profile.cards:
        return None
    stated = _MODES.get(str(report.part("placement").get("parallel")))
    mode = stated
    if mode is None:
        mode = load_engine(profile.engine.name).split if profile.engine is not None else LAYER
        assumed.append(f"placement.parallel: {mode}, as the engine does of itself")
    if mode == TENSOR:
        return tensor_split(model.num_layers)
    shares = _shares(report)
    if shares is None or len(shares) != profile.num_cards:
        shares = profile.card_bytes
        assumed.append("placement.tensor_split: by the cards' memory")
    return by_shares(model.num_layers, tuple(float(share) for share in shares), mode)


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
