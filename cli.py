"""The front door: it gathers the commands and turns every error into one clear line.

Modelled: `--json` prints exactly one JSON document on stdout; progress and remarks go to stderr. Every error the product
raises on purpose becomes one line on stderr and its exit status (2: bad input, 3: does not fit). Ignored: the commands
themselves (`commands/`) and the work; commands import what they need when they run, so that `moeplan --help` is quick.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from . import __version__
from .commands import demo, emit, hardware, measure, plan, report, reproduce, schedule, simulate, trace
from .errors import MoeplanError

app = typer.Typer(name="moeplan", no_args_is_help=True, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="Rehearse Mixture-of-Experts inference before you run it.")  # fmt: skip

_EXIT_USAGE, _EXIT_INTERRUPTED = 2, 130
# Newer typer carries its own copy of click, older typer imports it: the base of usage errors is found where it is.
_USAGE_ERROR: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


# In the order of a first visit.
for _module in (demo, hardware, schedule, trace, simulate, plan, measure, report, emit, reproduce):
    _module.register(app)


def main() -> None:
    """Run the command line; every purposeful error is one line on stderr and its own exit status."""
    logging.basicConfig(stream=sys.stderr, format="moeplan: %(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)
    try:
        status = app(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except MoeplanError as error:
        _fail(str(error), error.exit_status)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except _USAGE_ERROR as error:
        _fail(" ".join(error.format_message().split()), _EXIT_USAGE)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; nothing was written", _EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)


def _fail(message: str, status: int) -> None:
    sys.stderr.write(f"moeplan: {message}\n")
    sys.exit(status)
