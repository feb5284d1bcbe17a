"""A CUDA device: three streams, events as marks, page-locked host memory.

Modelled: the current stream is a property of a thread in torch, so "the thread's stream" is the same idea here and on
the CPU. Times of events are distances from an origin event that is renewed between forward passes (a float32 of
milliseconds keeps 60 ns of resolution over one second) and tied to the host's clock while the device is idle. Page-
locked memory is ordinary memory that is registered with the driver: torch's own pinned allocator rounds up to powers
of two, which an expert store of tens of gigabytes cannot afford. Ignored: several devices, MIG, clocks (nothing of the
card is set).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from ..errors import DoesNotFit, InputError
from ..units import MS_PER_S, NS_PER_S
from .device import COMPUTE, STREAMS, Device, Mark, _aligned_bytes, available_host_bytes

_REGISTER_DEFAULT = 0
_PAGE = 4096
_NS_PER_MS = NS_PER_S // MS_PER_S


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
    """An origin of event times: an event and the host's time when it happened."""

    __slots__ = ("event", "host_ns")

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()
        self.event.synchronize()
        self.host_ns = time.perf_counter_ns()


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
        self._registered: list[torch.Tensor] = []
        self._epoch = Epoch()

    def host_memory(self, num_bytes: int, *, pinned: bool, what: str) -> torch.Tensor:
        """Return uint8 [num_bytes], registered with the driver where `pinned`.

        Raises DoesNotFit where the host has not that much, or does not let so much be locked.
        """
        left = available_host_bytes()
        if num_bytes > left:
            raise DoesNotFit(f"{what} of {num_bytes} bytes where the host has {left} to give", num_bytes - left)
        memory = _aligned_bytes(num_bytes)
        if pinned and num_bytes:
            memory[::_PAGE].zero_()  # every page exists before it is locked
            status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, _REGISTER_DEFAULT)
            if int(status) != 0:
                raise DoesNotFit(
                    f"the driver did not lock {num_bytes} bytes of host memory for {what} (CUDA error {int(status)})",
                    num_bytes,
                )
            self._registered.append(memory)
        return memory

    @contextlib.contextmanager
    def enter(self, stream: str) -> Iterator[None]:
        """Make `stream` the calling thread's current one."""
        torch.cuda.set_device(self.place)
        with torch.cuda.stream(self._streams[stream]):
            yield

    def mark(self) -> Mark:
        """Return an event recorded on the thread's current stream."""
        return EventMark(self._epoch)

    def follow(self, mark: Mark) -> None:
        """Make the thread's current stream wait for the event; the host goes on."""
        if isinstance(mark, EventMark):
            torch.cuda.current_stream().wait_event(mark.event)

    def new_epoch(self) -> None:
        """Tie a new origin to the host's clock; waits for the thread's stream."""
        self._epoch = Epoch()

    def synchronize(self) -> None:
        """Block until the device is idle."""
        torch.cuda.synchronize(self.place)

    def close(self) -> None:
        """Unlock and free everything."""
        with contextlib.suppress(RuntimeError):  # a device that failed cannot be waited for; its memory still goes back
            self.synchronize()
        for memory in self._registered:
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
        self._registered.clear()
        super().close()
        torch.cuda.empty_cache()
