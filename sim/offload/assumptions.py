"""What a reader must know before trusting a prediction, in words.

Modelled: what the recording lacks, what the schedule knows that nothing that runs could know, what was left out of the window. Ignored:
where costs come from (`metrics` says it of every figure).
"""

from __future__ import annotations

from ...specs.schedules.offload import OffloadSchedule
from ..policies.bundled import knows_future
from .drafting.draft import Drafting
from .workload import Workload


def assumptions(schedule: OffloadSchedule, workload: Workload, drafting: Drafting | None, *, num_layers: int, num_experts: int,
                window_steps: int | None, host_expert_bytes: int) -> tuple[str, ...]:  # fmt: skip
    """Return what is taken for granted of a resolved schedule on a window.

    num_experts: of each of `num_layers` layers. window_steps: where the window was cut; None: nowhere.
    """
    found = []
    if schedule.predictor.kind == "synthetic":
        found.append(
            f"the recording holds no early guesses: a recall of {schedule.predictor.recall:g} one layer ahead is assumed"
        )
    if schedule.predictor.kind == "pre-gate":
        found.append(
            "a pre-gate needs a model that was fine-tuned for it; outputs are then not those of the original model"
        )
    if schedule.predictor.kind == "oracle" or knows_future(schedule.cache.policy):
        found.append("this schedule knows the future: a reference, not something that can be run")
    if schedule.cache.policy == "static" and (schedule.cache.experts_per_layer or 0) < num_experts:
        found.append(f"expert popularity was counted on {workload.popularity_source}")
    if window_steps is not None and workload.num_steps == window_steps:
        found.append(f"only the first {workload.num_steps} forward passes of the recording are replayed")
    if schedule.copy.host_experts is not None:
        held, each = schedule.copy.host_experts, host_expert_bytes
        found.append(
            f"the host's memory holds {held} experts of {each} bytes, at first the most popular ones of those that do not stay on "
            f"the device; the others of the {num_layers * num_experts} are read from the disk when they are needed"
        )
    if drafting is not None:
        found.append(f"drafted: {drafting.words}; a rejected guess routes as another token of the replies does")
    found.append("caches start empty; loading the dense weights and a static cache's experts is not timed")
    return tuple(found)
