"""All commands, gathered.

Modelled: `--json` prints exactly one JSON document on stdout; progress and remarks go to stderr. Ignored: errors (`cli`), and the
work: commands import what they need when they run, so that `moeplan --help` is quick.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ..base.version import __version__
from . import (
    calibrate,
    check,
    demo,
    diagnose,
    emit,
    engine,
    fit,
    gates,
    machine,
    plan,
    report,
    reproduce,
    run,
    simulate,
    sweep,
    trace,
    validate,
)
from .options import hardware, model, schedule

app = typer.Typer(name="moeplan", no_args_is_help=True, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="Rehearse Mixture-of-Experts inference before you run it.")  # fmt: skip


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


# In the order of a first visit.
for _module in (
    demo,
    model,
    machine,
    hardware,
    engine,
    schedule,
    trace,
    simulate,
    plan,
    sweep,
    fit,
    diagnose,
    calibrate,
    validate,
    gates,
    run,
    report,
    emit,
    reproduce,
    check,
):
    _module.register(app)
