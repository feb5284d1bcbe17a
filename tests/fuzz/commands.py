"""Commands in this process, with what they print."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback


def run(arguments: list[str]) -> tuple[int, str, str, str]:
    """Return (status, stdout, stderr, traceback) of a command in this process."""
    from moeplan.cli import main

    out, err, trouble, status = io.StringIO(), io.StringIO(), "", 0
    sys.argv = ["moeplan", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0
        except BaseException:  # noqa: BLE001 (whatever it is, it is a finding)
            trouble = traceback.format_exc()
    return status, out.getvalue(), err.getvalue(), trouble
