"""The command that writes a plan as an engine's own configuration.

Modelled: its options and what it prints. Ignored: the files themselves (`planner/emit/`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base.terminal import print_json
from ..planner.emit.names import ENGINES
from .options.declarations import MAX_PLAN_BYTES, JsonFlag

# From a list of names: asking the engines' modules would import numpy before any help is shown.
TARGETS = ", ".join(ENGINES)


# Engines whose name elsewhere is not the target's.
_OTHER_NAMES = {"llama.cpp": "llamacpp", "tensorrt-llm": "trtllm"}


def emit(
    plan_path: Annotated[Path, typer.Argument(help="plan.json, as moeplan plan writes it.")],
    target: Annotated[str, typer.Option("--target", help=f"Engine to write the configuration for: {TARGETS}.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write into; it is made where it is absent.")
    ] = Path("emitted"),
    as_json: JsonFlag = False,
) -> None:
    """Write a plan as an engine's own configuration, with notes on what that engine cannot express."""
    from ..base.json_files import read_json
    from ..planner.emit.targets import emit as write
    from ..specs.provenance import model_of

    target = _OTHER_NAMES.get(target, target)
    document = read_json(plan_path, "plan", max_bytes=MAX_PLAN_BYTES)
    paths = [str(path) for path in write(document, target, model_of(document), output, keep={"the plan": plan_path})]
    if as_json:
        print_json({"target": target, "paths": paths})
    else:
        typer.echo("\n".join(paths))


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command()(emit)
