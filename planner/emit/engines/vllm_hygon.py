"""HYGON's plug-in for vLLM, expert parallel: the keyed map (version 2) that `expert_map_path` inside `--eplb-config` loads.

Modelled: one map for the class that the model's configuration names (`model_maps`), or the older single map where the family's class is
not known; experts are put on their slots while the checkpoint is read. Ignored: maps of draft layers and of pipeline stages, which
are not in a plan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ....base.errors import InputError
from ....base.json_files import parse_json
from ....specs.drafting import has_drafts
from ....specs.models import ModelSpec
from ..checks import exact_keys, needed, placed, row_length, text_of, typed
from ..choices import Emission, EpChoice, Placement, int_rows, left_out
from ..families import ARCHITECTURES
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
from ..table import EngineTable, check_keys, flags_of, names, row
from ..target import ParallelTarget, Target

MAP_FILE = "expert_map.json"
_EPLB = "eplb_config"

TABLE = EngineTable(
    engine="vLLM with HYGON's plug-in (vllm-plugin-das)",
    checked="2026-11-28",
    how="the file compared with the plug-in's published reader, flags with vLLM 0.33.0's definitions (read, not started)",
    source="HYGON-AI/vllm-plugin-das: vllm_hcu/model_executor/layers/fused_moe/static_eplb.py; pull requests 34 (open), 69 (merged)",
    flags={
        "--tensor-parallel-size": row(WHOLE, "devices that share each attention layer", least=1),
        "--data-parallel-size": row(WHOLE, "groups of devices with their own requests", least=1),
        "--enable-expert-parallel": row(SWITCH, "experts whole on devices"),
        "--enable-eplb": row(SWITCH, "needed for a map"),
        "--eplb-config": row(JSON, "vLLM's keys and the plug-in's two"),
    },
    keys={
        f"{_EPLB}.num_redundant_experts": row(WHOLE, "slots of a layer beyond one per expert", least=0),
        f"{_EPLB}.policy": row(names("default"), "who rebalances; a map stays"),
        f"{_EPLB}.log_balancedness": row(BOOLEAN, "log how even ranks are"),
        f"{_EPLB}.expert_map_path": row(TEXT, "the map that is loaded", since="merged on 2026-09-05 (pull request 69)"),
        f"{_EPLB}.expert_map_record_path": row(TEXT, "where a balanced map is written; not with expert_map_path"),
        f"{MAP_FILE}.model_maps": row(NESTED, "class of the model to its map; with #pp_rank=N for a pipeline's stages"),
        f"{MAP_FILE}.physical_to_logical_map": row(NESTED, "the older single map"),
    },
)  # fmt: skip


def render(choice: EpChoice, model: ModelSpec) -> Emission:
    """Return the map and the flags that load it."""
    placement = choice.placement
    tensor, data = attention_groups(choice)
    architecture = ARCHITECTURES.get(model.family)
    one: dict[str, Any] = {"physical_to_logical_map": placement.physical_to_logical.tolist()}
    table = {"model_maps": {architecture: one}} if architecture else one
    flags: dict[str, FlagValue] = {
        "--tensor-parallel-size": tensor,
        "--data-parallel-size": data,
        "--enable-expert-parallel": True,
        "--enable-eplb": True,
        "--eplb-config": {
            "num_redundant_experts": placement.num_redundant,
            "policy": "default",
            "expert_map_path": MAP_FILE,
        },
    }
    notes = [
        *own_exchange_notes(choice, "the plug-in"),
        *replica_notes(choice, "even", "tokens are spread evenly over an expert's copies"),
        *micro_batch_notes(choice, 1),
        *left_out(choice.schedule, COMMON),
    ]
    facts = [
        f"{MAP_FILE} is read before the checkpoint: the placement is in force from the first token and stays; nothing is rearranged"
    ]
    if architecture:
        facts.append(
            f"the map is kept under {architecture}: a checkpoint whose configuration names another class needs that name there"
        )
    if has_drafts(model):
        facts.append(
            "draft (MTP) models need a map under their own class, which a plan does not have: leave MTP off, or add it"
        )
    return Emission(
        engine=TABLE.engine,
        files={MAP_FILE: json.dumps(table) + "\n", FLAGS_FILE: flag_lines(flags)},
        usage=(USE_FLAGS, f"{MAP_FILE} is named relative to the folder the server starts in"),
        notes=tuple(notes),
        facts=tuple(facts),
        unlike=OWN_EXCHANGE,
    )


def check(files: Mapping[str, str], model: ModelSpec) -> Placement:
    """Return the placement that the plug-in would load; raises InputError where it would not."""
    flags = flags_of(text_of(files, FLAGS_FILE), TABLE, FLAGS_FILE)
    for name in ("--enable-expert-parallel", "--enable-eplb"):
        needed(flags, name, FLAGS_FILE)
    config = needed(flags, "--eplb-config", FLAGS_FILE)
    check_keys(config, TABLE, _EPLB, {"expert_map_path"})
    if "expert_map_record_path" in config:
        raise InputError(
            "--eplb-config: expert_map_record_path",
            config["expert_map_record_path"],
            "not with expert_map_path",
            "keep one",
        )
    name = config["expert_map_path"]
    table = parse_json(text_of(files, name), name, name)
    check_keys(table, TABLE, MAP_FILE)
    if "model_maps" in table:
        maps = typed(table, "model_maps", dict, name)
        wanted = ARCHITECTURES.get(model.family)
        if wanted not in maps:
            raise InputError(f"{name}: model_maps", sorted(maps), f"{wanted} is absent", "name the model's class")
        table = maps[wanted]
    exact_keys(table, name, {"physical_to_logical_map"})
    rows = int_rows(table["physical_to_logical_map"], f"{name}: physical_to_logical_map")
    if len(rows) != model.num_moe_layers:
        raise InputError(
            name, len(rows), f"{model.name} has {model.num_moe_layers} MoE layers", "give one row for each"
        )
    row_length(len(rows[0]), model.num_experts + config.get("num_redundant_experts", 0), name)
    ranks = flags.get("--tensor-parallel-size", 1) * flags.get("--data-parallel-size", 1)
    return placed(rows, model, ranks, 1)


TARGET = Target(table=TABLE, parallel=ParallelTarget(render=render, check=check))
