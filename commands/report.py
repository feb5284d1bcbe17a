"""The command that writes the page of a plan.

Modelled: its options and what it prints. Ignored: the page (`reports/`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..terminal import print_json
from ..text_files import check_outputs
from .artefacts import write_offload_report, write_parallel_artefacts, write_perfetto
from .options import MAX_PLAN_BYTES, JsonFlag, TraceOption, bundled_trace_path, plan_section, rehearse


def report(
    plan_path: Annotated[Path, typer.Argument(help="plan.json")],
    trace: TraceOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    timeline: Annotated[Path | None, typer.Option("--timeline", help="Also write a Perfetto timeline (.json).")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write the HTML report of a plan; the plan's best schedule is replayed for its timeline."""
    from ..specs_io import read_json

    check_outputs({"--output": output, "--timeline": timeline}, {"the plan": plan_path, "--trace": trace})
    document = read_json(plan_path, "plan", max_bytes=MAX_PLAN_BYTES)
    provenance = plan_section(document, "provenance")
    if document.get("kind") == "expert-parallel":
        _parallel(document, provenance, trace, output, timeline)
    else:
        _offload(document, provenance, trace, output, timeline)
    if as_json:
        print_json({"path": str(output)})
    else:
        typer.echo(str(output))


def _offload(
    document: dict[str, Any], provenance: dict[str, Any], trace: str, output: Path, timeline: Path | None
) -> None:
    from ..planner.plan import planned_schedule

    rehearsal = rehearse(str(provenance.get("model")), str(provenance.get("hardware")), trace,
                         str(provenance.get("memory_bytes")),
                         provenance.get("window_steps"), str(provenance.get("dense_bits", "16")))  # fmt: skip
    best = rehearsal.predict(planned_schedule(document), rows=True)
    write_offload_report(output, document, rehearsal, best)
    if timeline is not None:
        write_perfetto(timeline, rehearsal, best)


def _parallel(
    document: dict[str, Any], provenance: dict[str, Any], trace: str, output: Path, timeline: Path | None
) -> None:
    from ..planner.ep_replay import replay_ep_plan
    from ..reports.parallel_document import check_parallel_document
    from ..specs_io import load_hardware, load_model
    from ..traces.format import load_recording

    check_parallel_document(document)
    profile = load_hardware(str(provenance.get("hardware")))
    recording = load_recording(bundled_trace_path() if trace == "bundled" else trace)
    replay = replay_ep_plan(document, load_model(str(provenance.get("model"))), profile, recording)
    write_parallel_artefacts(output, timeline, document, replay, profile)


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command()(report)
