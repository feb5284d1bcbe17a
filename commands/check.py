"""The command that guards predictions in continuous integration.

Modelled: its options, what it prints, and its exit status: 0 where nothing got worse, 1 where something did. Ignored: what got worse
(`baselines/`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base.terminal import print_json
from ..base.text_files import check_outputs, write_atomic
from .options.bounds import between, share
from .options.conditions import ConditionedCommand
from .options.declarations import JsonFlag


def check(
    baseline: Annotated[
        Path,
        typer.Option(
            "--baseline",
            help="Pinned scenarios with their figures (.json), or another tool's table of scenario, predicted, measured (.csv, .json).",
        ),
    ],
    predictions: Annotated[
        Path | None,
        typer.Option(
            "--predictions",
            help="What another tool predicts now: a table of scenario, predicted, measured (.csv, .json).",
        ),
    ] = None,
    tolerance: Annotated[
        str | None,
        typer.Option(
            "--tolerance",
            help="Share by which a number may move that nothing measured stands beside, e.g. 2%; default: 5%. Further fails.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where any figure moved: for changes that should move none.")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", help="Processes; default: one a core.", callback=between(1, 1024, "processes")),
    ] = None,
    refresh: Annotated[
        bool,
        typer.Option("--refresh", help="Write the figures of now as the baseline, after listing what moved."),
    ] = False,
    why: Annotated[
        str | None,
        typer.Option(
            "--why", help="with --refresh: why figures that got worse are meant; kept in the file beside them."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="with --refresh: the file to write; default: the baseline.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="Also write the result as Markdown, for a pull request.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Predict the scenarios of a baseline again, set them beside what was measured, and fail where they got worse."""
    from ..base.progress import reporter
    from ..baselines import check as guard
    from ..baselines.judge import TOLERANCE
    from ..baselines.show import markdown_of, text_of

    check_outputs(
        {"--output": output, "--markdown": markdown} | ({"--baseline": baseline} if refresh and output is None else {}),
        {"--predictions": predictions} | ({"--baseline": baseline} if not refresh else {}),
    )
    allowed = TOLERANCE if tolerance is None else share(tolerance, "--tolerance")
    progress = reporter("check")
    if refresh:
        found = guard.refresh(baseline, output=output, predictions=predictions, why=why, jobs=jobs, progress=progress)
    else:
        found = guard.check(
            baseline, predictions=predictions, tolerance=allowed, strict=strict, jobs=jobs, progress=progress
        )
    if markdown is not None:
        write_atomic(markdown, markdown_of(found))
    written = str(output or baseline) if refresh else None
    if as_json:
        print_json(found.to_dict() | {"written": written})
    else:
        typer.echo(text_of(found))
        if written is not None:
            typer.echo(f"written to {written}")
    if not found.passed and not refresh:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command(cls=ConditionedCommand)(check)
