"""Whether a recording's layers are a model's, and which are not.

Modelled: engines number layers in three ways: as the model does (dense layers counted), by MoE layers alone from 0, and
as the model does from 1. A layer the recording lacks, or has beyond the model's, is named. Ignored: whether the ids
come from that model (nothing in them tells).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..base.errors import InputError
from ..specs.models import ModelSpec
from .readers.account import layer_ranges
from .recording import RoutingTrace


def check_match(model: ModelSpec, trace: RoutingTrace) -> None:
    """Return nothing; raises InputError when the recording cannot be of this model."""
    check_layers(model, trace.layer_ids)
    for name, mine, theirs in (
        ("experts", model.num_experts, trace.num_experts),
        ("top-k", model.top_k, trace.top_k),
    ):
        if mine != theirs:
            raise InputError(
                "trace", f"{theirs} {name}", f"{model.name} has {mine}", "choose the model the recording was made with"
            )


def check_layers(model: ModelSpec, layer_ids: Sequence[int]) -> None:
    """Return nothing when a recording holds every MoE layer of a model and no other; raises InputError that names them."""
    wanted, recorded = list(model.moe_layers), list(layer_ids)
    if recorded in (wanted, list(range(len(wanted))), [layer + 1 for layer in wanted]):
        return
    # What is lacking is named in the numbering that leaves the fewest differences.
    missing, beyond = min(
        (_differences(wanted, recorded, shift) for shift in (0, 1)), key=lambda pair: len(pair[0]) + len(pair[1])
    )
    said = f"{len(recorded)} MoE layers"
    if missing and not beyond and len(missing) < len(wanted):
        rule = f"{model.name} has {len(wanted)}: layer {layer_ranges(missing)} is not in the recording"
        remedy = "record every layer (an importance matrix leaves out layers with partial data), or choose the recorded model"
    elif beyond and not missing:
        rule = f"{model.name} has {len(wanted)}: layer {layer_ranges(beyond)} is none of its MoE layers (a draft's?)"
        remedy = f"import it again with --option hidden_layers={model.num_layers}, or choose the recorded model"
    elif len(wanted) != len(recorded):
        rule, remedy = f"{model.name} has {len(wanted)}", "choose the model the recording was made with"
    else:
        rule = f"layer {layer_ranges(missing)} of {model.name} is not in it, and layer {layer_ranges(beyond)} is not the model's"
        remedy = "import it again with --option layer_ids=…, or choose the recorded model"
    raise InputError("trace", said, rule, remedy)


def _differences(wanted: list[int], recorded: list[int], shift: int) -> tuple[list[int], list[int]]:
    """Return (layers of the model that are not recorded, recorded layers that are not the model's)."""
    there = {layer - shift for layer in recorded}
    return [layer for layer in wanted if layer not in there], [
        layer for layer in recorded if layer - shift not in set(wanted)
    ]
