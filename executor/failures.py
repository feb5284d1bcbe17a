"""How a run can fail: one error with one line that says what happened, whatever went wrong underneath.

Ignored: bad input, which is refused before a run begins.
"""

from __future__ import annotations

from ..errors import MoeplanError

_EXIT_STATUS = 4


class ExecutionFailed(MoeplanError):
    """A run that started and could not be finished: a copy failed, a worker died, nothing moved any more."""

    exit_status = _EXIT_STATUS

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(" ".join(f"the run failed: {what}; {remedy}".split()))
