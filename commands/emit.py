"""The command that writes a plan as an engine's own configuration.

Modelled: its options and what it prints. Ignored: the files themselves (`planner/emit/`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.errors import InputError
from ..base.terminal import print_json
from ..planner.emit.flags import one_line
from ..planner.emit.names import ENGINES, emit_name
from .options.declarations import JsonFlag

if TYPE_CHECKING:
    from ..planner.emit.choices import Emission

# From a list of names: asking the engines' modules would import numpy before any help is shown.
TARGETS = ", ".join(ENGINES)


def emit(
    plan_path: Annotated[Path, typer.Argument(help="plan.json, as moeplan plan writes it.")],
    target: Annotated[
        str | None,
        typer.Option(
            "--for", "--target", help=f"Engine to write for: {TARGETS}; default: the one that the plan was made for."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write into; it is made where it is absent.")
    ] = Path("emitted"),
    as_json: JsonFlag = False,
) -> None:
    """Write a plan as an engine's own configuration, with its command line and notes on what that engine cannot express."""
    from ..api.emit import emit_document
    from ..specs.plans.document import read_plan

    document = read_plan(plan_path)
    if target is None:
        part = document.get("for")
        planned_for = part.get("engine") if isinstance(part, dict) else document.get("target")
        if planned_for is None:
            raise InputError(
                "--for", "(absent)", "the plan was made for no particular engine", f"name one of: {TARGETS}"
            )
        target = str(planned_for)
    target = emit_name(target)
    emission, written = emit_document(document, target, output=output, keep={"the plan": plan_path})
    paths = [str(path) for path in written]
    commands = {name: text for name, text in emission.files.items() if name.endswith(".sh")}
    if as_json:
        found = {"target": target, "paths": paths}
        more = {"commands": {name: one_line(text) for name, text in commands.items()}, "predicted": list(emission.predicted),
                "measure": list(emission.measure)}  # fmt: skip
        print_json(found | more if commands else found)
        return
    typer.echo("\n".join(paths))
    for line in _said(emission, commands):
        typer.echo(line)


def _said(emission: Emission, commands: dict[str, str]) -> list[str]:
    """Return the ready command line with what is predicted for it and what would settle the choice; nothing without one."""
    if not commands:
        return []
    first, *others = commands.items()
    return [
        "", "Run:", f"  {one_line(first[1])}", "Predicted:", *(f"  {line}" for line in emission.predicted), "What would settle it:",
        *(f"  {line}" for line in emission.measure), *(f"  {name}: {one_line(text)}" for name, text in others),
    ]  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command()(emit)
