"""A device as the executor and the microbenchmarks see it: memory of limited size, streams, marks in them, copies.

Modelled: a thread works on one stream at a time (`enter`); work and copies go to that stream in order, a mark is a
point in it, another stream can wait for a mark. On CUDA streams are streams and marks are events. On the CPU a stream
*is* the thread that uses it: work is done when its call returns, so a mark is simply the time at which it was made,
and "device memory" is ordinary memory that is accounted for and limited. Both are driven by the same code. Ignored:
several devices.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ..base.errors import DoesNotFit, InputError
from .host_memory import available_host_bytes as available_host_bytes

COMPUTE, TO_DEVICE, TO_HOST, CORES = "compute", "h2d", "d2h", "cpu"
"""Streams, by the names of the lanes they are; CORES is where experts that are not fetched run, on the host."""
STREAMS = (COMPUTE, TO_DEVICE, TO_HOST, CORES)
DEVICES = ("cpu", "cuda")
_ALIGNMENT = 4096
"""Of host memory: a page, so that a disk can write into it past the page cache."""
# Linux tells a thread's own figures.
_RUSAGE_THREAD: int | None = getattr(resource, "RUSAGE_THREAD", None)
# Of the memory that the system calls available, this share may be taken: the rest is for everybody else.
_AVAILABLE_FRACTION = 0.8


class Mark(Protocol):
    """A point in a stream."""

    def done(self) -> bool:
        """Return whether the stream has passed it."""

    def wait(self) -> None:
        """Block the calling thread until the stream has passed it."""

    def at_ns(self) -> int:
        """Return when the stream passed it, on the clock of `time.perf_counter_ns`; only once it is done."""


class Device(ABC):
    """Memory, streams and copies of one device; `close` gives everything back."""

    kind: str
    place: torch.device
    asynchronous: bool
    """Work goes on after the call that submitted it has returned."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._taken: list[torch.Tensor] = []

    # --- memory -----------------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: torch.dtype, what: str) -> torch.Tensor:
        """Return an uninitialised tensor in device memory, counted against the limit.

        Raises DoesNotFit, with the bytes that are missing, where `what` exceeds what is left.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        missing = self.used_bytes + num_bytes - self.limit_bytes
        if missing > 0:
            raise DoesNotFit(
                f"{what} of {num_bytes} bytes beside {self.used_bytes} in use on a device of {self.limit_bytes}",
                missing,
            )
        try:
            tensor = torch.empty(tuple(shape), dtype=dtype, device=self.place)
        except (RuntimeError, MemoryError):  # both allocators of torch raise kinds of RuntimeError
            raise DoesNotFit(f"the device could not give {num_bytes} bytes for {what}", num_bytes) from None
        self.used_bytes += num_bytes
        self._taken.append(tensor)
        return tensor

    def normal(self, shape: Sequence[int], dtype: torch.dtype, what: str, *, scale: float, seed: int) -> torch.Tensor:
        """Return a tensor in device memory filled with normal numbers of standard deviation `scale`, the same for each seed."""
        tensor = self.empty(shape, dtype, what)
        generator = torch.Generator(device=self.place).manual_seed(seed)
        flat = tensor.view(-1)
        step = 1 << 24  # by pieces, so that the float32 numbers of a large tensor never lie beside it as a whole
        for low in range(0, flat.numel(), step):
            piece = flat[low : low + step]
            piece.copy_(torch.randn(piece.numel(), generator=generator, device=self.place).mul_(scale))
        return tensor

    def release(self, tensor: torch.Tensor) -> None:
        """Let go of a tensor that this device gave; its memory is free once nobody else holds it."""
        kept = [other for other in self._taken if other is not tensor]
        if len(kept) < len(self._taken):
            self.used_bytes -= tensor.numel() * tensor.element_size()
        self._taken = kept

    def mark_memory(self) -> int:
        """Return a mark of what has been given so far, for `release_since`."""
        return len(self._taken)

    def release_since(self, mark: int) -> None:
        """Let go of every tensor given after `mark`."""
        for tensor in self._taken[mark:]:
            self.used_bytes -= tensor.numel() * tensor.element_size()
        del self._taken[mark:]

    @abstractmethod
    def host_memory(self, num_bytes: int, *, pinned: bool, what: str) -> torch.Tensor:
        """Return uint8 [num_bytes] of host memory, aligned, page-locked where asked for and where that means anything."""

    def release_host(self, memory: torch.Tensor) -> None:
        """Let go of memory that `host_memory` gave; nothing may still copy from or to it. Freed once nobody else holds it."""
        del memory  # only what is page-locked needs more than that

    # --- streams ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def enter(self, stream: str) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the calling thread works on `stream` (and, on the CPU, on its own core)."""

    @abstractmethod
    def mark(self) -> Mark:
        """Return a mark at the end of the calling thread's stream."""

    @abstractmethod
    def follow(self, mark: Mark) -> None:
        """Make the calling thread's stream wait for `mark`."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy bytes on the calling thread's stream."""
        target.copy_(source, non_blocking=True)

    @abstractmethod
    def new_epoch(self) -> None:
        """Start a new origin of times; called between forward passes, so that no clock runs for long unobserved."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block until all streams are done."""

    def close(self) -> None:
        """Give all memory back."""
        self._taken.clear()
        self.used_bytes = 0


class InstantMark:
    """A mark of a stream that is done with everything when a call returns."""

    __slots__ = ("_at_ns",)

    def __init__(self) -> None:
        self._at_ns = time.perf_counter_ns()

    def done(self) -> bool:
        """Return True."""
        return True

    def wait(self) -> None:
        """Return at once."""

    def at_ns(self) -> int:
        """Return when the mark was made."""
        return self._at_ns


class CpuDevice(Device):
    """The host's own memory and cores: kernels on one core, copies on another one.

    host_threads: how many cores an expert of the stream CORES may use; more than one are not pinned.
    """

    kind = "cpu"
    asynchronous = False

    def __init__(
        self, limit_bytes: int | None = None, *, cores: Sequence[int] | None = None, host_threads: int = 1
    ) -> None:
        super().__init__(limit_bytes if limit_bytes is not None else int(available_host_bytes() * _AVAILABLE_FRACTION))
        self.place = torch.device("cpu")
        usable = sorted(os.sched_getaffinity(0)) if cores is None else list(cores)
        # With one core everything shares it; pinning would change nothing.
        self.core_of = {
            COMPUTE: usable[0],
            TO_DEVICE: usable[1 % len(usable)],
            TO_HOST: usable[2 % len(usable) or -1],
            CORES: usable[min(3, len(usable) - 1)],  # with few cores beside the copies, never beside the kernels
        }
        self._pin = len(usable) > 1
        self._threads = {CORES: host_threads}

    def host_memory(self, num_bytes: int, *, pinned: bool, what: str) -> torch.Tensor:
        """Return uint8 [num_bytes]; raises DoesNotFit where the system has not that much left."""
        del pinned  # page-locking serves a DMA engine, and there is none
        left = int(available_host_bytes() * _AVAILABLE_FRACTION)
        if num_bytes > left:
            raise DoesNotFit(f"{what} of {num_bytes} bytes where the host has {left} to give", num_bytes - left)
        return _aligned_bytes(num_bytes)

    @contextlib.contextmanager
    def enter(self, stream: str) -> Iterator[None]:
        """Pin the calling thread to the stream's core and keep torch from starting threads of its own."""
        threads, affinity = torch.get_num_threads(), os.sched_getaffinity(0)
        wanted = self._threads.get(stream, 1)
        torch.set_num_threads(wanted)
        pin = self._pin and wanted == 1
        if pin:
            os.sched_setaffinity(0, {self.core_of[stream]})
        try:
            yield
        finally:
            if pin:
                os.sched_setaffinity(0, affinity)
            if stream == COMPUTE or wanted > 1:
                torch.set_num_threads(threads)

    def mark(self) -> Mark:
        """Return a mark that is done: the thread has done everything before it."""
        return InstantMark()

    def follow(self, mark: Mark) -> None:
        """Return at once: a mark that exists is done."""
        mark.wait()

    def new_epoch(self) -> None:
        """Do nothing: there is one clock."""

    def synchronize(self) -> None:
        """Return at once."""


def open_device(name: str, limit_bytes: int | None = None) -> Device:
    """Return the device called `name` ("cpu" or "cuda") with at most `limit_bytes` of its memory to use.

    Raises InputError for any other name, or for CUDA where there is none.
    """
    if name == "cpu":
        return CpuDevice(limit_bytes)
    if name == "cuda":
        from .cuda import CudaDevice

        return CudaDevice(limit_bytes)
    raise InputError("device", name, f"one of {', '.join(DEVICES)}", "choose one of these")


def cuda_is_present() -> bool:
    """Return whether there is a CUDA device that torch can use."""
    return bool(torch.cuda.is_available())


def host_threads() -> int:
    """Return how many of the host's cores may compute experts beside a GPU: all but the program's and the copies' own."""
    return max(1, len(os.sched_getaffinity(0)) - 2)


def preemptions() -> int:
    """Return how often the system has taken the calling thread's core away for somebody else; 0 where it does not say."""
    if _RUSAGE_THREAD is None:
        return 0
    return resource.getrusage(_RUSAGE_THREAD).ru_nivcsw


def _aligned_bytes(num_bytes: int) -> torch.Tensor:
    """Return uint8 [num_bytes] that starts at a page."""
    raw = torch.empty(num_bytes + _ALIGNMENT, dtype=torch.uint8)
    skip = -raw.data_ptr() % _ALIGNMENT
    return raw[skip : skip + num_bytes]


def metadata_of(device: Device) -> dict[str, Any]:
    """Return what identifies the device in stored results: name, kind, memory, software versions."""
    found: dict[str, Any] = {
        "kind": device.kind,
        "torch": torch.__version__,
        "memory_limit_bytes": device.limit_bytes,
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if device.kind == "cuda":
        properties = torch.cuda.get_device_properties(device.place)
        found |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "num_sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    else:
        found |= {"name": cpu_name(), "num_cores": os.cpu_count(), "affinity": sorted(os.sched_getaffinity(0))}
    return found


def cpu_name() -> str:
    """Return the processor's name as the system knows it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return os.uname().machine
