"""The command that sets published figures beside simulated ones.

Modelled: its options and what it prints. Ignored: the papers (`papers/`).
"""

from __future__ import annotations

from typing import Annotated

import typer

from ..terminal import print_json
from .options import JsonFlag


def reproduce(
    paper: Annotated[str, typer.Argument(help="deepep, eps-moe or grace-moe.")], as_json: JsonFlag = False
) -> None:
    """Set a paper's published figures beside the simulator's, cell by cell."""
    from ..papers.registry import reproduce as run

    document = run(paper).to_dict()
    if as_json:
        print_json(document)
        return
    for cell in document["cells"]:
        error = cell.get("relative_error")
        off = "" if error is None else f"{error:+.1%}"
        typer.echo(
            f"{cell['table']:28} {cell['row']!s:28} {cell['column']!s:24} published {cell['published']!s:>10} "
            f"simulated {cell['simulated']!s:>22} {off:>8} {cell['role']}"
        )


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command()(reproduce)
