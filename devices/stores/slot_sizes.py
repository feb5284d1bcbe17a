"""How an expert of a model lies in a slot, and so how many bytes move when it does. No torch here: planners ask too.

Modelled: the kernels' own layout, which differs a little from a format's nominal bytes (alignment, scales). Ignored: formats
that only other engines' kernels run; they have their nominal bytes.
"""

from __future__ import annotations

from ...base.errors import InputError
from ...kernels.slot_layout import WEIGHT_NAMES, ExpertShape, SlotLayout, slot_layout
from ...specs.models import ModelSpec, weight_format


def expert_layout(model: ModelSpec, weights: str) -> SlotLayout:
    """Return how one of `model`'s experts lies in a slot when stored as `weights`; raises UnknownName or InputError."""
    if weights not in WEIGHT_NAMES and weight_format(weights):
        rule = f"these kernels run {', '.join(WEIGHT_NAMES)}; other formats of checkpoints are simulated, not executed"
        raise InputError("bits", weights, rule, "give --bits, or experts.bits, one of these")
    shape = ExpertShape(
        hidden_size=model.expert_hidden,
        intermediate_size=model.expert_intermediate_size,
        gated=model.gated,
        bias=model.expert_bias,
    )
    return slot_layout(shape, weights)
