"""Which options of a command count when: one table, and one check that refuses an option where it would be ignored.

Modelled: an option without an entry always counts. An option with conditions counts where all of them hold; given on the
command line elsewhere it is refused, even with its default as the value. Ignored: whether a value is any good (the command
and what it calls say so).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import typer
import typer.core

from ...base.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """When an option counts, and what to say where it does not."""

    holds: Callable[[Mapping[str, Any]], bool]
    """Of the command's parameters by name."""
    rule: str
    remedy: str


# An unknown mode is neither: the command itself says which there are.
OFFLOAD = Condition(
    holds=lambda given: given["mode"] != "ep",
    rule="counts for one device only, not for expert parallel",
    remedy="leave it out, or use --mode offload",
)
EXPERT_PARALLEL = Condition(
    holds=lambda given: given["mode"] != "offload",
    rule="counts for expert parallel only",
    remedy="leave it out, or add --mode ep",
)
LEAST_MEMORY = Condition(
    holds=lambda given: given["objective"] == "least_memory",
    rule="only --objective least_memory has a floor",
    remedy="leave it out, or add --objective least_memory",
)
A_PERIOD = Condition(
    holds=lambda given: bool(given["period"]),
    rule="no period is given over which experts could move",
    remedy="leave it out, or add --period",
)
NO_TARGET = Condition(
    holds=lambda given: given["target"] is None,
    rule="every setting of an engine is run to the end anyway",
    remedy="leave it out",
)
MEASURING = Condition(
    holds=lambda given: _tool(given) is None,
    rule="nothing is measured where --from names another tool's figures",
    remedy="leave it out",
)
OF_RANKS = Condition(
    holds=lambda given: given["ranks"] is not None,
    rule="counts for ranks that are measured",
    remedy="leave it out, or add --ranks",
)
IMPORTING = Condition(
    holds=lambda given: _tool(given) is not None,
    rule="only --from reads what was measured elsewhere",
    remedy="leave it out, or add --from and the tool's name",
)
FROM_A_FILE = Condition(
    holds=lambda given: _tool(given) != "aiconfigurator",
    rule="aiconfigurator's tables are the installed wheel's, and --system names the machine",
    remedy="leave it out",
)
KERNELS = Condition(
    holds=lambda given: _tool(given) == "aiconfigurator",
    rule="only aiconfigurator's tables are of several systems",
    remedy="leave it out, or use --from aiconfigurator",
)
SPEEDS_OR_KERNELS = Condition(
    holds=lambda given: _tool(given) in ("llama-bench", "vllm-bench", "aiconfigurator"),
    rule="counts for --from llama-bench, vllm-bench or aiconfigurator only",
    remedy="leave it out",
)
SPEEDS = Condition(
    holds=lambda given: _tool(given) in ("llama-bench", "vllm-bench"),
    rule="counts for speeds of --from llama-bench or vllm-bench only",
    remedy="leave it out",
)
MEASURING_OR_SPEEDS = Condition(
    holds=lambda given: _tool(given) is None or SPEEDS.holds(given),
    rule="says nothing of links between devices",
    remedy="leave it out",
)
NO_SPEEDS = Condition(
    holds=lambda given: not SPEEDS.holds(given),
    rule="speeds of another tool leave no samples",
    remedy="leave it out",
)
BATCHES = Condition(
    holds=lambda given: _tool(given) == "vllm-bench",
    rule="counts for --from vllm-bench only: other files say it",
    remedy="leave it out",
)
RUNNING = Condition(
    holds=lambda given: _tool(given) is None,
    rule="nothing runs where --from names speeds that were measured",
    remedy="leave it out",
)
ONE_PLAN = Condition(
    holds=lambda given: given["grid_path"] is None,
    rule="counts for a plan; a grid's file says it for itself",
    remedy="leave it out, or write it into the grid",
)
A_COMMAND = Condition(
    holds=lambda given: given["tables"] is None,
    rule="counts beside --command; a benchmark's file says it for itself",
    remedy="leave it out",
)
REFRESHING = Condition(
    holds=lambda given: bool(given["refresh"]),
    rule="counts where a baseline is written anew",
    remedy="leave it out, or add --refresh",
)
NO_REFRESH = Condition(
    holds=lambda given: not given["refresh"],
    rule="nothing fails where the baseline is written anew",
    remedy="leave it out",
)
NOT_STRICT = Condition(
    holds=lambda given: not given["strict"],
    rule="--strict lets no figure move",
    remedy="give one of the two",
)
HERE = Condition(
    holds=lambda given: given["backend"] not in ("ray", "dask"),
    rule="a cluster has as many workers as it has",
    remedy="leave it out",
)
A_CLUSTER = Condition(
    holds=lambda given: given["backend"] != "local",
    rule="only a cluster has an address",
    remedy="leave it out, or use --backend ray or dask",
)
A_PLAN = Condition(
    holds=lambda given: given["store"] is None,
    rule="counts for a plan; a store of studies has none",
    remedy="leave it out",
)
A_STORE = Condition(
    holds=lambda given: given["store"] is not None,
    rule="only a store holds studies",
    remedy="leave it out, or add --store",
)
NO_STEPS = Condition(
    holds=lambda given: given["steps"] is None,
    rule="--steps says already how long the runs are",
    remedy="give one of the two",
)


A_MODEL = Condition(
    holds=lambda given: given["model"] is not None,
    rule="a model runs over it",
    remedy="leave it out, or add --model and a checkpoint's folder",
)
NO_CHECKPOINT = Condition(
    holds=lambda given: given["checkpoint"] is None,
    rule="a checkpoint's model runs for --max-new-tokens, under rules that it can be run by",
    remedy="leave it out",
)
CHECKPOINT = Condition(
    holds=lambda given: given["checkpoint"] is not None,
    rule="counts for a model that runs",
    remedy="leave it out, or add --checkpoint",
)
A_PLAN_GIVEN = Condition(
    holds=lambda given: given["plan_path"] is not None,
    rule="what a model runs by is a plan",
    remedy="name the plan",
)


def _tool(given: Mapping[str, Any]) -> str | None:
    """Return the tool that --from names, alone or with its file; None without one."""
    named = given["tool"] if "tool" in given else given["tables"]
    return named if named is None or isinstance(named, str) else str(named[0])


CONDITIONS: Mapping[str, Mapping[str, tuple[Condition, ...]]] = {
    "check": {
        "strict": (NO_REFRESH,),
        "tolerance": (NO_REFRESH, NOT_STRICT),
        "why": (REFRESHING,),
        "output": (REFRESHING,),
    },
    "simulate": {
        **dict.fromkeys(
            (
                "quant",
                "ubatch",
                "window",
                "split",
                "draft",
                "cached_tokens",
                "length_spread",
                "requests",
                "lengths",
                "policy",
            ),
            (OFFLOAD,),
        ),
        **dict.fromkeys(
            ("nodes", "ranks_per_node", "attention_tp", "phase", "tokens_per_rank", "bits", "ttft", "tpot"),
            (EXPERT_PARALLEL,),
        ),
        "prefill_share": (EXPERT_PARALLEL,),
    },
    "plan": {
        "objective": (OFFLOAD,),
        "floor": (OFFLOAD, LEAST_MEMORY),
        "exhaustive": (OFFLOAD, NO_TARGET),
        "window": (OFFLOAD,),
        "policy": (OFFLOAD, NO_TARGET),
        **dict.fromkeys(
            (
                "quant",
                "cached_tokens",
                "length_spread",
                "requests",
                "lengths",
                "ubatch",
            ),
            (OFFLOAD,),
        ),
        "nodes": (EXPERT_PARALLEL,),
        "ranks_per_node": (EXPERT_PARALLEL,),
        "attention_tp": (EXPERT_PARALLEL,),
        "redundant": (EXPERT_PARALLEL,),
        **dict.fromkeys(("against", "factor"), (EXPERT_PARALLEL,)),
        "phase": (EXPERT_PARALLEL,),
        "tokens_per_rank": (EXPERT_PARALLEL,),
        "prefill_share": (EXPERT_PARALLEL,),
        "draft": (OFFLOAD,),
        "search_moves": (EXPERT_PARALLEL,),
        "evaluate_on": (EXPERT_PARALLEL,),
        "period": (EXPERT_PARALLEL,),
        **dict.fromkeys(("rebalance_every", "count_window", "moves"), (EXPERT_PARALLEL, A_PERIOD)),
    },
    "calibrate": {
        "device": (MEASURING,),
        "quick": (MEASURING,),
        "model": (MEASURING_OR_SPEEDS,),
        "text": (MEASURING, A_MODEL),
        "bits": (MEASURING,),
        "seconds": (MEASURING,),
        "ranks": (MEASURING,),
        **dict.fromkeys(("nodes", "link"), (MEASURING, OF_RANKS)),
        "file": (IMPORTING, FROM_A_FILE),
        "samples": (NO_SPEEDS, FROM_A_FILE),
        "hardware": (IMPORTING, FROM_A_FILE),
        "system": (KERNELS,),
        "quant": (SPEEDS,),
        "engine": (SPEEDS_OR_KERNELS,),
        **dict.fromkeys(("prompt_tokens", "reply_tokens", "concurrency", "ubatch"), (BATCHES,)),
    },
    "sweep": {"jobs": (HERE,), "address": (A_CLUSTER,)},
    "report": {"trace": (A_PLAN,), "timeline": (A_PLAN,), "study": (A_STORE,)},
    "diagnose": dict.fromkeys(
        ("measured_decode", "measured_prefill", "prompt_tokens", "reply_tokens", "concurrency"), (A_COMMAND,)
    ),
    "validate": {
        "trace": (RUNNING, ONE_PLAN),
        "baselines": (RUNNING, ONE_PLAN),
        "steps": (RUNNING, ONE_PLAN, NO_CHECKPOINT),
        "seconds": (RUNNING, ONE_PLAN, NO_STEPS, NO_CHECKPOINT),
        "memory": (RUNNING, ONE_PLAN),
        "repeats": (RUNNING, ONE_PLAN),
        **dict.fromkeys(("grid_path", "profile", "device", "settings", "report"), (RUNNING,)),
        "policy": (RUNNING, NO_CHECKPOINT),
        "checkpoint": (RUNNING, ONE_PLAN, A_PLAN_GIVEN),
        **dict.fromkeys(("prompt_file", "max_new_tokens", "gates"), (CHECKPOINT,)),
        **dict.fromkeys(("hardware", "model", "quant", "engine"), (SPEEDS,)),
        **dict.fromkeys(("prompt_tokens", "reply_tokens", "concurrency", "ubatch"), (BATCHES,)),
    },
}
"""Conditions by command and parameter."""


class ConditionedCommand(typer.core.TyperCommand):
    """A command whose options are held against the table before it runs."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; raises InputError for an option that was given where it does not count."""
        for parameter in self.params:
            if parameter.name is None or not was_given(ctx, parameter.name):
                continue
            for condition in CONDITIONS.get(str(self.name), {}).get(parameter.name, ()):
                if not condition.holds(ctx.params):
                    value = ctx.params[parameter.name]
                    value = value[0] if isinstance(value, list) and value else value
                    value = os.fspath(value) if isinstance(value, os.PathLike) else value
                    name = next((one for one in parameter.opts if one.startswith("--")), parameter.opts[0])
                    raise InputError(name, value, condition.rule, condition.remedy)
        return super().invoke(ctx)


def was_given(ctx: Any, name: str) -> bool:
    """Return whether a parameter stands on the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and str(source.name) == "COMMANDLINE"
