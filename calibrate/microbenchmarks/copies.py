"""Copies measured: by size, direction and kind of host memory; in pieces; from disk; and what copies and kernels cost
each other.

Modelled: sources and targets rotate over more memory than caches hold. A companion runs in a thread of its own, on the
stream (and core) it would run on, for as long as the other one is measured. On the CPU page-locking means nothing, and
both kinds of host memory are the same. Ignored: several devices behind one switch.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ...base.units import MIB
from ...devices.device import COMPUTE, TO_DEVICE, Device, Mark
from ...devices.stores.disk import DiskStore
from ...devices.stores.host import make_store
from ...devices.stores.slot_sizes import expert_layout
from ...specs.models import ModelSpec
from .harness import Bench

POOL_BYTES = 96 * MIB
_IN_FLIGHT = 2
_JOIN_S = 30.0
# Files of this many experts are written to be read from, of fewer where they are large.
_DISK_EXPERTS = 32
_DISK_BYTES = 128 * MIB


class CopyPool:
    """Host and device memory between which copies rotate."""

    def __init__(self, device: Device, *, pinned: bool, pool_bytes: int = POOL_BYTES) -> None:
        self.device, self.pinned, self.pool_bytes = device, pinned, pool_bytes
        self.host = device.host_memory(pool_bytes, pinned=pinned, what="a pool of copies")
        self.there = device.empty((pool_bytes,), torch.uint8, "a pool of copies")
        # Random bytes, not zeros: what is copied may matter to memory that compresses.
        block = torch.randint(0, 256, (min(pool_bytes, MIB),), dtype=torch.uint8)
        for low in range(0, pool_bytes, len(block)):
            self.host[low : low + len(block)].copy_(block[: pool_bytes - low])
        self.there.zero_()

    @property
    def memory(self) -> str:
        """The label of the host memory's kind."""
        return "pinned" if self.pinned else "pageable"

    def copy(self, direction: str, number: int, num_bytes: int) -> None:
        """Copy the `number`-th run of `num_bytes` on the thread's stream."""
        places = max(1, self.pool_bytes // num_bytes)
        low = (number % places) * num_bytes
        # The other side starts elsewhere, so that a source and its target are not the same lines of a cache again and again.
        away = ((number + places // 2) % places) * num_bytes
        if direction == TO_DEVICE:
            self.device.copy(self.there[low : low + num_bytes], self.host[away : away + num_bytes])
        else:
            self.device.copy(self.host[low : low + num_bytes], self.there[away : away + num_bytes])

    def close(self) -> None:
        """Give the memory back."""
        self.device.synchronize()
        self.device.release_host(self.host)
        self.device.release(self.there)


def copy_benches(
    pool: CopyPool,
    direction: str,
    sizes: Sequence[int],
    *,
    during: str | None = None,
    companion: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
) -> list[Bench]:
    """Return a bench of one copy of each size; with a `companion` called `during`, while that runs."""
    labels = {"direction": direction, "memory": pool.memory}
    found = []
    for size in (size for size in sizes if size <= pool.pool_bytes):

        def run(number: int, size: int = size) -> None:
            pool.copy(direction, number, size)

        found.append(
            Bench(
                kind="copy" if during is None else "copy_while",
                labels=labels if during is None else labels | {"companion": during},
                arguments={"bytes": size},
                run=run,
                during=companion,
                stream=direction,
            )
        )
    return found


def piece_benches(pool: CopyPool, direction: str, size: int, pieces: Sequence[int]) -> list[Bench]:
    """Return a bench of one copy cut into each number of pieces."""
    found = []
    for count in pieces:

        def run(number: int, count: int = count) -> None:
            for piece in range(count):
                pool.copy(direction, number * count + piece, size // count)

        labels = {"direction": direction, "memory": pool.memory}
        found.append(
            Bench(
                kind="copy_piece", labels=labels, arguments={"bytes": size, "pieces": count}, run=run, stream=direction
            )
        )
    return found


def disk_benches(
    device: Device, models: Sequence[ModelSpec], bits: Sequence[str]
) -> tuple[list[Bench], Callable[[], None]]:
    """Return benches of reading one expert from a file, past the page cache where that can be dropped, and what deletes the files.

    The smallest and the largest expert of these models and formats are read: two sizes tell a start from a rate.
    """
    sizes = {expert_layout(model, kind).slot_bytes: (model, kind) for model in models for kind in bits}
    found: list[Bench] = []
    stores: list[DiskStore] = []

    def close() -> None:
        for store in stores:
            store.close()

    try:
        for size in sorted({min(sizes), max(sizes)}):
            model, kind = sizes[size]
            count = max(2, min(_DISK_EXPERTS, _DISK_BYTES // size))
            source = make_store(model, kind, device, num_keys=1, pinned=False)
            # As in a run, any expert may be next: read in their order they come a fifth sooner, since something below reads ahead.
            order = np.random.default_rng(0).permutation(count).tolist()
            target = device.host_memory(size, pinned=False, what="a disk buffer")
            target.zero_()
            store = DiskStore(source, num_keys=count)
            stores.append(store)

            def timed(
                number: int, store: DiskStore = store, target: torch.Tensor = target, order: list[int] = order
            ) -> float:
                return store.read_s(target, order[number % len(order)])

            labels, arguments = {"cache": "dropped" if store.drops_cache else "kept"}, {"bytes": size}
            found.append(
                Bench(kind="disk", labels=labels, arguments=arguments, run=timed, timed=timed, stream=TO_DEVICE)
            )
            source.close()
    except BaseException:
        close()
        raise
    return found, close


# --- companions -------------------------------------------------------------------------------------------------------


def companion(
    device: Device, stream: str, work: Callable[[int], object]
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return what runs `work` over and over on `stream`, in a thread, while its context is open; two runs are in flight."""

    @contextlib.contextmanager
    def running() -> Iterator[None]:
        stop, ready = threading.Event(), threading.Event()
        failure: list[BaseException] = []

        def loop() -> None:
            in_flight: deque[Mark] = deque()
            number = 0
            try:
                with device.enter(stream), torch.inference_mode():
                    while not stop.is_set():
                        work(number)
                        number += 1
                        in_flight.append(device.mark())
                        if len(in_flight) > _IN_FLIGHT:
                            in_flight.popleft().wait()
                            ready.set()
            except BaseException as error:  # noqa: BLE001 - raised in the measuring thread
                failure.append(error)
                ready.set()

        thread = threading.Thread(target=loop, name="moeplan companion", daemon=True)
        thread.start()
        try:
            ready.wait(_JOIN_S)
            if failure:
                raise failure[0]
            yield
        finally:
            stop.set()
            thread.join(_JOIN_S)

    return running


def copying(pool: CopyPool, direction: str, size: int) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return a companion that copies."""
    return companion(pool.device, direction, lambda number: pool.copy(direction, number, size))


def computing(device: Device, bench: Bench) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return a companion that computes what a bench computes."""
    return companion(device, COMPUTE, bench.run)
