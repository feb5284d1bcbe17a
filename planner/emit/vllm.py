"""vLLM, expert parallel: flags, `--eplb-config`, and a policy that returns the planned placement.

Modelled: vLLM 0.33.0 loads no placement file. Where the plan is the contiguous or round-robin one without copies, a flag says
so. Any other placement comes from a balancing policy (`distributed/eplb/policy/abstract.py`) that ignores loads and returns
the plan; a plugin puts it where the engine looks for its default policy. Ignored: other versions' policy interfaces.
"""

from __future__ import annotations

from ...specs import ModelSpec
from .choices import Emission, EpChoice, Placement, contiguous, left_out, round_robin
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

POLICY_FILE, PLUGIN_FILE = "planned_placement.py", "pyproject.toml"

_POLICY = '''\
"""The placement of a moeplan plan, as a balancing policy of vLLM: whatever the loads, it answers with the plan."""

import torch
from vllm.distributed.eplb.policy import EPLB_POLICIES
from vllm.distributed.eplb.policy.abstract import AbstractEplbPolicy

NUM_RANKS = {num_ranks}
# One row per MoE layer, one column per slot: the logical expert it holds.
PHYSICAL_TO_LOGICAL = [
{rows}
]


class PlannedPlacementPolicy(AbstractEplbPolicy):
    """Answers every rebalancing with the planned placement, so that the first one brings it about and others move nothing."""

    @classmethod
    def rebalance_experts(
        cls, weight, num_replicas, num_groups, num_nodes, num_ranks, old_global_expert_indices=None
    ):
        asked = (weight.shape[0], num_replicas, num_ranks)
        planned = (len(PHYSICAL_TO_LOGICAL), len(PHYSICAL_TO_LOGICAL[0]), NUM_RANKS)
        if asked != planned:
            raise ValueError(f"planned for (layers, slots, ranks) = {{planned}}, started with {{asked}}")
        return torch.tensor(PHYSICAL_TO_LOGICAL, dtype=torch.int64, device=weight.device)


def register():
    """Put the plan in the place of the default policy; vLLM calls this in every process."""
    EPLB_POLICIES["default"] = PlannedPlacementPolicy
'''

_PLUGIN = """\
[build-system]
requires = ["setuptools>=61"]
build-backend = "setuptools.build_meta"

[project]
name = "planned-placement"
version = "1"

[project.entry-points."vllm.general_plugins"]
planned_placement = "planned_placement:register"

[tool.setuptools]
py-modules = ["planned_placement"]
"""


def render(choice: EpChoice, model: ModelSpec) -> Emission:
    """Return the flags, and the policy and its plugin unless a flag alone gives the placement."""
    placement = choice.placement
    tensor, data = attention_groups(choice)
    strategy = _strategy(placement)
    flags: dict[str, FlagValue] = {
        "--tensor-parallel-size": tensor,
        "--data-parallel-size": data,
        "--enable-expert-parallel": True,
        "--all2all-backend": "deepep_high_throughput" if deepep_mode(choice) == DEEPEP_NORMAL else "deepep_low_latency",
        "--enable-dbo": choice.schedule.pipeline.micro_batches > 1,
    }
    files, usage = {}, [USE_FLAGS]
    notes = [
        *exchange_notes(choice),
        *replica_notes(choice, "even", "vLLM spreads tokens evenly over an expert's copies"),
        *micro_batch_notes(choice, 2),
        *left_out(choice.schedule, COMMON),
    ]
    if strategy:
        flags["--expert-placement-strategy"] = strategy
    else:
        flags["--enable-eplb"] = True
        flags["--eplb-config"] = {"num_redundant_experts": placement.num_redundant, "policy": "default"}
        rows = "\n".join(f"    {row}," for row in placement.physical_to_logical.tolist())
        files = {POLICY_FILE: _POLICY.format(num_ranks=placement.num_ranks, rows=rows), PLUGIN_FILE: _PLUGIN}
        usage.append(f"install the folder of {POLICY_FILE} on every node before the start: pip install FOLDER")
        notes.append("placement: no file is loaded at the start. The planned placement is in force after the first rebalancing, "
                     "a quarter of step_interval (3000 forward passes unless set in --eplb-config) after the start; "
                     "until then slot i holds expert i modulo the number of experts")  # fmt: skip
        notes.append("placement: the policy follows the interface of vLLM 0.33; other versions may differ")
    if placement.num_nodes > 1:
        usage.append(
            "add --data-parallel-size-local, --data-parallel-address and --data-parallel-start-rank for several nodes"
        )
    files[FLAGS_FILE] = flag_lines(flags)
    return Emission(engine="vLLM 0.33.0", files=files, usage=tuple(usage), notes=tuple(notes))


def _strategy(placement: Placement) -> str:
    """Return the flag's name for a placement without copies that it can express, else nothing."""
    if placement.num_redundant == 0:
        sizes = (
            placement.num_layers,
            placement.num_logical,
            placement.num_slots,
            placement.num_ranks,
            placement.num_nodes,
        )
        if placement.same_as(contiguous(*sizes)):
            return "linear"
        if placement.same_as(round_robin(*sizes)):
            return "round_robin"
    return ""
