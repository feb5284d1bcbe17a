"""The front door: it runs the commands and turns every end that is not a result into one clear line.

    2    a wrong input                      70   a mistake in moeplan itself; please report it
    3    it does not fit                    74   what was to be printed could not be
    130  Ctrl-C (143, 129: SIGTERM, SIGHUP): the line says what was written, and what the same command does when it is given again

Modelled: exit statuses, signals, streams that are closed or full. Commands are imported inside `main`, so that a Ctrl-C in the first
instant is one line too. Ignored: the commands (`commands/`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from .base.errors import Internal, MoeplanError, one_line
from .base.streams import Guarded, guarded_streams
from .base.text_files import forget_written, written_files

_EXIT_USAGE, _EXIT_LOST = 2, 74
_EXIT_SIGNAL = 128
_EXIT_INTERRUPTED = _EXIT_SIGNAL + signal.SIGINT
_COMPLETION = "_MOEPLAN_COMPLETE"
_DEBUG = "MOEPLAN_DEBUG"


class _Ended(BaseException):
    """A signal asked this process to end: raised so that children are ended and temporary folders removed on the way out."""

    def __init__(self, number: int) -> None:
        self.status = _EXIT_SIGNAL + number
        super().__init__(signal.Signals(number).name)


def main() -> None:
    """Run the command line, and exit with its status."""
    with guarded_streams() as (out, err):
        status = _status(out, err)
    sys.exit(status)


def _status(out: Guarded, err: Guarded) -> int:
    """Return the exit status of the command line, having said on `err` why it is not 0."""
    try:
        with _endings():
            forget_written()
            status = _run()
            out.flush()
    except MoeplanError as error:
        return _said(err, str(error), error.exit_status)
    except KeyboardInterrupt:
        return _said(err, f"interrupted; {_left_behind()}", _EXIT_INTERRUPTED)
    except _Ended as end:
        return _said(err, f"ended by {end}; {_left_behind()}", end.status)
    except MemoryError:
        return _said(err, "this machine's memory does not suffice; free some, or give smaller inputs", _EXIT_USAGE)
    except OSError as error:
        if os.environ.get(_DEBUG):
            raise
        where = f" ({error.filename})" if error.filename else ""
        return _said(err, f"the system refused: {(error.strerror or str(error)).lower()}{where}", _EXIT_USAGE)
    except Exception as error:
        if os.environ.get(_DEBUG):
            raise
        return _said(err, _mistake(error), Internal.exit_status)
    if out.lost_output is not None and not isinstance(out.lost_output, BrokenPipeError):
        reason = (out.lost_output.strerror or "failed").lower()
        return _said(err, f"standard output cannot be written: {reason}; what was printed is lost", _EXIT_LOST)
    return status


def _run() -> int:
    """Return the exit status of the command that the arguments name; errors of usage become MoeplanErrors."""
    import typer

    from .commands.app import app

    # Newer typer carries its own copy of click, older typer imports it: the base of usage errors is found where it is.
    usage_error: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
    command: Any = typer.main.get_command(app)
    try:
        if _COMPLETION in os.environ:
            found = command.main(prog_name="moeplan", standalone_mode=False)
        else:  # not `main`: it prints a line of its own for a Ctrl-C, and has its own mind about pipes
            with command.make_context("moeplan", sys.argv[1:]) as context:
                found = command.invoke(context)
    except typer.Exit as stop:
        return int(stop.exit_code)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except usage_error as error:
        raise _UsageError(one_line(error.format_message())) from None
    return found if isinstance(found, int) else 0


class _UsageError(MoeplanError):
    """The command line names something that does not exist, or leaves something out."""

    exit_status = _EXIT_USAGE


@contextlib.contextmanager
def _endings() -> Iterator[None]:
    """Return a context in which SIGTERM and SIGHUP unwind the work as a Ctrl-C does, where nobody else has a say about them."""

    def end(number: int, frame: FrameType | None) -> None:
        raise _Ended(number)

    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        with contextlib.suppress(ValueError):  # not the main thread
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _left_behind() -> str:
    """Return what an unfinished command has written, and what the same command does when it is given again."""
    whole, kept = written_files()
    parts = [f"written: {', '.join(whole)}" if whole else "nothing was written" if not kept else ""]
    if kept:
        parts.append(f"what was measured is in {', '.join(kept)}: the same command goes on from there")
    else:
        parts.append("the same command starts over")
    return "; ".join(part for part in parts if part)


def _mistake(error: Exception) -> str:
    """Return one line about an error that nobody foresaw: what, where in the package, and what to do."""
    here = Path(__file__).resolve().parent
    passed = [(Path(frame.filename).resolve(), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    inside = [(path.relative_to(here), line) for path, line in passed if path.is_relative_to(here)]
    where = f" at {inside[-1][0]}:{inside[-1][1]}" if inside else ""
    what = one_line(f"{type(error).__name__}: {error}", 300)
    return f"a mistake in moeplan itself{where} ({what}); please report it with the command, {_DEBUG}=1 shows more"


def _said(err: Guarded, message: str, status: int) -> int:
    if message:  # without any argument the help has said it all
        err.write(f"moeplan: {one_line(message)}\n")
    return status
