"""A CUDA device: three streams, events as marks, page-locked host memory.

Modelled: the current stream is a property of a thread in torch, so "the thread's stream" is the same idea here and on
the CPU. Times of events are distances from an origin event that is renewed between forward passes (a float32 of
milliseconds keeps 60 ns of resolution over one second) and tied to the host's clock while its stream is idle. Page-
locked memory is pages of its own that are registered with the driver: torch's own pinned allocator rounds up to powers
of two, which an expert store of tens of gigabytes cannot afford, and memory from the heap may share its first and last
page with other memory, which the driver refuses to lock twice. Ignored: several devices, MIG, clocks (nothing of the
card is set).
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import time
from collections.abc import Iterator

import torch

from ..base.errors import DoesNotFit, InputError
from ..base.units import MS_PER_S, NS_PER_S
from .device import COMPUTE, CORES, STREAMS, Device, Mark, available_host_bytes, host_threads

_REGISTER_DEFAULT = 0
_NS_PER_MS = NS_PER_S // MS_PER_S
_EPOCH_NS = NS_PER_S // 2
_EPOCH_TRIES = 4
# The interpreter lets another thread in this often; with its usual 5 ms a copy thread that wants to start the next copy
# could wait for longer than a whole expert takes.
_SWITCH_S = 50e-6


class EventMark:
    """A mark that is a CUDA event."""

    __slots__ = ("_epoch", "event")

    def __init__(self, epoch: Epoch) -> None:
        self._epoch = epoch
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def done(self) -> bool:
        """Return whether the event has happened."""
        return bool(self.event.query())

    def wait(self) -> None:
        """Block the calling thread; the interpreter lock is released meanwhile."""
        self.event.synchronize()

    def at_ns(self) -> int:
        """Return the event's time on the host's clock."""
        since_ms: float = self._epoch.event.elapsed_time(self.event)
        return self._epoch.host_ns + round(since_ms * _NS_PER_MS)


class Epoch:
    """An origin of event times: an event, and the host's time when it happened.

    The event happened between two readings of the host's clock; of several tries the one with the closest readings
    counts, and its middle.
    """

    __slots__ = ("event", "host_ns")

    def __init__(self) -> None:
        closest = None
        torch.cuda.current_stream().synchronize()
        for _ in range(_EPOCH_TRIES):
            event = torch.cuda.Event(enable_timing=True)
            before = time.perf_counter_ns()
            event.record()
            event.synchronize()
            after = time.perf_counter_ns()
            if closest is None or after - before < closest:
                closest = after - before
                self.event, self.host_ns = event, (before + after) // 2


class CudaDevice(Device):
    """The first CUDA device."""

    kind = "cuda"
    asynchronous = True

    def __init__(self, limit_bytes: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise InputError(
                "device",
                "cuda",
                "torch sees no CUDA device",
                "use --device cpu, or install a driver and torch with CUDA",
            )
        self.place = torch.device("cuda", torch.cuda.current_device())
        free, _ = torch.cuda.mem_get_info(self.place)
        super().__init__(min(limit_bytes, free) if limit_bytes is not None else free)
        # A lower number is a higher priority: a copy kernel, where one is used, is not kept waiting by compute.
        self._streams = {name: torch.cuda.Stream(self.place, priority=0 if name == COMPUTE else -1) for name in STREAMS}
        self._registered: dict[int, torch.Tensor] = {}
        self._epoch = Epoch()

    def host_memory(self, num_bytes: int, *, pinned: bool, what: str) -> torch.Tensor:
        """Return uint8 [num_bytes], registered with the driver where `pinned`.

        Raises DoesNotFit where the host has not that much, or does not let so much be locked.
        """
        left = available_host_bytes()
        if num_bytes > left:
            raise DoesNotFit(f"{what} of {num_bytes} bytes where the host has {left} to give", num_bytes - left)
        memory = _own_pages(num_bytes)
        if pinned and num_bytes:
            memory[:: mmap.PAGESIZE].zero_()  # every page exists before it is locked
            status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, _REGISTER_DEFAULT))
            if status != 0:
                self._forget_error()
                raise DoesNotFit(
                    f"the driver did not lock {num_bytes} bytes of host memory for {what} (CUDA error {status})",
                    num_bytes,
                )
            self._registered[memory.data_ptr()] = memory
        return memory

    def release_host(self, memory: torch.Tensor) -> None:
        """Unlock memory that `host_memory` gave; nothing may still copy from or to it."""
        if self._registered.pop(memory.data_ptr(), None) is not None:
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    @contextlib.contextmanager
    def enter(self, stream: str) -> Iterator[None]:
        """Make `stream` the calling thread's current one; while it computes, threads take turns often.

        The one for experts on the host lets torch use all of the host's cores but two.
        """
        torch.cuda.set_device(self.place)
        if stream == CORES:
            with self._all_cores(), torch.cuda.stream(self._streams[stream]):
                yield
            return
        usual = sys.getswitchinterval()
        if stream == COMPUTE:
            sys.setswitchinterval(_SWITCH_S)
        try:
            with torch.cuda.stream(self._streams[stream]):
                yield
        finally:
            if stream == COMPUTE:
                sys.setswitchinterval(usual)

    @contextlib.contextmanager
    def _all_cores(self) -> Iterator[None]:
        """Let the calling thread's products use the cores that programs and copies leave."""
        threads = torch.get_num_threads()
        torch.set_num_threads(host_threads())
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def mark(self) -> Mark:
        """Return an event recorded on the thread's current stream."""
        return EventMark(self._epoch)

    def follow(self, mark: Mark) -> None:
        """Make the thread's current stream wait for the event; the host goes on."""
        if isinstance(mark, EventMark):
            torch.cuda.current_stream().wait_event(mark.event)

    def new_epoch(self) -> None:
        """Tie a new origin to the host's clock where the last one is half a second old; waits for the thread's stream."""
        if time.perf_counter_ns() - self._epoch.host_ns > _EPOCH_NS:
            self._epoch = Epoch()

    def synchronize(self) -> None:
        """Block until the device is idle."""
        torch.cuda.synchronize(self.place)

    def close(self) -> None:
        """Unlock and free everything."""
        with contextlib.suppress(RuntimeError):  # a device that failed cannot be waited for; its memory still goes back
            self.synchronize()
        for address in self._registered:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._registered.clear()
        super().close()
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()

    def _forget_error(self) -> None:
        """Clear the driver's last error, which the next kernel launch would otherwise report as its own."""
        with contextlib.suppress(RuntimeError):
            torch.empty(1, device=self.place).fill_(1.0)


def _own_pages(num_bytes: int) -> torch.Tensor:
    """Return uint8 [num_bytes] in pages that nothing else is in; they go back to the system with the tensor."""
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
