"""The command that sets published figures beside simulated ones.

Modelled: its options and what it prints. Ignored: the papers (`papers/`).
"""

from __future__ import annotations

import textwrap
from typing import Annotated, Any

import typer

from ..terminal import print_json
from .options import JsonFlag


def reproduce(
    paper: Annotated[str, typer.Argument(help="deepep, engines, eps-moe, grace-moe, mixtral-offloading or pre-gated.")],
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            help="Predict for this machine only (bundled name or profile.json): mixtral-offloading, pre-gated.",
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            "--bits", help="Predict for this weight format of the experts only: mixtral-offloading, pre-gated."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Set a paper's published figures beside the simulator's, cell by cell, with what was fitted to which cell."""
    from ..papers.registry import reproduce as run

    document = run(paper, hardware=hardware, bits=bits).to_dict()
    if as_json:
        print_json(document)
    else:
        _print(document)


def _print(document: dict[str, Any]) -> None:
    """Print constants, cells with their notes, and the summary by role."""
    typer.echo(document["citation"])
    for constant in document["fitted_constants"]:
        value = f"{constant['value']:.4g} {constant['unit']}".rstrip()
        typer.echo(f"fitted: {constant['name']} = {value} (to {constant['fitted_to']})")
    columns = ("table", "row", "column")
    widths = [max((len(str(cell[name])) for cell in document["cells"]), default=0) for name in columns]
    for cell in document["cells"]:
        where = "  ".join(str(cell[name]).ljust(width) for name, width in zip(columns, widths, strict=True))
        published = "-" if cell["published"] is None else f"{cell['published']:.5g}"
        error = "" if cell["relative_error"] is None else f"{cell['relative_error']:+.1%}"
        typer.echo(f"{where}  {published:>8} {cell['simulated']:>9.4g} {cell['unit']:10} {error:>8}  {cell['role']}")
        for line in textwrap.wrap(cell["note"], 110):
            typer.echo(f"    {line}")
    for role, error in document["median"].items():
        typer.echo(f"{role}: median error {error:.1%}, worst {document['worst'][role]:.1%}")
    for note in document["notes"]:
        typer.echo(f"note: {note}")


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command()(reproduce)
