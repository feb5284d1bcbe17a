"""Decode steps that verify drafted tokens: one certain token and k guesses a pass, of which some are accepted.

Modelled: a pass routes all k + 1 tokens, so that it needs the union of their experts; accepted guesses are the recording's next tokens;
the experts of rejected ones are fetched in vain, and stay for later passes as any others do. Ignored: what a rejected guess would have
routed to (another token's routing of the recording's replies stands for it), several requests decoded together.
"""

from __future__ import annotations

import numpy as np

from ....specs.drafting import MOST_DRAFTED, Acceptance, counts_of_steps
from ....traces.recording import RoutingTrace
from ...policies.state import Array

_STRIDE, _PLACE = 2_654_435_761, 40_503  # whole numbers without a common pattern


def verifying(
    trace: RoutingTrace, passes: tuple[Array, Array, Array, Array, Array, Array], length: int, acceptance: Acceptance
) -> tuple[Array, Array, Array, Array, Array, Array, Array, Array]:
    """Return passes of one request at a time, whose decode steps have one token each, with drafts of `length` guesses verified.

    passes: step_token, step_start, step_phase, step_first, prompts and requests (see `workload.Workload`), returned alike;
    then int64 [num_steps] the tokens that come out of each pass, and the guesses that it verifies.
    """
    step_token, step_start, step_phase, step_first, prompts, requests = passes
    replies = np.flatnonzero(trace.phase == 1)
    tokens: list[Array] = []
    yields: list[int] = []
    drafted: list[int] = []
    old: list[int] = []  # the first of the old steps in each new one
    number = step = 0
    while step < len(step_phase):
        low, high = int(step_start[step]), int(step_start[step + 1])
        old.append(step)
        if step_phase[step] == 0:
            tokens.append(step_token[low:high])
            yields.append(high - low)
            drafted.append(0)
            step += 1
            continue
        row = int(step_token[low])
        after = _reply_after(trace, step_token, step_start, step_phase, step)
        accepted = min(counts_of_steps(length, acceptance, number, 1)[0], after)
        others = replies[(number * _STRIDE + np.arange(accepted, length) * _PLACE) % len(replies)]
        tokens.append(np.concatenate((np.arange(row, row + 1 + accepted), others)))
        yields.append(1 + accepted)
        drafted.append(length)
        number += 1
        step += 1 + accepted
    sizes = np.array([len(one) for one in tokens], np.int64)
    firsts = np.array(old, np.int64)
    place = np.searchsorted(firsts, np.arange(len(step_phase)), side="right") - 1
    return (
        np.concatenate(tokens).astype(np.int64), np.concatenate(([0], np.cumsum(sizes))), step_phase[firsts], step_first[firsts],
        place[prompts], place[requests], np.array(yields, np.int64), np.array(drafted, np.int64),
    )  # fmt: skip


def _reply_after(trace: RoutingTrace, step_token: Array, step_start: Array, step_phase: Array, step: int) -> int:
    """Return how many decode steps of the same request follow this one."""
    request = trace.request[step_token[step_start[step]]]
    count = 0
    for later in range(step + 1, len(step_phase)):
        row = step_token[step_start[later]]
        if step_phase[later] == 0 or trace.request[row] != request:
            break
        count += 1
        if count >= MOST_DRAFTED:
            break
    return count
