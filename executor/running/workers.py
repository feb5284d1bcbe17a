"""The threads that a run needs beside its program: they copy, write back, read from disk and compute on the host's cores.

Modelled: which of them a schedule asks for, started together and stopped together, whatever happens in between. Ignored: what
they are told to do (`program`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...devices.device import Device
from ...devices.stores.disk import DiskStore
from ...devices.stores.host import ExpertStore
from ...sim.policies.state import MISS_FETCH, PolicyConfig, PolicyState
from ...specs.schedules.offload import OffloadSchedule
from .copy_engine import BackEngine, CopyEngine, Gate
from .host_cores import HostCores
from .host_tier import HostTier
from .rows import Rows
from .slots import Slots
from .stream_copies import StreamCopies


@dataclass(slots=True, kw_only=True)
class Workers:
    """What runs beside a program; close it."""

    copies: CopyEngine | StreamCopies
    backs: BackEngine | None = None
    cores: HostCores | None = None
    tier: HostTier | None = None

    def rows(self) -> list[Rows]:
        """Return the rows that each has gathered."""
        return [worker.rows for worker in (self.copies, self.backs, self.cores, self.tier) if worker is not None]

    def close(self) -> None:
        """Stop all of them."""
        for worker in (self.copies, self.backs, self.cores, self.tier):
            if worker is not None:
                worker.close()


def start_workers(
    schedule: OffloadSchedule,
    config: PolicyConfig,
    state: PolicyState,
    *,
    device: Device,
    stores: Sequence[ExpertStore],
    slots: Slots,
    gate: Gate,
    most_reads: int,
    row_bytes: int,
    poison: bool = False,
) -> Workers:
    """Return the workers of a run that begins in `state`.

    most_reads: experts that one layer step may ask the disk for. row_bytes: rows of the largest layer step, on their way to the cores.
    """
    piece = schedule.copy.chunk_bytes
    tier: HostTier | None = None
    if isinstance(stores[0], DiskStore) and schedule.copy.host_experts is not None:
        tier = HostTier(device, stores[0], gate, state, num_spare=most_reads, pinned=schedule.copy.pinned)
    if not schedule.copy.overlap:
        copies = StreamCopies(device, stores, slots, gate, piece_bytes=piece, poison=poison)
        found = Workers(copies=copies, tier=tier)
    else:
        engine = CopyEngine(device, stores, slots, gate, piece_bytes=piece, poison=poison, tier=tier)
        found = Workers(copies=engine, tier=tier)
        if schedule.copy.write_back:
            found.backs = BackEngine(device, stores, slots, gate)
    if config.miss != MISS_FETCH:
        try:
            weights = [each.weights() for each in stores]
            found.cores = HostCores(device, weights, gate, staging_bytes=row_bytes)
        except BaseException:
            found.close()
            raise
    return found
