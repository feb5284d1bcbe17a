"""Pages and timelines that commands write beside their result.

Modelled: which part of a long timeline a viewer is given, and which curves a report needs. Ignored: how pages look (`reports/`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TIMELINE_STEPS = 64


def write_perfetto(path: Path, simulation: Any, prediction: Any) -> None:
    """Write the Perfetto timeline of a prediction, with how much the device holds; of a long one, the middle."""
    from ..reports.timelines.occupancy import cache_occupancy
    from ..reports.timelines.perfetto import write_timeline

    timeline, steps = prediction.outcome.timeline, prediction.metrics.num_steps
    last = steps
    if steps > _TIMELINE_STEPS:  # a viewer chokes on more; the middle is past the cold start
        first = (steps - _TIMELINE_STEPS) // 2
        last = first + _TIMELINE_STEPS
        timeline = timeline.steps(first, last - 1)
        sys.stderr.write(f"{path}: steps {first} to {last - 1} of {steps}\n")
    write_timeline(path, timeline, occupancy=cache_occupancy(simulation, prediction.schedule, num_steps=last))


def write_offload_report(
    path: Path, document: dict[str, Any], simulation: Any, best: Any, *, more_sections: Sequence[Any] = ()
) -> None:
    """Write the HTML report of a plan, with the curves of hit rate against cache size and sections of one's own."""
    from ..reports.offload.hit_curves import hit_curves
    from ..reports.offload.page import write_plan_report

    lru, belady = hit_curves(simulation, best.schedule)
    write_plan_report(path, document, timeline=best.outcome.timeline, lru_curve=lru, belady_curve=belady, profile=simulation.profile,
                      command=document["provenance"].get("command"), more_sections=more_sections)  # fmt: skip


def write_parallel_artefacts(
    report: Path | None, timeline: Path | None, document: dict[str, Any], replay: Any, profile: Any
) -> None:
    """Write the HTML report of an expert-parallel plan and the Perfetto timeline of its first reported step, where asked for."""
    from ..reports.parallel.page import write_parallel_report
    from ..reports.timelines.perfetto import write_timeline

    before, after = replay.before.outcome.timeline, replay.after.outcome.timeline
    if timeline is not None:
        write_timeline(timeline, after)
    if report is not None:
        write_parallel_report(report, document, before=before, after=after, profile=profile)
