"""Pages and timelines that commands write beside their result.

Modelled: which part of a long timeline a viewer is given, and which curves a report needs. Ignored: how pages look (`reports/`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TIMELINE_STEPS = 64
# Rows of the table of an engine's settings.
_SETTINGS = 16


def write_perfetto(path: Path, simulation: Any, prediction: Any) -> None:
    """Write the Perfetto timeline of a prediction, with how much the device holds; of a long one, the middle."""
    from ...reports.timelines.occupancy import cache_occupancy
    from ...reports.timelines.perfetto import write_timeline

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
    from ...reports.offload.hit_curves import hit_curves
    from ...reports.offload.page import write_plan_report
    from ...reports.offload.request import request_sections

    lru, belady = hit_curves(simulation, best.schedule)
    write_plan_report(path, document, timeline=best.outcome.timeline, lru_curve=lru, belady_curve=belady, profile=simulation.profile,
                      command=document["provenance"].get("command"), more_sections=more_sections,
                      first_sections=served_sections(document), request_sections=request_sections(document, simulation))  # fmt: skip


def served_sections(document: dict[str, Any]) -> list[Any]:
    """Return the section of a plan made for an engine: what to run, what it is beside, what else was tried; none for other plans."""
    from ...planner.emit.names import emit_name
    from ...planner.emit.targets import render
    from ...reports import numbers
    from ...reports.page import Column, Section, bullet_list, code_block, paragraph, table
    from ...specs.provenance import model_of

    part = document.get("for")
    if part is None:
        return []
    emission = render(document, emit_name(part["engine"]), model_of(document))
    first, *others = (text for name, text in emission.files.items() if name.endswith(".sh"))
    columns = (
        Column(title="Setting", is_name=True), Column(title="A request", is_number=True), Column(title="First token", is_number=True),
        Column(title="Generated tokens/s", is_number=True), Column(title="On the card", is_number=True),
    )  # fmt: skip
    rows = [
        (
            one["name"], *(numbers.seconds(one[key]) if one[key] is not None else "–" for key in ("request_s", "ttft_s")),
            numbers.significant(one["decode_tokens_per_s"]) if one["decode_tokens_per_s"] is not None else "–",
            numbers.size(one["device_bytes"]),
        )
        for one in part["tried"][:_SETTINGS]
    ]  # fmt: skip
    chosen = frozenset(at for at, row in enumerate(rows) if row[0] == part["setting"]["name"])
    parts = (
        code_block(first), bullet_list(emission.predicted), "<h3>What would settle it</h3>", bullet_list(emission.measure),
        *(code_block(text) for text in others), f"<h3>The {len(rows)} fastest of {len(part['tried'])} settings that were simulated</h3>",
        paragraph("As predicted, the fastest window first; what the engine does of itself stands among the schedules below."),
        table(columns, rows, marked=chosen),
    )  # fmt: skip
    return [Section(id="run", title=f"What to run with {part['engine']}", parts=parts)]


def write_parallel_artefacts(
    report: Path | None, timeline: Path | None, document: dict[str, Any], replay: Any, profile: Any
) -> None:
    """Write the HTML report of an expert-parallel plan and the Perfetto timeline of its first reported step, where asked for."""
    from ...reports.parallel.page import write_parallel_report
    from ...reports.timelines.perfetto import write_timeline

    before, after = replay.before.outcome.timeline, replay.after.outcome.timeline
    if timeline is not None:
        write_timeline(timeline, after)
    if report is not None:
        write_parallel_report(report, document, before=before, after=after, profile=profile)
