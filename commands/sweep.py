"""The command that makes a study: one question over a grid of inputs.

Modelled: its options and what it prints. Ignored: runs and their store (`studies/`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base.terminal import print_json
from ..base.text_files import check_outputs
from .options.bounds import between
from .options.conditions import ConditionedCommand
from .options.declarations import JsonFlag


def sweep(
    study: Annotated[
        Path, typer.Argument(help="The study (.yaml): what all runs share, and the axes that are combined.")
    ],
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            help="Where runs are kept: a file for SQLite, or any SQLAlchemy URL; default: the study's name with .sqlite.",
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option("--backend", help="Where runs are made: local, or a cluster that is there already: ray, dask."),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            "--address", help="The cluster's address; default: that of RAY_ADDRESS or DASK_SCHEDULER_ADDRESS."
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", help="local: processes; default: one a core.", callback=between(1, 1024, "processes")),
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Make runs that failed again.")] = False,
    parquet: Annotated[
        Path | None, typer.Option("--parquet", help="Also write the runs as a table (.parquet), one a row.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make every run of a study that its store has no answer for; stopped or killed, the same command goes on."""
    from ..base.progress import reporter
    from ..studies.sweep import sweep as make
    from ..studies.table import write_parquet

    check_outputs({"--parquet": parquet}, {"study": study, "--store": store})
    found = make(
        study, store=store, backend=backend, address=address, jobs=jobs, retry=retry, progress=reporter("sweep")
    )
    if parquet is not None:
        write_parquet(found.to_frame(), parquet)
    if as_json:
        print_json(found.to_dict() | {"parquet": None if parquet is None else str(parquet)})
        return
    for line in found.lines():
        typer.echo(line)
    if parquet is not None:
        typer.echo(f"written to {parquet}")


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command(cls=ConditionedCommand)(sweep)
