"""SGLang, expert parallel: `--init-expert-location` with the placement of every hidden layer, and flags.

Modelled: the map of SGLang 0.5.23 (`srt/eplb/expert_location.py`): one row per hidden layer, dense ones included and trivial
there; static replica choice, which is nearest-first; DeepEP modes; two-batch overlap. Ignored: SGLang's own balancer, which stays
off so that the planned placement is kept.
"""

from __future__ import annotations

import json

from ...specs import ModelSpec
from .choices import Emission, EpChoice, left_out
from .expert_parallel_notes import (
    COMMON,
    DEEPEP_NORMAL,
    attention_groups,
    deepep_mode,
    exchange_notes,
    micro_batch_notes,
    replica_notes,
)
from .flags import FLAGS_FILE, USE_FLAGS, FlagValue, flag_lines

LOCATION_FILE = "expert_location.json"


def render(choice: EpChoice, model: ModelSpec) -> Emission:
    """Return the expert-location file and the flags that load it."""
    placement, pipeline = choice.placement, choice.schedule.pipeline
    trivial = [slot % model.num_experts for slot in range(placement.num_slots)]
    rows = [trivial] * model.num_layers
    for layer, row in zip(model.moe_layers, placement.physical_to_logical.tolist(), strict=True):
        rows[layer] = row
    _, data = attention_groups(choice)
    dynamic = choice.schedule.replica.choice == "even"
    flags: dict[str, FlagValue] = {
        "--tp-size": placement.num_ranks,
        "--ep-size": placement.num_ranks,
        "--nnodes": placement.num_nodes,
        "--enable-dp-attention": data > 1,
    }
    if data > 1:
        flags["--dp-size"] = data
    flags |= {
        "--moe-a2a-backend": "deepep",
        "--deepep-mode": "normal" if deepep_mode(choice) == DEEPEP_NORMAL else "low_latency",
        "--init-expert-location": LOCATION_FILE,
        "--ep-num-redundant-experts": placement.num_redundant,
        "--ep-dispatch-algorithm": "dynamic" if dynamic else "static",
        "--enable-two-batch-overlap": pipeline.micro_batches > 1,
    }
    how = "SGLang's static choice is nearest first: own device, own node, then spread evenly"
    notes = [
        *exchange_notes(choice),
        *replica_notes(choice, "even" if dynamic else "nearest", how),
        *micro_batch_notes(choice, 2),
        *left_out(choice.schedule, COMMON, {"pipeline.exchange_sm_fraction": "set num_sms in --deepep-config"}),
    ]
    text = json.dumps({"physical_to_logical_map": rows}) + "\n"
    usage = (USE_FLAGS, f"{LOCATION_FILE} is named relative to the folder the server starts in",
             "add --node-rank and --dist-init-addr on every node where there are several")  # fmt: skip
    files = {LOCATION_FILE: text, FLAGS_FILE: flag_lines(flags)}
    return Emission(engine="SGLang 0.5.23", files=files, usage=usage, notes=tuple(notes))
