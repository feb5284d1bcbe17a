"""The command that writes the page of a plan.

Modelled: its options and what it prints. Ignored: the page (`reports/`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.errors import InputError
from ..base.terminal import print_json
from ..base.text_files import check_outputs
from .options.conditions import ConditionedCommand
from .options.declarations import JsonFlag, OptionalTraceOption
from .parts.artefacts import write_offload_report, write_parallel_artefacts, write_perfetto


def report(
    plan_path: Annotated[Path | None, typer.Argument(help="plan.json, as moeplan plan writes it.")] = None,
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            help="Instead of a plan: a store of studies (file or SQLAlchemy URL), as moeplan sweep writes it.",
        ),
    ] = None,
    study: Annotated[str | None, typer.Option("--study", help="with --store: only the study of this name.")] = None,
    trace: OptionalTraceOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    timeline: Annotated[Path | None, typer.Option("--timeline", help="Also write a Perfetto timeline (.json).")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write the HTML report of a plan, whose best schedule is replayed for its timeline, or of the studies of a store."""
    from ..specs.plans.document import read_plan

    inputs = {"the plan": plan_path, "--trace": trace, "--store": store}
    check_outputs({"--output": output, "--timeline": timeline}, inputs)
    if store is not None:
        from ..studies.pages import report_store

        if plan_path is not None:
            raise InputError("--store", store, "a plan is given too", "give one of the two")
        report_store(store, output, study)
    elif plan_path is None:
        raise InputError("plan_path", "(absent)", "there is nothing to report", "give plan.json, or --store")
    else:
        document = read_plan(plan_path)
        if document.get("kind") == "expert-parallel":
            _parallel(document, trace, output, timeline)
        else:
            _offload(document, trace, output, timeline)
    if as_json:
        print_json({"path": str(output)})
    else:
        typer.echo(str(output))


def _offload(document: dict[str, Any], trace: str | None, output: Path, timeline: Path | None) -> None:
    from ..api.subject import planned_simulation
    from ..planner.offload.plan import planned_schedule
    from ..specs.plans.document import OFFLOAD, check_plan

    check_plan(document, OFFLOAD)
    simulation = planned_simulation(document, trace)
    best = simulation.predict(planned_schedule(document), rows=True)
    write_offload_report(output, document, simulation, best)
    if timeline is not None:
        write_perfetto(timeline, simulation, best)


def _parallel(document: dict[str, Any], trace: str | None, output: Path, timeline: Path | None) -> None:
    from ..api.load import planned_rank_recording
    from ..planner.parallel.replay import replay_ep_plan
    from ..reports.parallel.plan_document import check_parallel_document
    from ..specs.provenance import machine_of, model_of

    check_parallel_document(document)
    profile, model = machine_of(document), model_of(document)
    replay = replay_ep_plan(document, model, profile, planned_rank_recording(document, trace, model))
    write_parallel_artefacts(output, timeline, document, replay, profile)


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command(cls=ConditionedCommand)(report)
