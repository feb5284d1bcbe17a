"""vLLM, expert parallel: the files that open proposals would load, for whoever builds a version with one of them.

Modelled: as of September 2026 and all open, so that no released version takes them: `initial_expert_map_path` (pull request 49572), the
mapping line of offline balancing (41141), a file of ranks (34811), DeepSeek V4's map (53022). Each has flags of its own, marked pending.
Ignored: which of them will be merged, and how they change until then.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ....base.errors import InputError
from ....base.json_files import parse_json
from ....specs.models import ModelSpec
from ..checks import placed, text_of
from ..choices import Placement, int_rows
from ..flags import FlagValue, flag_lines
from ..table import PENDING, RELEASED, check_keys
from .vllm_table import EPLB, TABLE

MAP_FILE, LINE_FILE, RANKS_FILE = (
    "pending_expert_map.json",
    "pending_initial_mapping.jsonl",
    "pending_expert_ranks.json",
)
INITIAL_FLAGS, LINE_FLAGS = "flags_pending_49572.txt", "flags_pending_41141.txt"
RANKS_FLAGS, V4_FLAGS = "flags_pending_34811.txt", "flags_pending_53022.txt"
DAY = "September 2026"


def pending_files(
    placement: Placement, model: ModelSpec, flags: Mapping[str, FlagValue]
) -> tuple[dict[str, str], list[str]]:
    """Return the files of proposals that can say this placement, and a line for each of what it is."""
    rows = placement.physical_to_logical.tolist()
    config = {"num_redundant_experts": placement.num_redundant}
    line = {
        "record_type": "eplb_initial_mapping", "version": 1, **config, "num_slots": placement.num_slots,
        "initial_global_assignments": {str(layer): one for layer, one in enumerate(rows)},
    }  # fmt: skip
    files = {
        MAP_FILE: json.dumps(rows) + "\n",
        INITIAL_FLAGS: _with(flags, config | {"initial_expert_map_path": MAP_FILE}),
        LINE_FILE: json.dumps(line) + "\n",
        LINE_FLAGS: _with(flags, config | {"initial_mapping_path": LINE_FILE, "disable_online_rebalancing": True}),
    }
    said = [_said(INITIAL_FLAGS, MAP_FILE, "49572"), _said(LINE_FLAGS, LINE_FILE, "41141")]
    ranks = rank_of_experts(placement)
    if ranks is not None:
        files[RANKS_FILE] = json.dumps({"expert_to_ep_rank": ranks}) + "\n"
        kept = {key: value for key, value in flags.items() if key not in ("--enable-eplb", "--eplb-config")}
        files[RANKS_FLAGS] = flag_lines(kept | {"--expert-placement-file": RANKS_FILE})
        said.append(_said(RANKS_FLAGS, RANKS_FILE, "34811"))
    return files, said


def pending_v4(placement: Placement, flags: Mapping[str, FlagValue]) -> tuple[dict[str, str], list[str]]:
    """Return the files of the proposal for DeepSeek V4, whose released class takes no placement, and a line of what they are."""
    kept = {key: value for key, value in flags.items() if key != "--expert-placement-strategy"} | {
        "--enable-eplb": True
    }
    config = {"num_redundant_experts": placement.num_redundant, "expert_map_path": MAP_FILE}
    files = {MAP_FILE: json.dumps(placement.physical_to_logical.tolist()) + "\n", V4_FLAGS: _with(kept, config)}
    line = f"{_said(V4_FLAGS, MAP_FILE, '53022')}. The map's layout is that of its description; it was not tried"
    return files, [line]


def rank_of_experts(placement: Placement) -> list[int] | None:
    """Return the rank of every expert where all layers agree and there are no copies, else None."""
    if placement.num_redundant:
        return None
    of_slot = np.arange(placement.num_slots) // placement.slots_per_rank
    ranks = np.empty((placement.num_layers, placement.num_logical), dtype=np.int64)
    for layer, one in enumerate(placement.physical_to_logical):
        ranks[layer, one] = of_slot
    return [int(rank) for rank in ranks[0]] if bool((ranks == ranks[0]).all()) else None


def check_v4(files: Mapping[str, str], model: ModelSpec, ranks: int) -> None:
    """Return nothing; raises InputError where the map of DeepSeek V4's proposal is not a placement of the model."""
    rows = _listed(files[MAP_FILE])
    if len(rows) != model.num_moe_layers:
        raise InputError(MAP_FILE, len(rows), f"{model.name} has {model.num_moe_layers} MoE layers", "emit again")
    placed(rows, model, ranks, 1)


def check_pending(files: Mapping[str, str], placement: Placement, read: Callable[[str, str], dict[str, Any]]) -> None:
    """Return nothing; raises InputError where a proposal's file or flags do not say the placement.

    read: from a file of flags to their values, pending ones taken too.
    """
    rows, standings = placement.physical_to_logical.tolist(), (RELEASED, PENDING)
    for name in (INITIAL_FLAGS, LINE_FLAGS, V4_FLAGS):
        if name in files:
            config = read(files[name], name).get("--eplb-config")
            check_keys(config, TABLE, EPLB, {"num_redundant_experts"}, standings=standings)
    if RANKS_FLAGS in files and "--enable-eplb" in read(files[RANKS_FLAGS], RANKS_FLAGS):
        raise InputError(f"{RANKS_FLAGS}: --enable-eplb", True, "not with --expert-placement-file", "drop it")
    if MAP_FILE in files and _listed(files[MAP_FILE]) != rows:
        raise InputError(MAP_FILE, "(rows)", "not the policy's placement", "emit again")
    if LINE_FILE in files:
        line = parse_json(text_of(files, LINE_FILE), LINE_FILE, LINE_FILE)
        assigned = line.get("initial_global_assignments") if isinstance(line, dict) else None
        if (
            assigned != {str(layer): one for layer, one in enumerate(rows)}
            or line.get("num_slots") != placement.num_slots
        ):
            raise InputError(LINE_FILE, "(rows)", "not the policy's placement", "emit again")
    if RANKS_FILE in files:
        table = parse_json(files[RANKS_FILE], RANKS_FILE, RANKS_FILE)
        if table != {"expert_to_ep_rank": rank_of_experts(placement)}:
            raise InputError(RANKS_FILE, "(ranks)", "not the policy's placement", "emit again")


def _listed(text: str) -> list[list[int]]:
    """Return the rows of a file that is one list; raises InputError for anything else."""
    return int_rows(parse_json(f'{{"rows": {text}}}', MAP_FILE, MAP_FILE)["rows"], MAP_FILE)


def _with(flags: Mapping[str, FlagValue], config: dict[str, Any]) -> str:
    """Return the flags of a proposal: those of the release with another `--eplb-config`."""
    return flag_lines({**flags, "--eplb-config": config})


def _said(flags_file: str, file: str, number: str) -> str:
    return (f"{flags_file} with {file}: pending. For a version built with vLLM's pull request {number}, which was open in {DAY}; "
            "0.33.0 refuses it. Use it instead of the policy, not with it")  # fmt: skip
