"""Progress of long work on stderr, and nothing on stdout.

Modelled: a line that is rewritten in place on a terminal, and one line every few seconds elsewhere, so that logs stay short.
Ignored: bars, colours.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

_TERMINAL_INTERVAL_S = 0.1
_LOG_INTERVAL_S = 5.0


def reporter(title: str, *, quiet: bool = False) -> Callable[[int, int, str], None]:
    """Return a function of (done, total, note) that reports progress; `quiet` returns one that says nothing."""
    if quiet:
        return lambda done, total, note: None
    terminal = sys.stderr.isatty()
    began = time.monotonic()
    last = [began - _LOG_INTERVAL_S]

    def report(done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if done < total and now - last[0] < (_TERMINAL_INTERVAL_S if terminal else _LOG_INTERVAL_S):
            return
        last[0] = now
        line = f"{title}: {done}/{total} {note} ({now - began:.1f} s)"
        sys.stderr.write(f"\r\x1b[K{line}" + ("\n" if done >= total else "") if terminal else line + "\n")
        sys.stderr.flush()

    return report
