"""Why an exchange failed, in one line that a reader can use.

Modelled: libraries put their source line before and advice after what happened; both are left out. Ignored: which rank and operation.
"""

from __future__ import annotations

import re


def reason(error: BaseException) -> str:
    """Return the first line of an error of an exchange, without the library's source line and its advice."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^\]]*:\d+\] ", "", first).partition(" This is typically")[0].rstrip(".")
