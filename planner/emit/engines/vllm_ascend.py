"""vLLM on Ascend, expert parallel: the expert map that `expert_map_path` loads, and flags.

Modelled: the file's layout (`vllm_ascend/eplb/core/eplb_utils.py`): layers counted among MoE layers from 0, every device's
experts in slot order. Ignored: dynamic balancing, which stays off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ....base.errors import InputError
from ....base.json_files import parse_json
from ....specs.drafting import has_drafts
from ....specs.models import ModelSpec
from ..checks import exact_keys, needed, placed, row_length, text_of, typed
from ..choices import Emission, EpChoice, Placement, int_rows, left_out
from ..flags import BOOLEAN, FLAGS_FILE, JSON, SWITCH, TEXT, USE_FLAGS, WHOLE, FlagValue, flag_lines
from ..flags import TABLE as NESTED
from ..parallel_notes import (
    COMMON,
    OWN_EXCHANGE,
    attention_groups,
    micro_batch_notes,
    own_exchange_notes,
    replica_notes,
)
from ..table import EngineTable, check_keys, flags_of, row
from ..target import ParallelTarget, Target

MAP_FILE = "expert_map.json"
_ADDITIONAL, _EPLB = "additional_config", "eplb_config"

TABLE = EngineTable(
    engine="vLLM Ascend",
    checked="2026-11-28",
    how="flags compared with vLLM 0.33.0's own definitions; keys with the plug-in's documented table (not installed)",
    source="vllm-ascend: additional configuration, eplb_utils.py; pull requests 8710, 15458, 16000",
    flags={
        "--tensor-parallel-size": row(WHOLE, "devices that share each attention layer", least=1),
        "--data-parallel-size": row(WHOLE, "groups of devices with their own requests", least=1),
        "--enable-expert-parallel": row(SWITCH, "experts whole on devices"),
        "--additional-config": row(JSON, "options of the plug-in"),
    },
    keys={
        f"{_ADDITIONAL}.eplb_config": row(NESTED, "placement and balancing"),
        f"{_EPLB}.expert_map_path": row(TEXT, "the map's file; announced for removal with static balancing",
                                        since="pull request 1116; in eplb_config since 0.13"),
        f"{_EPLB}.num_redundant_experts": row(WHOLE, "slots of a layer beyond one per expert; none on A2", least=0),
        f"{_EPLB}.dynamic_eplb": row(BOOLEAN, "rebalance while serving"),
        f"{_EPLB}.expert_map_record_path": row(TEXT, "where a balanced map is written"),
        f"{_EPLB}.expert_heat_collection_interval": row(WHOLE, "passes between collections", least=1),
        f"{_EPLB}.algorithm_execution_interval": row(WHOLE, "passes until the balancer is done", least=1),
    },
)  # fmt: skip


def render(choice: EpChoice, model: ModelSpec) -> Emission:
    """Return the expert map and the flags that load it."""
    placement = choice.placement
    ranks = placement.num_ranks
    layers = []
    for index, one in enumerate(placement.physical_to_logical.reshape(-1, ranks, placement.slots_per_rank).tolist()):
        devices = [{"device_id": rank, "device_expert": experts} for rank, experts in enumerate(one)]
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
    loaded = (f"{MAP_FILE} is loaded at the start: the placement is in force from the first token. A2 devices take no copies of experts, "
              "and static maps are announced for removal: later versions may want another input")  # fmt: skip
    facts = [loaded]
    if has_drafts(model):
        facts.append(
            "draft (MTP) layers are not in the map: they keep their experts in order, with as many copies as the other layers"
        )
    text = json.dumps({"moe_layer_count": placement.num_layers, "layer_list": layers}) + "\n"
    return Emission(
        engine=TABLE.engine,
        files={MAP_FILE: text, FLAGS_FILE: flag_lines(flags)},
        usage=(USE_FLAGS, f"{MAP_FILE} is named relative to the folder the server starts in"),
        notes=tuple(notes),
        facts=tuple(facts),
        unlike=OWN_EXCHANGE,
    )


def check(files: Mapping[str, str], model: ModelSpec) -> Placement:
    """Return the placement that vLLM on Ascend would load; raises InputError where it would not."""
    flags = flags_of(text_of(files, FLAGS_FILE), TABLE, FLAGS_FILE)
    needed(flags, "--enable-expert-parallel", FLAGS_FILE)
    additional = needed(flags, "--additional-config", FLAGS_FILE)
    check_keys(additional, TABLE, _ADDITIONAL, {"eplb_config"})
    config = typed(additional, "eplb_config", dict, "--additional-config")
    check_keys(config, TABLE, _EPLB, {"expert_map_path", "num_redundant_experts"})
    name = config["expert_map_path"]
    table = parse_json(text_of(files, name), name, name)
    exact_keys(table, name, {"moe_layer_count", "layer_list"})
    count, layers = typed(table, "moe_layer_count", int, name), typed(table, "layer_list", list, name)
    if count != model.num_moe_layers or len(layers) != count:
        raise InputError(f"{name}: moe_layer_count", count, f"{len(layers)} layers listed, {model.name} has {model.num_moe_layers}",
                         "emit again")  # fmt: skip
    rows, ranks = [], flags.get("--tensor-parallel-size", 1) * flags.get("--data-parallel-size", 1)
    for index, layer in enumerate(layers):
        where = f"{name}: layer {index}"
        exact_keys(layer, where, {"layer_id", "device_count", "device_list"})
        devices = typed(layer, "device_list", list, where)
        for device in devices:
            exact_keys(device, where, {"device_id", "device_expert"})
        ids = [typed(device, "device_id", int, where) for device in devices]
        given = (typed(layer, "layer_id", int, where), typed(layer, "device_count", int, where), ids)
        if given != (index, ranks, list(range(ranks))):
            raise InputError(where, given, f"not layer {index} with devices 0 to {ranks - 1} in order", "emit again")
        rows.append([expert for held in int_rows([d["device_expert"] for d in devices], where) for expert in held])
    row_length(len(rows[0]), model.num_experts + config["num_redundant_experts"], name)
    return placed(rows, model, ranks, 1)


TARGET = Target(table=TABLE, parallel=ParallelTarget(render=render, check=check))
