"""The one sentence about a file that cannot be read.

Modelled: what the file was taken for, and the first line of what the parser said about it. Ignored: everything after
that line; parsers quote their input.
"""

from __future__ import annotations

import os

from ...base.errors import InputError, one_line

_REASON_CHARS = 200


def unreadable(path: str | os.PathLike[str], rule: str, error: BaseException, remedy: str) -> InputError:
    """Return the InputError for a file that breaks `rule` (as "cannot be read as text"), with the parser's reason."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
    reason = one_line(reason, _REASON_CHARS) or type(error).__name__
    return InputError("path", str(path), f"{rule} ({reason})", remedy)
