"""vLLM on Ascend, expert parallel: the expert map that `expert_map_path` loads, and flags.

Modelled: the file's layout (`vllm_ascend/eplb/core/eplb_utils.py`): layers counted among MoE layers from 0, every device's
experts in slot order. Ignored: dynamic balancing, which stays off.
"""

from __future__ import annotations

import json

from ...specs import ModelSpec
from .choices import Emission, EpChoice, left_out
from .expert_parallel_notes import COMMON, attention_groups, micro_batch_notes, own_exchange_notes, replica_notes
from .flags import FLAGS_FILE, USE_FLAGS, FlagValue, flag_lines

MAP_FILE = "expert_map.json"


def render(choice: EpChoice, model: ModelSpec) -> Emission:
    """Return the expert map and the flags that load it."""
    placement = choice.placement
    ranks = placement.num_ranks
    layers = []
    for index, row in enumerate(placement.physical_to_logical.reshape(-1, ranks, placement.slots_per_rank).tolist()):
        devices = [{"device_id": rank, "device_expert": experts} for rank, experts in enumerate(row)]
        layers.append({"layer_id": index, "device_count": ranks, "device_list": devices})
    tensor, data = attention_groups(choice)
    config = {"expert_map_path": MAP_FILE, "num_redundant_experts": placement.num_redundant}
    flags: dict[str, FlagValue] = {
        "--tensor-parallel-size": tensor,
        "--data-parallel-size": data,
        "--enable-expert-parallel": True,
        "--additional-config": {"eplb_config": config},
    }
    how = "a rank takes its own copy where it holds one, and a fixed one elsewhere otherwise, whatever the node"
    notes = [
        *own_exchange_notes(choice, "vLLM on Ascend"),
        *replica_notes(choice, "", how),
        *micro_batch_notes(choice, 1),
        *left_out(choice.schedule, COMMON),
    ]
    text = json.dumps({"moe_layer_count": placement.num_layers, "layer_list": layers}) + "\n"
    return Emission(
        engine="vLLM Ascend",
        files={MAP_FILE: text, FLAGS_FILE: flag_lines(flags)},
        usage=(USE_FLAGS, f"{MAP_FILE} is named relative to the folder the server starts in"),
        notes=tuple(notes),
    )
