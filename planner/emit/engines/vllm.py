"""vLLM: flags, `--eplb-config`, and a policy that returns the planned placement; experts in host memory (`vllm_weights`).

Modelled: vLLM 0.33.0 loads no placement file. Where the plan is the contiguous one without copies, a flag says so. Any other
placement comes from a balancing policy (`distributed/eplb/policy/abstract.py`) that ignores loads and answers with the plan where it is
asked for the plan's shape, and as the engine's own policy otherwise (draft layers are a model of their own); a plugin puts it where
the engine looks for its default policy. Models whose class does not take part in balancing get no placement. Files that proposals
would load are written beside (`vllm_pending`). Ignored: other versions' policy interfaces.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from ....base.errors import InputError
from ....specs.drafting import has_drafts
from ....specs.models import ModelSpec
from ..checks import needed, placed, row_length, text_of, typed
from ..choices import Emission, EpChoice, Placement, as_run, contiguous, int_rows, left_out
from ..drafting import VLLM_CONFIG, ep_facts, vllm_config
from ..flags import FLAGS_FILE, USE_FLAGS, FlagValue, flag_lines
from ..parallel_notes import (
    COMMON,
    attention_groups,
    exchange_kind,
    exchange_notes,
    micro_batch_notes,
    moved,
    normal_mode,
    plain,
    replica_notes,
)
from ..table import PENDING, check_keys, flags_of
from ..target import OffloadTarget, ParallelTarget, Target
from .vllm_pending import MAP_FILE, check_pending, check_v4, pending_files, pending_v4
from .vllm_table import EPLB, TABLE
from .vllm_weights import check_offload, render_offload

POLICY_FILE, PLUGIN_FILE = "planned_placement.py", "pyproject.toml"

_POLICY = '''\
"""The placement of a moeplan plan, as a balancing policy of vLLM: whatever the loads, it answers with the plan."""

import logging

import torch
from vllm.distributed.eplb.policy import EPLB_POLICIES
from vllm.distributed.eplb.policy.abstract import AbstractEplbPolicy
from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

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
        if asked != planned:  # a draft model's layers, or a server of another size
            logging.getLogger("vllm.planned_placement").warning(
                "planned for (layers, slots, ranks) = %s, asked for %s: vLLM's own policy answers", planned, asked
            )
            return DefaultEplbPolicy.rebalance_experts(
                weight, num_replicas, num_groups, num_nodes, num_ranks, old_global_expert_indices
            )
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
_REBALANCE_ARGUMENTS = [
    "cls",
    "weight",
    "num_replicas",
    "num_groups",
    "num_nodes",
    "num_ranks",
    "old_global_expert_indices",
]


def render(choice: EpChoice, model: ModelSpec) -> Emission:
    """Return the flags, and the policy and its plugin unless a flag alone gives the placement or the model takes none."""
    honoured = model.family in (TABLE.places or ())
    placement = choice.placement if honoured else plain(choice)
    tensor, data = attention_groups(choice)
    flags: dict[str, FlagValue] = {
        "--tensor-parallel-size": tensor,
        "--data-parallel-size": data,
        "--enable-expert-parallel": True,
        "--all2all-backend": "deepep_high_throughput" if normal_mode(choice) else "deepep_low_latency",
        "--enable-dbo": choice.schedule.pipeline.micro_batches > 1,
    }
    files: dict[str, str] = {}
    usage = [USE_FLAGS]
    notes = [
        *exchange_notes(choice),
        *replica_notes(choice, "even", "vLLM spreads tokens evenly over an expert's copies"),
        *micro_batch_notes(choice, 2),
        *left_out(choice.schedule, COMMON),
    ]
    facts = [*_facts(choice), *ep_facts(choice.draft)]
    if choice.draft is not None:
        flags[VLLM_CONFIG] = vllm_config(choice.draft)
    changes: dict[str, object] = {
        "all_to_all__kind": exchange_kind(choice), "all_to_all__tiers": "together", "replica__choice": "even",
        "pipeline__micro_batches": min(choice.schedule.pipeline.micro_batches, 2),
    }  # fmt: skip
    if is_linear(placement):
        flags["--expert-placement-strategy"] = "linear"
        if not honoured and not is_linear(choice.placement):
            notes.insert(0, f"placement: {model.family} models take no part in vLLM's balancing: experts stay in their order, without "
                         "copies, and no policy is written")  # fmt: skip
            changes |= {"placement__policy": "contiguous", "placement__num_redundant": 0}
            if model.family == "deepseek_v4":
                more, said = pending_v4(choice.placement, flags)
                files |= more
                facts += said
    else:
        flags["--enable-eplb"] = True
        flags["--eplb-config"] = {"num_redundant_experts": placement.num_redundant, "policy": "default"}
        rows = "\n".join(f"    {one}," for one in placement.physical_to_logical.tolist())
        files = {POLICY_FILE: _POLICY.format(num_ranks=placement.num_ranks, rows=rows), PLUGIN_FILE: _PLUGIN}
        usage.append(f"install the folder of {POLICY_FILE} on every node before the start: pip install FOLDER")
        notes.append("placement: no file is loaded at the start. The planned placement is in force after the first rebalancing, "
                     "a quarter of step_interval (3000 forward passes unless set in --eplb-config) after the start; "
                     "until then slot i holds expert i modulo the number of experts")  # fmt: skip
        notes.append("placement: the policy follows the interface of vLLM 0.33; other versions may differ")
        if has_drafts(model):
            facts.append("draft (MTP) layers are balanced as a model of their own: asked for another shape than the plan's, the policy "
                         "answers as vLLM's own does")  # fmt: skip
        more, said = pending_files(placement, model, flags)
        files |= more
        facts += said
    if placement.num_nodes > 1:
        usage.append(
            "add --data-parallel-size-local, --data-parallel-address and --data-parallel-start-rank for several nodes"
        )
    files[FLAGS_FILE] = flag_lines(flags)
    return Emission(
        engine=TABLE.engine, files=files, usage=tuple(usage), notes=tuple(notes), facts=tuple(facts),
        runs=as_run(choice.schedule, COMMON, **moved(choice, changes)),
    )  # fmt: skip


def _facts(choice: EpChoice) -> list[str]:
    if normal_mode(choice):
        said = ("--all2all-backend deepep_high_throughput turns CUDA graphs off wherever data-parallel-size is above 1, in decode too: "
                "for servers that only do prefill; write deepep_low_latency where one server does both")  # fmt: skip
        return [said]
    return ["--all2all-backend deepep_low_latency keeps CUDA graphs in decode"]


def is_linear(placement: Placement) -> bool:
    """Return whether experts sit in their order, without copies.

    vLLM's other strategy, round_robin, is not used: it is honoured only for models with several expert groups, and is replaced by
    linear with a warning otherwise; the policy says the same for every model.
    """
    sizes = (placement.num_layers, placement.num_logical, placement.num_slots, placement.num_ranks, placement.num_nodes)
    return placement.num_redundant == 0 and placement.same_as(contiguous(*sizes))


def check(files: Mapping[str, str], model: ModelSpec) -> Placement | None:
    """Return the placement that vLLM's policy file holds, or None where a flag alone says it; raises InputError otherwise."""
    flags = flags_of(text_of(files, FLAGS_FILE), TABLE, FLAGS_FILE)
    needed(flags, "--enable-expert-parallel", FLAGS_FILE)
    if "--enable-eplb" not in flags:
        needed(flags, "--expert-placement-strategy", FLAGS_FILE)
        if MAP_FILE in files:
            check_v4(files, model, flags.get("--tensor-parallel-size", 1) * flags.get("--data-parallel-size", 1))
        return None
    if model.family not in (TABLE.places or ()):
        raise InputError(
            f"{FLAGS_FILE}: --enable-eplb", True, f"{model.family} models take no part in balancing", "leave it out"
        )
    config = needed(flags, "--eplb-config", FLAGS_FILE)
    check_keys(config, TABLE, EPLB)
    if config.get("use_async", True) and config.get("communicator") in ("torch_nccl", "pynccl"):
        raise InputError("--eplb-config: communicator", config["communicator"], "not with use_async", "choose another")
    if POLICY_FILE not in files:
        raise InputError("files", sorted(files), "not one policy file", "emit again")
    rows, ranks = _policy_rows(files[POLICY_FILE], POLICY_FILE)
    row_length(len(rows[0]), model.num_experts + config.get("num_redundant_experts", 0), POLICY_FILE)
    if len(rows) != model.num_moe_layers:
        raise InputError(
            POLICY_FILE, len(rows), f"{model.name} has {model.num_moe_layers} MoE layers", "give one row for each"
        )
    sizes = flags.get("--tensor-parallel-size", 1), flags.get("--data-parallel-size", 1)
    if sizes[0] * sizes[1] != ranks:
        raise InputError(
            f"{FLAGS_FILE}: tensor and data parallel size", sizes, f"the policy is for {ranks} ranks", "emit again"
        )
    placement = placed(rows, model, ranks, 1)
    check_pending(files, placement, lambda text, name: flags_of(text, TABLE, name, (*_NOW, PENDING)))
    return placement


_NOW = ("released", "fork")


def _policy_rows(source: str, where: str) -> tuple[list[list[int]], int]:
    """Return the placement and ranks of a policy file, read without running it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        raise InputError(where, "(text)", "not Python", "emit again") from None
    values: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                raise InputError(
                    f"{where}: {node.targets[0].id}", "(code)", "not a plain value", "emit again"
                ) from None
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    bases = [base.id for node in classes for base in node.bases if isinstance(base, ast.Name)]
    methods = [
        node
        for one in classes
        for node in one.body
        if isinstance(node, ast.FunctionDef) and node.name == "rebalance_experts"
    ]
    if bases != ["AbstractEplbPolicy"] or len(methods) != 1:
        raise InputError(where, bases, "not one subclass of AbstractEplbPolicy with rebalance_experts", "emit again")
    names = [argument.arg for argument in methods[0].args.args]
    if names != _REBALANCE_ARGUMENTS:
        raise InputError(
            f"{where}: rebalance_experts", names, f"vLLM calls it with {_REBALANCE_ARGUMENTS}", "emit again"
        )
    return int_rows(values.get("PHYSICAL_TO_LOGICAL"), f"{where}: PHYSICAL_TO_LOGICAL"), typed(
        values, "NUM_RANKS", int, where
    )


TARGET = Target(
    table=TABLE,
    parallel=ParallelTarget(render=render, check=check),
    offload=OffloadTarget(render=render_offload, check=check_offload),
)
