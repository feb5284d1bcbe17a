"""What the SimPy model queues: an operation of the compute stream, an expert's way back to the host, its way from the disk.

Modelled: what each is about and what it waits for. Ignored: time, which the model adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import simpy


@dataclass(slots=True)
class Launch:
    """One operation of the compute stream."""

    op: int
    step: int
    layer: int
    expert: int
    tokens: int
    work: int
    needs: list[simpy.Event]
    done: simpy.Event
    launched: int = 0
    """When the host had launched it."""


@dataclass(slots=True)
class Back:
    """One expert's way back to the host."""

    id: int
    key: int
    format: int
    step: int
    wait_kernel: int


@dataclass(slots=True)
class Read:
    """One expert's way from disk to the host."""

    key: int
    format: int
    step: int
