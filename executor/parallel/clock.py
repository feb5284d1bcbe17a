"""How clocks of ranks stand to one another, found by messages there and back.

    first rank   ask ──────────► answer arrives          before = when it was answered − the middle of the two
    other rank        answers with its clock

Modelled: of many round trips the fastest counts; a clock is known to half of it, for no message tells the two ways apart. Ignored: drift
during a run: processes of one machine read one clock, and other machines' drift by microseconds in the seconds that runs take.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

_TRIPS = 32


def clock_before(rank: int, ranks: int) -> tuple[int, int]:
    """Return (nanoseconds that this rank's clock is before the first one's, what that is known to); all ranks call it at once."""
    mine = (0, 0)
    for other in range(1, ranks):
        told = torch.zeros(2, dtype=torch.int64)
        if rank == 0:
            told[:] = torch.tensor(_ask(other))
            dist.send(told, other)
        elif rank == other:
            _answer()
            dist.recv(told, 0)
            mine = (int(told[0]), int(told[1]))
    return mine


def _ask(other: int) -> tuple[int, int]:
    """Return what the first rank finds of another one's clock."""
    best = (0, 2**62)
    message = torch.zeros(1, dtype=torch.int64)
    for _ in range(_TRIPS):
        began = time.perf_counter_ns()
        dist.send(message, other)
        dist.recv(message, other)
        half = (time.perf_counter_ns() - began + 1) // 2
        if half < best[1]:
            best = (int(message[0]) - began - half, half)
    return best


def _answer() -> None:
    message = torch.zeros(1, dtype=torch.int64)
    for _ in range(_TRIPS):
        dist.recv(message, 0)
        message[0] = time.perf_counter_ns()
        dist.send(message, 0)
