"""A device whose streams really run behind the host's back: threads that work off what was queued, each at its own pace.

It stands in for CUDA where no GPU is: calls return before their work is done, a mark is passed later, streams know nothing of
each other but what `follow` tells them. A copy fills its target with NaN first, so that whatever reads a slot too early, or is
overwritten too late, shows in the result. Kernels are the CPU's, queued like any other work.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from moeplan.devices.dense_part import DensePart
from moeplan.devices.device import COMPUTE, STREAMS, Device, Mark
from moeplan.devices.runners.cpu import CpuExperts
from moeplan.devices.runners.runner import ExpertRunner, LayerStep
from moeplan.executor.running.slots import POISON
from moeplan.kernels.expert_weights import ExpertWeights
from moeplan.specs.models.pass_shape import PassShape

Work = Callable[[], None]


class QueuedMark:
    """A mark that is passed when its stream comes to it."""

    def __init__(self, device: AsyncDevice) -> None:
        self._device, self._passed, self._at_ns = device, threading.Event(), 0

    def pass_now(self) -> None:
        self._at_ns = time.perf_counter_ns()
        self._passed.set()

    def done(self) -> bool:
        return self._passed.is_set()

    def wait(self) -> None:
        self._passed.wait()
        self._device.check()

    def at_ns(self) -> int:
        assert self._passed.is_set(), "the time of a mark that is not passed"
        return self._at_ns


class QueuedStream:
    """One thread that works off its queue."""

    def __init__(self, device: AsyncDevice, name: str) -> None:
        self._device, self._queue = device, queue.SimpleQueue[Work | None]()
        self._thread = threading.Thread(target=self._work, name=f"stream {name}", daemon=True)
        self._thread.start()

    def put(self, work: Work) -> None:
        self._queue.put(work)

    def drain(self) -> None:
        reached = threading.Event()
        self._queue.put(reached.set)
        reached.wait()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        torch.set_num_threads(1)  # sums of several threads come out in another order
        with torch.inference_mode():
            while (work := self._queue.get()) is not None:
                try:
                    work()
                except BaseException as error:  # noqa: BLE001 - told by whoever waits, as CUDA does
                    self._device.failure = self._device.failure or error


class AsyncDevice(Device):
    """Three streams; copies and kernels take a random while."""

    kind = "cpu"
    asynchronous = True

    def __init__(self, seed: int, *, longest_s: float = 3e-4, fails_at: int = 0) -> None:
        super().__init__(1 << 34)
        self.place = torch.device("cpu")
        self.failure: BaseException | None = None
        self.locked: list[torch.Tensor] = []
        self._fails_at, self._copies = fails_at, 0
        self._random, self._longest_s = random.Random(seed), longest_s
        self._current = threading.local()
        self.streams = {name: QueuedStream(self, name) for name in STREAMS}

    def host_memory(self, num_bytes: int, *, pinned: bool, what: str) -> torch.Tensor:
        memory = torch.empty(num_bytes + 256, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % 256 :][:num_bytes]
        if pinned:
            self.locked.append(memory)
        return memory

    def release_host(self, memory: torch.Tensor) -> None:
        self.locked = [other for other in self.locked if other.data_ptr() != memory.data_ptr()]

    @contextlib.contextmanager
    def enter(self, stream: str) -> Iterator[None]:
        before, threads = getattr(self._current, "stream", None), torch.get_num_threads()
        self._current.stream = self.streams[stream]
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            self._current.stream = before

    def queue(self, work: Work) -> None:
        """Queue work on the thread's stream."""
        pause = self._random.random() * self._longest_s

        def slowly() -> None:
            time.sleep(pause)
            work()

        self._current.stream.put(slowly)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._copies += 1
        fails, pause = self._copies == self._fails_at, self._random.random() * self._longest_s

        def work() -> None:
            if fails:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            target.fill_(POISON)
            time.sleep(pause)
            target.copy_(source)

        self.queue(work)

    def mark(self) -> Mark:
        mark = QueuedMark(self)
        self._current.stream.put(mark.pass_now)
        return mark

    def follow(self, mark: Mark) -> None:
        assert isinstance(mark, QueuedMark)
        passed = mark._passed

        def wait() -> None:
            passed.wait()

        self._current.stream.put(wait)

    def new_epoch(self) -> None:
        pass

    def synchronize(self) -> None:
        for stream in self.streams.values():
            stream.drain()
        self.check()

    def check(self) -> None:
        """Raise what went wrong in a stream, from now on always, as a CUDA context does."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        for stream in self.streams.values():
            stream.close()
        self.locked.clear()
        super().close()


class QueuedDense:
    """A dense part that is computed when the compute stream has come so far."""

    def __init__(self, dense: DensePart, device: AsyncDevice) -> None:
        self._dense, self._device, self.dtype = dense, device, dense.dtype

    def embed(self, rows: torch.Tensor) -> torch.Tensor:
        return self._dense.embed(rows)

    def group(self, layer: int, x: torch.Tensor, shape: PassShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self._device.streams[COMPUTE].drain()
        return self._dense.group(layer, x, shape)

    def head(self, x: torch.Tensor, shape: PassShape) -> torch.Tensor:
        self._device.streams[COMPUTE].drain()
        return self._dense.head(x, shape)


class QueuedExperts(ExpertRunner):
    """Expert kernels that are queued; the residual stream they add to is there at once, and filled later."""

    def __init__(self, weights: ExpertWeights, device: AsyncDevice) -> None:
        super().__init__(weights, device)
        self._queue, self._runner = device.queue, CpuExperts(weights, device)

    def begin(
        self, x: torch.Tensor, h: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, offsets: Sequence[int]
    ) -> LayerStep:
        return self._runner.begin(x, h, weights, experts, offsets)

    def run(self, layer_step: LayerStep, experts: Sequence[int], slots: Sequence[int]) -> None:
        mine, there = list(experts), list(slots)
        self._queue(lambda: self._runner.run(layer_step, mine, there))

    def finish(self, layer_step: LayerStep) -> None:
        before, after = layer_step.x, torch.full_like(layer_step.x, torch.nan)

        def work() -> None:
            done = LayerStep(
                before, layer_step.rows, layer_step.answers, layer_step.weights, layer_step.offsets, layer_step.order
            )
            self._runner.finish(done)
            after.copy_(done.x)

        self._queue(work)
        layer_step.x = after
