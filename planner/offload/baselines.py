"""Every preset at the same memory, bits and batching as the search: what the answer has to beat.

Modelled: each preset gets its own best capacity; for the caches the presets use, more is never worse, so that is the most
that fits. Each is run by both engines, which must agree over a part of the window; since the SimPy model takes seconds, the presets
run in processes of their own, beside the search. Ignored: presets that do not fit, which are named with what they lack.
"""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from ...base.errors import DoesNotFit, InputError
from ...base.workers import worker_pool
from ...sim.offload.simulate import Prediction, Simulation
from ...specs.schedules.offload import OffloadSchedule
from ...specs.schedules.presets import PRESETS, load_preset
from .parts import part_of
from .space import ASSUMED_RECALL

CHECKED_STEPS, CHECKED_PROMPT_PASSES = 100, 2
"""Passes that generate tokens, and passes of each prompt, over which the SimPy model must agree with the compiled simulator: about a
second a schedule."""
# Set in the parent before the workers are forked: a recording need not be copied to reach them.
_SHARED: list[Simulation] = []


@dataclass(slots=True)
class CheckedRuns:
    """Runs of both engines in worker processes; use as a context manager, so that no worker outlives it."""

    simulation: Simulation
    _pool: ProcessPoolExecutor | None = None
    _pending: dict[str, Future[Prediction]] = field(default_factory=dict)
    _refused: dict[str, str] = field(default_factory=dict)
    _workers: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Self:
        _SHARED[:] = [self.simulation]
        self._pool = self._workers.enter_context(worker_pool(max(1, min(2, os.cpu_count() or 1))))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._workers.__exit__(kind, error, trace)
        _SHARED.clear()

    def submit(self, schedule: OffloadSchedule) -> None:
        """Start checking one schedule."""
        if self._pool is not None:
            self._pending[schedule.name] = self._pool.submit(_check, schedule)

    def submit_presets(self, base: OffloadSchedule) -> None:
        """Start checking every preset with the bits and batching of `base`."""
        for name in PRESETS:
            try:
                guesses = self.simulation.trace.predicted is not None
                schedule = preset_schedule(name, base, has_guesses=guesses)
                self.submit(schedule.with_upload(self.simulation.upload_tokens))
            except InputError as reason:  # it cannot have, say, a disk below the host
                self._refused[name] = str(reason)

    def forget(self) -> None:
        """Drop what was submitted: what has not begun never does."""
        for pending in self._pending.values():
            pending.cancel()
        self._pending.clear()
        self._refused.clear()

    def collect(self) -> tuple[list[Prediction], dict[str, str]]:
        """Return the predictions of all that were submitted, in that order, and why others do not fit."""
        found, left_out = [], dict(self._refused)
        for name, pending in self._pending.items():
            try:
                found.append(pending.result())
            except (DoesNotFit, InputError) as reason:  # too large, or this machine or recording lacks what it needs
                left_out[name] = str(reason)
        self._pending.clear()
        return found, left_out


def _check(schedule: OffloadSchedule) -> Prediction:
    simulation = _SHARED[0]
    part = part_of(simulation.workload(schedule), CHECKED_STEPS, CHECKED_PROMPT_PASSES)
    return simulation.predict(schedule, engine="both", checked_steps=part)


def preset_schedule(name: str, base: OffloadSchedule, *, has_guesses: bool) -> OffloadSchedule:
    """Return a preset with the bits and batching of `base`; guesses a recording lacks are replaced by a synthetic predictor.

    Raises InputError where the preset contradicts those.
    """
    schedule = load_preset(name).with_options(
        experts__bits=base.experts.bits, workload__concurrency=base.workload.concurrency,
        workload__prefill_chunk_tokens=base.workload.prefill_chunk_tokens,
    )  # fmt: skip
    if schedule.predictor.kind == "next-gate" and not has_guesses:
        schedule = schedule.with_options(predictor__kind="synthetic", predictor__recall=ASSUMED_RECALL)
    return schedule
