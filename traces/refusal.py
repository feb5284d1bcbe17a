"""The one sentence about a file that cannot be read.

Modelled: what the file was taken for, and the first line of what the parser said about it. Ignored: everything after
that line; parsers quote their input.
"""

from __future__ import annotations

import os

from ..errors import InputError


def unreadable(path: str | os.PathLike[str], rule: str, error: BaseException, remedy: str) -> InputError:
    """Return the InputError for a file that breaks `rule` (as "cannot be read as text"), with the parser's reason."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    return InputError("path", str(path), f"{rule} ({reason})", remedy)
