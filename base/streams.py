"""Standard output and standard error as they are found: closed, full, of few characters, or a terminal that obeys what it reads.

Modelled: inside `guarded_streams` text is shown, never obeyed (a name from a file that holds control characters is spelt out);
characters that the encoding lacks become plain ones; nothing that is printed can fail. What was lost is known at the end. Our own
progress, colours and the clearing of a line still reach a terminal. Ignored: bytes that libraries write past Python.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from .errors import one_line, visible

# What this program itself sends to terminals: colours, back to the start of the line, clear the line.
_OURS = re.compile(r"(\x1b\[[0-9;]*m|\r|\x1b\[K)")
_PLAIN = str.maketrans(
    {"±": "+-", "×": "x", "…": "...", "–": "-", "—": "-", "→": "->", "≤": "<=", "≥": ">=",
     "·": ".", "µ": "u", "─": "-", "│": "|", "╭": "+", "╮": "+", "╰": "+", "╯": "+", "┌": "+", "┐": "+", "└": "+", "┘": "+"}
)  # fmt: skip


class Guarded(io.TextIOBase):
    """A stream to print on that never fails; `lost` is why something could not be written, None as long as all was."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.lost: OSError | None = None if stream is not None else OSError(errno.EBADF, "is closed")
        self._silent_so_far = True
        encoding = getattr(stream, "encoding", None) or "utf-8"
        self._encoding = encoding if encoding.lower().replace("-", "") != "utf8" else None
        self._terminal = stream is not None and stream.isatty()
        self._coloured = self._terminal or any(
            name in os.environ for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS")
        )

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Return what text may hold: anything, since it is adapted here."""
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """Return how text is treated that cannot be encoded; there is none."""
        return "strict"

    @property
    def lost_output(self) -> OSError | None:
        """Return why something that was printed is lost, None where nothing is."""
        return None if self._silent_so_far else self.lost

    def writable(self) -> bool:
        """Return that one may print."""
        return True

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._terminal

    def fileno(self) -> int:
        """Return the stream's descriptor."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Print `text`; returns its length, whether or not it got anywhere."""
        if not isinstance(text, str):
            raise TypeError("text is printed here, not bytes")
        if text:
            self._silent_so_far = False
            self._try("write", self._fitting(text))
        return len(text)

    def flush(self) -> None:
        """Hand on what was printed so far."""
        self._try("flush")

    def _try(self, what: str, *arguments: Any) -> None:
        if self.lost is not None or self._stream is None:
            return
        try:
            getattr(self._stream, what)(*arguments)
        except OSError as error:
            self.lost = error
            self._drop()
        except ValueError:  # closed meanwhile
            self.lost = OSError(errno.EBADF, "is closed")

    def _fitting(self, text: str) -> str:
        """Return `text` as the stream can take it."""
        if self._coloured:
            parts = _OURS.split(text)
            text = "".join(part if at % 2 else visible(part) for at, part in enumerate(parts))
        else:
            text = visible(text)
        if self._encoding is None:
            return text
        try:
            text.encode(self._encoding)
        except UnicodeEncodeError:
            return text.translate(_PLAIN).encode(self._encoding, "backslashreplace").decode(self._encoding)
        return text

    def _drop(self) -> None:
        """Let what the stream still holds go nowhere: Python would try again at the very end, and complain."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def guarded_streams() -> Iterator[tuple[Guarded, Guarded]]:
    """Return a context in which `sys.stdout` and `sys.stderr` are guarded, and remarks of the package go to the latter."""
    _occupy()
    before = sys.stdout, sys.stderr
    out, err = Guarded(before[0]), Guarded(before[1])
    sys.stdout, sys.stderr = out, err
    package = logging.getLogger(__package__)
    handler, level = logging.StreamHandler(err), package.level
    handler.setFormatter(_Line("moeplan: %(message)s"))
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield out, err
    finally:
        out.flush()
        err.flush()
        package.removeHandler(handler)
        package.setLevel(level)
        sys.stdout, sys.stderr = before


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


def _occupy() -> None:
    """Open the null device where a standard descriptor is closed: the next file opened would take its place, and libraries write to it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
