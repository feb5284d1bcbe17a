"""What ranks on the cores of a host can really run of an expert-parallel schedule, and what they make of it.

Modelled: ranks that exchange tokens with a library for processes (`executor.parallel`): whole experts, tokens in two or four bytes for each
value. They have no multiprocessors to keep for exchanges and loop over experts in either kernel; how much threads that compute and threads
that exchange cost each other was measured. Ignored: whether a schedule is any good there.
"""

from __future__ import annotations

from ...base.errors import InputError
from ...specs.models import ModelSpec
from ...specs.schedules.parallel import ExpertParallelSchedule

WIRE = {4.0: "float32", 2.0: "bfloat16"}
"""What tokens travel as, by their bytes for each value."""


def check_runnable(schedule: ExpertParallelSchedule, model: ModelSpec) -> None:
    """Return nothing; raises InputError for what is only simulated."""
    parallel, pipeline = schedule.parallel, schedule.pipeline
    if parallel.attention != "data" or parallel.experts != "expert":
        raise InputError("schedule.parallel", f"{parallel.attention}, {parallel.experts}", "slices of layers: simulated but not executed",
                         "plan with parallel.attention=data and parallel.experts=expert")  # fmt: skip
    if pipeline.split == "tile":
        raise InputError("schedule.pipeline.split", "tile", "an idealised division: simulated but not executed",
                         "use expert or token")  # fmt: skip
    if model.num_shared_experts and (pipeline.shared_overlap or pipeline.shortcut):
        raise InputError("schedule.pipeline.shared_overlap", True, "shared experts run with attention here",
                         "set pipeline.shared_overlap=false")  # fmt: skip
    for name in ("dispatch_bytes_per_value", "combine_bytes_per_value"):
        value = float(getattr(schedule.all_to_all, name))
        if value not in WIRE:
            known = " or ".join(f"{each:g}" for each in WIRE)
            raise InputError(
                f"schedule.all_to_all.{name}",
                value,
                f"tokens travel in {known} bytes for each value",
                "use one of these",
            )


def as_run_on_cores(schedule: ExpertParallelSchedule, model: ModelSpec) -> ExpertParallelSchedule | None:
    """Return what ranks on cores run when they are told `schedule`; None where they cannot."""
    changes: dict[str, object] = {"kernel__choice": "grouped", "pipeline__all_to_all_sm_fraction": 0.0}
    if schedule.all_to_all.kind != "hierarchical":
        changes["all_to_all__tiers"] = "together"
    elif schedule.all_to_all.tiers == "together":
        changes["all_to_all__tiers"] = "in-turn"  # a stage ends before the next one begins
    if model.num_shared_experts and not schedule.pipeline.shortcut:
        changes["pipeline__shared_overlap"] = False
    told = schedule.with_options(**changes)
    try:
        check_runnable(told, model)
    except InputError:
        return None
    return told
