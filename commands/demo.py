"""The command that shows everything once, on the bundled recording.

Modelled: a model too big for a small budget. Ignored: other models and machines; `plan` takes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import print_json, print_plan
from .artefacts import write_offload_report, write_perfetto
from .options import JsonFlag, rehearse

DEMO_HARDWARE = "t4"
DEMO_MEMORY = "436MiB"


def demo(
    folder: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the plan, the report and the timeline.")
    ] = Path("out/demo"),
    as_json: JsonFlag = False,
) -> None:
    """Plan the bundled recording for a small memory and write plan, report and Perfetto timeline."""
    from ..planner.plan import PlanRequest, make_plan, plan_to_dict
    from ..progress import reporter
    from ..specs_io import write_atomic

    folder.mkdir(parents=True, exist_ok=True)
    rehearsal = rehearse("tiny-moe", DEMO_HARDWARE, "bundled", DEMO_MEMORY, 2000, "16")
    found = make_plan(rehearsal, PlanRequest(bits=("native",)), progress=reporter("demo"))
    document = plan_to_dict(found)
    paths = {"plan": folder / "plan.json", "report": folder / "report.html", "timeline": folder / "timeline.json"}
    write_atomic(paths["plan"], json.dumps(document, indent=1, allow_nan=False) + "\n")
    write_perfetto(paths["timeline"], found.best)
    write_offload_report(paths["report"], document, rehearsal, found.best)
    if as_json:
        print_json(
            {"predicted_tokens_per_s": document["best"]["tokens_per_s"]}
            | {name: str(path) for name, path in paths.items()}
        )
    else:
        print_plan(document, str(paths["plan"]))
        typer.echo(f"report    {paths['report']}\ntimeline  {paths['timeline']} (open it in Perfetto)")


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command()(demo)
