"""The command that sets published figures beside simulated ones.

Modelled: its options and what it prints. Ignored: the papers (`papers/`).
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.errors import InputError
from ..base.terminal import print_json, print_table
from ..base.text_files import check_outputs
from .options.declarations import JsonFlag


def reproduce(
    paper: Annotated[
        str,
        typer.Argument(
            help="deepep, engines, eps-moe, grace-moe, lookahead, mixtral-offloading, pre-gated, rebalancing, or field (public reports)."
        ),
    ],
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
    reports: Annotated[
        str | None,
        typer.Option("--reports", help="File of field reports (.jsonl) in place of the bundled ones: field."),
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Also write an HTML report: field.")] = None,
    parallel: Annotated[
        bool,
        typer.Option("--parallel", help="Figures of expert parallelism in place of reports on one box: field."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Set a paper's published figures beside the simulator's, cell by cell, with what was fitted to which cell."""
    from ..api.reproduce import FIELD
    from ..api.reproduce import reproduce as run
    from ..base.progress import reporter

    if report is not None and (paper != FIELD or parallel):
        if parallel:
            raise InputError("--report", str(report), "figures of expert parallelism have no page yet", "use --json")
        raise InputError("--report", str(report), f"{paper} has its own figures", "give it to reproduce field")
    check_outputs({"--report": report}, {} if reports is None else {"--reports": reports})
    found = run(
        paper,
        hardware=hardware,
        bits=bits,
        reports=reports,
        parallel=parallel,
        progress=reporter("field") if paper == FIELD else None,
    ).to_dict()
    if report is not None:
        from ..reports.field_page import write_field_page

        write_field_page(report, found)
    if as_json:
        print_json(found)
    elif paper != FIELD:
        _print(found)
    elif parallel:
        _parallel(found)
    else:
        _field(found)


def _field(found: dict[str, Any]) -> None:
    """Print the scores of reports on one box, and what was missed."""
    _scores(found)
    for engines, one in found["choices"].items():
        typer.echo(
            f"{engines}: of {one['groups']} groups of settings of one machine and file, the best measured one is predicted best in "
            f"{one['chosen']}, or within its interval in {one['chosen_or_within']} ({one['share']:.0%})"
        )
    if found["choices"]:
        typer.echo("")
    if found["in_sample"]:
        away = ", ".join(f"{kind} {one['median_relative_error']:.0%}" for kind, one in found["left_out"].items())
        typer.echo(f"engines' constants were fitted on these reports; median errors on machines left out: {away}\n")
    _rows(found)


def _parallel(found: dict[str, Any]) -> None:
    """Print the scores of figures of expert parallelism, and what was missed."""
    _scores(found)
    if found["fitted_on"]:
        away = ", ".join(f"{source} {one['median_relative_error']:.0%}" for source, one in found["left_out"].items())
        typer.echo(
            f"one constant (overlap) was fitted on {', '.join(found['fitted_on'])}; median errors on sources left out: {away}\n"
        )
    signs = found["signs"]
    if signs["n"]:
        typer.echo(f"of {signs['n']} ratios of two runs, {signs['right']} say rightly which run is faster\n")
    _rows(found)


def _scores(found: dict[str, Any]) -> None:
    """Print the scores by kind and by cut."""
    for title, scores in (("kind", found["kinds"]), ("cut", found["cuts"])):
        print_table(
            (title, "reports", "predicted", "median error", "p90", "bias", "intervals hold", "half-width", "tau", "one-liner", "× 0.6"),
            [(name, one["n"], one["predicted"], *(_percent(one[key]) for key in ("median_relative_error", "p90_relative_error")),
              _number(one["bias"]), _percent(one["coverage"]), _percent(one["median_half_width"]), _number(one["kendall_tau"]),
              _percent(one["roofline_median"]), _percent(one["roofline06_median"])) for name, one in scores.items()],
            right=tuple(range(1, 11)),
        )  # fmt: skip
        typer.echo("")


def _rows(found: dict[str, Any]) -> None:
    """Print what was not predicted, and what was missed with what could explain it."""
    for row in found["rows"]:
        if row["predicted"] is None:
            typer.echo(f"{row['id']}: not predicted: {row['reason']}")
        elif row["could_explain"] is not None:
            typer.echo(f"{row['id']}: measured {row['measured']:.4g}, predicted {row['predicted']:.4g} "
                       f"[{row['low']:.4g} to {row['high']:.4g}]: {row['could_explain']}")  # fmt: skip


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


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
        typer.echo(
            f"{where}  {published:>8} {cell['simulated']:>9.4g} {cell['unit']:10} {error:>8}  {cell['role']}"
            + ("" if cell["measured"] is None else f", measured {cell['measured']:.4g}")
        )
        for line in textwrap.wrap(cell["note"], 110):
            typer.echo(f"    {line}")
    for role, error in document["median"].items():
        typer.echo(f"{role}: median error {error:.1%}, worst {document['worst'][role]:.1%}")
    for note in document["notes"]:
        typer.echo(f"note: {note}")


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command()(reproduce)
