"""How a run can fail: one error with one line that says what happened, whatever went wrong underneath.

Ignored: bad input, which is refused before a run begins.
"""

from __future__ import annotations

import torch

from ...base.errors import InputError, MoeplanError

_EXIT_STATUS = 4


class ExecutionFailed(MoeplanError):
    """A run that started and could not be finished: a copy failed, a worker died, nothing moved any more."""

    exit_status = _EXIT_STATUS

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(" ".join(f"the run failed: {what}; {remedy}".split()))


class DamagedStore(ExecutionFailed):
    """What a run reads is not what was written: bad input that shows only while it is read."""

    exit_status = InputError.exit_status


def device_failure(error: RuntimeError) -> ExecutionFailed | None:
    """Return the failure to raise where torch says that a device or its memory failed; None for any other error."""
    said = str(error).strip().splitlines()
    first = said[0] if said else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in first:
        return ExecutionFailed(
            f"memory was used up in the middle of it ({first})",
            "cache fewer experts, or take smaller batches and prompts",
        )
    if "CUDA" in first or "CUBLAS" in first:
        return ExecutionFailed(f"the device reported {first}", "start again in a new process")
    return None
