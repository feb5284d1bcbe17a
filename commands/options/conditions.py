"""Which options of a command count when: one table, and one check that refuses an option where it would be ignored.

Modelled: an option without an entry always counts. An option with conditions counts where all of them hold; given on the
command line elsewhere it is refused, even with its default as the value. Ignored: whether a value is any good (the command
and what it calls say so).
"""

from __future__ import annotations

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
    remedy="leave it out, or plan with --mode offload",
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
MEASURING = Condition(
    holds=lambda given: given["tables"] is None,
    rule="nothing is measured where --from names another tool's output",
    remedy="leave it out",
)
IMPORTING = Condition(
    holds=lambda given: given["tables"] is not None,
    rule="only --from starts from a known machine",
    remedy="leave it out",
)
ONE_PLAN = Condition(
    holds=lambda given: given["grid_path"] is None,
    rule="counts for a plan; a grid's file says it for itself",
    remedy="leave it out, or write it into the grid",
)
NO_STEPS = Condition(
    holds=lambda given: given["steps"] is None,
    rule="--steps says already how long the runs are",
    remedy="give one of the two",
)

CONDITIONS: Mapping[str, Mapping[str, tuple[Condition, ...]]] = {
    "plan": {
        "objective": (OFFLOAD,),
        "floor": (OFFLOAD, LEAST_MEMORY),
        "exhaustive": (OFFLOAD,),
        "window": (OFFLOAD,),
        "concurrency": (OFFLOAD,),
        "prefill_chunk": (OFFLOAD,),
        "nodes": (EXPERT_PARALLEL,),
        "ranks_per_node": (EXPERT_PARALLEL,),
        "redundant": (EXPERT_PARALLEL,),
        "phase": (EXPERT_PARALLEL,),
        "context": (EXPERT_PARALLEL,),
        "tokens_per_rank": (EXPERT_PARALLEL,),
        "search_moves": (EXPERT_PARALLEL,),
        "evaluate_on": (EXPERT_PARALLEL,),
    },
    "calibrate": {
        "device": (MEASURING,),
        "quick": (MEASURING,),
        "model": (MEASURING,),
        "bits": (MEASURING,),
        "seconds": (MEASURING,),
        "hardware": (IMPORTING,),
    },
    "validate": {
        "trace": (ONE_PLAN,),
        "baselines": (ONE_PLAN,),
        "steps": (ONE_PLAN,),
        "seconds": (ONE_PLAN, NO_STEPS),
        "memory": (ONE_PLAN,),
        "repeats": (ONE_PLAN,),
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
                    raise InputError(max(parameter.opts, key=len), value, condition.rule, condition.remedy)
        return super().invoke(ctx)


def was_given(ctx: Any, name: str) -> bool:
    """Return whether a parameter stands on the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and str(source.name) == "COMMANDLINE"
