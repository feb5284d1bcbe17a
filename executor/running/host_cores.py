"""The worker thread that computes missing experts on the host's cores, where they lie, instead of fetching them.

Modelled: as in the simulator, a layer step's experts that were sent here run one after the other, from the moment the layer step is
decided, beside the kernels of those that are on the device; the next operation of the compute stream that is no expert's
waits for the last of them. Where the device is the host, rows are read and answers written in place. On a GPU the rows that
are needed come to page-locked memory on a stream of the worker's own, and answers go back on it, so that neither waits for
kernels. Ignored: which experts run here (`sim.policies.misses`).

A failure is kept, wakes the program, and is raised in its thread.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...base.errors import Internal
from ...devices.device import CORES, TO_DEVICE, CpuDevice, Device, Mark, preemptions
from ...devices.runners.cpu import row_dtype
from ...devices.runners.runner import LayerStep
from ...kernels.cpu import Scratch, run_expert
from ...kernels.expert_weights import ExpertWeights
from .copy_engine import Gate
from .failures import ExecutionFailed
from .rows import Rows

_LOOK_S = 1.0
_JOIN_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreExpert:
    """One expert that runs on the cores."""

    expert: int
    """Within its layer."""
    key: int
    """Where the store holds it."""
    format: int
    """Which store."""
    tokens: int


@dataclass(slots=True, eq=False, kw_only=True)
class CpuTask:
    """What one layer step sends to the cores."""

    step: int
    layer: int
    layer_step: LayerStep
    experts: Sequence[CoreExpert]
    end: Mark | None = None
    answered: threading.Event = field(default_factory=threading.Event)
    """Set when all answers are in the worker's stream and `end` is known (where the device is the host: when they are there)."""


class HostCores:
    """Computes experts on a thread of its own.

    weights: the experts of each store, expert `key` in slot `key` modulo the number of slots. staging_bytes: room for the rows of
    the largest layer step.
    """

    def __init__(self, device: Device, weights: Sequence[ExpertWeights], gate: Gate, *, staging_bytes: int) -> None:
        self._device, self._weights, self._gate = device, weights, gate
        self._scratch = Scratch()
        self._cpu_task: CpuTask | None = None
        self._staged: tuple[torch.Tensor, torch.Tensor] | None = None
        if device.asynchronous:
            what = "rows on their way to the host's cores"
            sent, back = (device.host_memory(staging_bytes, pinned=True, what=what) for _ in range(2))
            self._staged = sent, back
        self.rows = Rows()
        self.preempted = 0
        """How often the system has taken the worker's core away so far."""
        self.takes_turns = isinstance(device, CpuDevice) and device.core_of[CORES] == device.core_of[TO_DEVICE]
        """The worker and the copies share a core: each takes it from the other, which is nothing that disturbs a run."""
        self._thread = threading.Thread(target=self._work, name="moeplan host cores", daemon=True)
        self._thread.start()

    # --- called by the program ---------------------------------------------------------------------------------------

    def submit(self, cpu_task: CpuTask) -> None:
        """Start on a layer step's experts; those of the layer step before are done."""
        with self._gate.change:
            if self._cpu_task is not None:
                raise Internal("the cores were given a layer step before the last one was done")
            self._cpu_task = cpu_task
            self._gate.moved_at_s = time.monotonic()
            self._gate.change.notify_all()

    def wait_for(self, cpu_task: CpuTask) -> None:
        """Block until the answers are in the worker's stream, and put them before what comes next in this one."""
        while not cpu_task.answered.wait(_LOOK_S):
            self._gate.check()
            if self._gate.stopping:
                raise ExecutionFailed("it was stopped while the host's cores were waited for", "run it again")
        if cpu_task.end is None:
            self._gate.check()
            raise Internal("the cores answered without answers")
        self._device.follow(cpu_task.end)

    def close(self) -> None:
        """Stop the thread after the expert it is computing, and give its memory back."""
        with self._gate.change:
            self._gate.stopping = True
            self._gate.change.notify_all()
        self._thread.join(_JOIN_S)
        if self._staged is not None and not self._thread.is_alive():
            with contextlib.suppress(
                RuntimeError
            ):  # a device that failed cannot be waited for; its memory still goes back
                self._device.synchronize()
            for memory in self._staged:
                self._device.release_host(memory)
            self._staged = None

    # --- the worker --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            with self._device.enter(CORES), torch.inference_mode():
                while (cpu_task := self._next()) is not None:
                    self._run(cpu_task)
        except BaseException as error:  # noqa: BLE001 - whatever happens here must be raised in the program's thread
            failure = ExecutionFailed(
                f"an expert on the host's cores failed ({error})", "fetch misses instead (kernel.miss=fetch)"
            )
            failure.__cause__ = error
            self._gate.fail(failure)
        finally:
            with self._gate.change:
                if self._cpu_task is not None:
                    self._cpu_task.answered.set()

    def _next(self) -> CpuTask | None:
        with self._gate.change:
            while not self._gate.stopping:
                if self._cpu_task is not None:
                    return self._cpu_task
                self._gate.change.wait()
        return None

    def _run(self, cpu_task: CpuTask) -> None:
        layer_step, device = cpu_task.layer_step, self._device
        spans = [(layer_step.offsets[one.expert], layer_step.offsets[one.expert + 1]) for one in cpu_task.experts]
        began = time.perf_counter_ns()
        sent = self._fetch_rows(layer_step, spans)
        for at, (one, (low, high)) in enumerate(zip(cpu_task.experts, spans, strict=True)):
            if self._gate.stopping:
                return
            self._compute(layer_step, one, sent, sum(b - a for a, b in spans[:at]), low, high)
            if at == len(spans) - 1:
                cpu_task.end = device.mark()
            now = time.perf_counter_ns()
            self.rows.on_cores(cpu_task.step, cpu_task.layer, one.expert, began, now, high - low)
            began = now
            self._gate.moved_at_s = time.monotonic()
        self.preempted = preemptions()
        with self._gate.change:
            self._cpu_task = None
        cpu_task.answered.set()

    def _fetch_rows(self, layer_step: LayerStep, spans: Sequence[tuple[int, int]]) -> torch.Tensor | None:
        """Bring the rows of several experts to the host, one expert's behind the other's; None where they are there."""
        if self._staged is None:
            return None
        sent = _typed(self._staged[0], layer_step.rows, sum(high - low for low, high in spans))
        first = 0
        for low, high in spans:
            self._device.copy(sent[first : first + high - low], layer_step.rows[low:high])
            first += high - low
        self._device.mark().wait()
        return sent

    def _compute(
        self, layer_step: LayerStep, one: CoreExpert, sent: torch.Tensor | None, first: int, low: int, high: int
    ) -> None:
        """Compute one expert for rows `low` to `high` of its layer step, which are `sent` from row `first` on where they were sent."""
        weights = self._weights[one.format]
        place = one.key % weights.gate_up.num_slots  # where memory is short, experts share places
        dtype = row_dtype(weights)
        rows = layer_step.rows[low:high] if sent is None else sent[first : first + high - low]
        if sent is None and rows.dtype == dtype:
            run_expert(rows, weights, place, out=layer_step.answers[low:high], scratch=self._scratch)
            return
        answers = run_expert(rows.to(dtype), weights, place, scratch=self._scratch)
        if sent is None or self._staged is None:
            layer_step.answers[low:high] = answers
            return
        back = _typed(self._staged[1], layer_step.answers, first + high - low)[first:]
        back.copy_(answers)
        self._device.copy(layer_step.answers[low:high], back)


def _typed(memory: torch.Tensor, like: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the first `num_rows` rows in `memory`, of the type and width of `like` [R, H]."""
    wanted = num_rows * like.shape[1] * like.element_size()
    if wanted > memory.numel():
        raise Internal(f"{wanted} bytes of rows where {memory.numel()} were expected")
    return memory[:wanted].view(like.dtype).view(num_rows, like.shape[1])
