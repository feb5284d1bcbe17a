"""One expert on its way to the device or back, and the order in which waiting ones are taken.

Modelled: demands before prefetches; demands by number, prefetches by the layer step they are for, then by number; a
prefetch may be promoted while it waits or runs. The order is that of the simulator's copy engine
(`sim.lanes.Transfer.order`). Ignored: what is copied and by whom.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...devices.device import Mark
from ...sim.policies.state import DEMAND

if TYPE_CHECKING:
    from .host_tier import Held


@dataclass(slots=True, eq=False)
class Transfer:
    """One expert's way to the device, perhaps in pieces."""

    id: int
    key: int
    kind: int
    """DEMAND or PREFETCH; changed by a promotion."""
    target: int
    """Layer step it is for."""
    slot: int
    """Slot it fills; -1 while a transient one has no buffer."""
    transient: bool
    """A buffer is given to it when it starts, and taken back when its layer step is over."""
    wait_kernel: int
    """Kernel number that must have finished with the slot, -1 when none."""
    wait_back: int
    """Write-back that must have left the slot, -1 when none."""
    format: int
    """Weight format that moves: which store it comes from."""
    num_bytes: int
    """Bytes of one expert in that format."""
    held: Held | None = None
    """Where the host holds its bytes, where there is a disk below."""
    reads: bool = False
    """It begins with a read from disk."""
    moved_bytes: int = 0
    """How far it has come."""
    end: Mark | None = None
    issued: threading.Event = field(default_factory=threading.Event)
    """Set when the last piece is in the stream and `end` is known (on the CPU: when it has arrived)."""

    def arrived(self) -> bool:
        """Return whether all bytes are there now."""
        return self.end is not None and self.end.done()


@dataclass(slots=True, eq=False)
class WriteBack:
    """One expert's way back to the host."""

    id: int
    key: int
    step: int
    slot: int
    wait_kernel: int
    format: int
    num_bytes: int


class Waiting:
    """The transfers that wait for the copy engine."""

    def __init__(self) -> None:
        self._demands: list[tuple[int, int, int, Transfer]] = []
        self._prefetches: list[tuple[int, int, int, Transfer]] = []
        self._by_id: dict[int, Transfer] = {}
        self._entries = itertools.count()  # one that was taken out of turn and waits again is in its heap twice

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, transfer: Transfer) -> None:
        """Let a transfer wait (again)."""
        self._by_id[transfer.id] = transfer
        if transfer.kind == DEMAND:
            heapq.heappush(self._demands, (transfer.id, transfer.id, next(self._entries), transfer))
        else:
            heapq.heappush(self._prefetches, (transfer.target, transfer.id, next(self._entries), transfer))

    def promote(self, transfer_id: int) -> bool:
        """Turn a waiting prefetch into a demand; return whether it was found."""
        transfer = self._by_id.get(transfer_id)
        if transfer is None:
            return False
        if transfer.kind != DEMAND:
            transfer.kind = DEMAND
            heapq.heappush(self._demands, (transfer.id, transfer.id, next(self._entries), transfer))
        return True

    def first(self) -> Transfer | None:
        """Return the transfer whose turn it is, still waiting; None when there is none."""
        for heap in (self._demands, self._prefetches):
            while heap:
                transfer = heap[0][3]
                promoted = heap is self._prefetches and transfer.kind == DEMAND
                if self._by_id.get(transfer.id) is transfer and not promoted:
                    return transfer
                heapq.heappop(heap)  # taken, or promoted into the other heap
        return None

    def take(self, transfer: Transfer) -> None:
        """Remove a transfer, which is about to start."""
        del self._by_id[transfer.id]  # `first` passes over what is left of it

    def untouched(self, layer_step: int) -> list[Transfer]:
        """Return the waiting prefetches for `layer_step` or earlier of which nothing has moved, in the order of their turn.

        Those that must be read from disk first are left out: their reads have been asked for.
        """
        found = [t for t in self if t.kind != DEMAND and t.target <= layer_step and t.moved_bytes == 0 and not t.reads]
        return sorted(found, key=lambda transfer: (transfer.target, transfer.id))

    def drop(self, transfer: Transfer) -> None:
        """Take a waiting transfer back; its place in line is passed over."""
        del self._by_id[transfer.id]

    def __iter__(self) -> Iterator[Transfer]:
        return iter(self._by_id.values())
