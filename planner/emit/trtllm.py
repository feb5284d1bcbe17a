"""TensorRT-LLM, expert parallel: the `moe_load_balancer` file and the extra options that name it.

Modelled: `MoeLoadBalancerConfig` with a static assignment of every MoE layer by its absolute index (`layer_updates_per_iter` 0),
and the wide-EP backend that honours it. Ignored: online rebalancing, precision and kernel options.
"""

from __future__ import annotations

from typing import Any

import yaml

from ...specs import ModelSpec
from .choices import Emission, EpChoice, left_out
from .expert_parallel_notes import COMMON, micro_batch_notes, own_exchange_notes, replica_notes

BALANCER_FILE, OPTIONS_FILE = "moe_load_balancer.yaml", "extra_llm_api_options.yaml"
# libyaml's writer where PyYAML was built with it, else the same in Python.
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def render(choice: EpChoice, model: ModelSpec) -> Emission:
    """Return the load balancer's file and the options file that names it."""
    placement = choice.placement
    balancer = {
        "num_slots": placement.num_slots,
        "initial_global_assignments": dict(zip(model.moe_layers, placement.physical_to_logical.tolist(), strict=True)),
        "layer_updates_per_iter": 0,
    }
    options = {
        "tensor_parallel_size": placement.num_ranks,
        "moe_expert_parallel_size": placement.num_ranks,
        "gpus_per_node": placement.ranks_per_node,
        "enable_attention_dp": choice.schedule.parallel.attention == "data",
        "moe_config": {"backend": "WIDEEP", "load_balancer": f"./{BALANCER_FILE}"},
    }
    notes = [
        *own_exchange_notes(choice, "TensorRT-LLM"),
        *replica_notes(choice, "even", "TensorRT-LLM spreads tokens evenly over an expert's copies"),
        *micro_batch_notes(choice, 1),
        *left_out(choice.schedule, COMMON),
    ]
    if choice.schedule.parallel.attention == "tensor" and placement.num_nodes > 1:
        notes.append("parallel.attention=tensor: all ranks share each attention layer, not those of a node")
    return Emission(
        engine="TensorRT-LLM",
        files={BALANCER_FILE: _yaml(balancer), OPTIONS_FILE: _yaml(options)},
        usage=(
            f"pass --extra_llm_api_options {OPTIONS_FILE}; {BALANCER_FILE} is named relative to the working folder",
        ),
        notes=tuple(notes),
    )


def _yaml(table: dict[str, Any]) -> str:
    """Return `table` as YAML: keys in order, lists of numbers on one line."""
    return str(yaml.dump(table, Dumper=_DUMPER, sort_keys=False, default_flow_style=None, width=2**20))
