"""One schedule run for real, from nouns to an execution.

Modelled: a `Stage` holds what runs of different schedules share (device, dense part, expert stores by weight format);
`execute` takes a schedule, its workload and its capacities and runs them on it. Routing is the recording's;
activations and weights are random but really computed. The decisions are walked first without work, to know how many
transient buffers it needs and to compile the decisions. Ignored: which schedule to run, what it was predicted to do.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ...base.errors import InputError, Internal
from ...devices.dense_part import DensePart
from ...devices.device import COMPUTE, Device, metadata_of, open_device, preemptions
from ...devices.runners.runner import open_runner
from ...devices.stores.disk import DiskStore
from ...devices.stores.host import ExpertStore, make_store
from ...sim.offload.run_input import RunInput
from ...sim.offload.simulators import decided_layer_steps, fresh_state
from ...sim.offload.workload import Workload
from ...sim.policies.state import (
    CACHED,
    Array,
    PolicyState,
    make_decision,
    needs_prices,
)
from ...specs.models import ModelSpec
from ...specs.models.pass_shape import PassShape
from ...specs.schedules.offload import OffloadSchedule
from .copy_engine import Gate
from .execution import Execution
from .failures import device_failure
from .host_tier import most_reads
from .program import Program, Step, offsets_of
from .rows import timeline_of
from .slots import Slots
from .supported import check_runnable
from .workers import Workers, start_workers

Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, note: str) -> None:
    """Report nothing."""


@dataclass(slots=True, kw_only=True)
class Stage:
    """A device with a model's dense part on it, and stores of its experts; close it, or use it as a context."""

    model: ModelSpec
    device: Device
    dense: DensePart
    seed: int
    distinct_experts: int | None
    places: int | None = None
    """Runs of bytes that the experts of a store share; None gives each its own."""
    notes: tuple[str, ...] = ()
    _stores: dict[tuple[str, bool], ExpertStore] = field(default_factory=dict)
    _files: dict[str, DiskStore] = field(default_factory=dict)

    def store(self, bits: str, *, pinned: bool = True) -> ExpertStore:
        """Return all experts in host memory, made once for each format."""
        key = (bits, pinned or self.device.kind == "cpu")
        if key not in self._stores:
            self._stores[key] = make_store(
                self.model,
                bits,
                self.device,
                num_keys=self.model.num_moe_layers * self.model.num_experts,
                pinned=pinned,
                distinct=self.distinct_experts,
                places=self.places,
                seed=self.seed,
            )
        return self._stores[key]

    def file(self, bits: str) -> DiskStore:
        """Return all experts in a temporary file, written once for each format; raises DoesNotFit where the disk has no room."""
        if bits not in self._files:
            count = self.model.num_moe_layers * self.model.num_experts
            drawn = min(count, self.distinct_experts or count)  # all of them pass through memory where all are distinct
            source = make_store(
                self.model, bits, self.device, num_keys=drawn, pinned=False, places=self.places, seed=self.seed
            )
            try:
                self._files[bits] = DiskStore(source, num_keys=count, places=self.places)
            finally:
                source.close()
        return self._files[bits]

    def stores(self, schedule: OffloadSchedule, given: ExpertStore | None = None) -> list[ExpertStore]:
        """Return the stores of a schedule's weight formats, the first (or the one given) first, in memory or in a file.

        Raises InputError for a second format that is no smaller.
        """
        name, low, pinned = schedule.experts.bits, schedule.experts.low_bits, schedule.copy.pinned
        bits = self.model.native_bits if name == "native" else name
        on_disk = schedule.copy.host_experts is not None
        first = given or (self.file(bits) if on_disk else self.store(bits, pinned=pinned))
        if low is None:
            return [first]
        second = self.store(low, pinned=pinned)
        if second.slot_bytes >= first.slot_bytes:
            raise InputError("experts.low_bits", low, f"not smaller than {first.layout.weights}", "give fewer bits")
        return [first, second]

    def forget(self, bits: str) -> None:
        """Free the experts of one format."""
        for key in [key for key in self._stores if key[0] == bits]:
            self._stores.pop(key).close()
        if bits in self._files:
            self._files.pop(bits).close()

    def close(self) -> None:
        """Give all memory back."""
        for store in (*self._stores.values(), *self._files.values()):
            store.close()
        self._stores.clear()
        self._files.clear()
        self.device.close()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def largest_pass(workloads: list[Workload]) -> PassShape:
    """Return the sizes that hold every forward pass of `workloads`."""
    requests = [np.where(w.steps.step_phase == 0, 1, w.step_tokens - _guesses(w)).max() for w in workloads]
    return PassShape(
        tokens=int(max(w.step_tokens.max() for w in workloads)),
        context_tokens=int(max(w.step_context.max() for w in workloads)),
        requests=int(max(requests)),
        guesses=int(max(_guesses(w).max(initial=0) for w in workloads)),
    )


def _guesses(workload: Workload) -> Array:
    """Return int64 [num_steps]: guesses that each pass verifies."""
    drafted = workload.step_drafted
    return np.zeros_like(workload.step_tokens) if drafted is None else drafted


def open_stage(
    model: ModelSpec,
    workloads: list[Workload],
    *,
    device: str = "cpu",
    memory_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    distinct_experts: int | None = None,
    places: int | None = None,
    seed: int = 0,
    notes: tuple[str, ...] = (),
) -> Stage:
    """Return a stage on which all of `workloads` can run.

    dtype: of everything but routed experts; None means bfloat16 on CUDA and float32 on the CPU. Raises InputError for an unknown
    or absent device, DoesNotFit where the dense part alone exceeds the memory.
    """
    opened = open_device(device, memory_bytes)
    kind = dtype or (torch.bfloat16 if opened.kind == "cuda" else torch.float32)
    try:
        with opened.enter(COMPUTE):
            dense = DensePart(model, opened, dtype=kind, largest=largest_pass(workloads), seed=seed)
            opened.synchronize()
    except BaseException:
        opened.close()
        raise
    return Stage(
        model=model,
        device=opened,
        dense=dense,
        seed=seed,
        distinct_experts=distinct_experts,
        places=places,
        notes=notes,
    )


def execute(
    stage: Stage,
    given: RunInput,
    *,
    store: ExpertStore | None = None,
    keep_outputs: bool = False,
    poison: bool = False,
    progress: Progress = silent,
) -> Execution:
    """Return what running one schedule on `stage` did.

    store: where experts come from; by default the stage's own in memory, or its file where the schedule has a disk below the
    host. keep_outputs: keep each step's result. poison: fill slots with NaN before they are filled, so that a slot read too early
    shows (slower; for tests).
    Raises InputError for an option that is only simulated, DoesNotFit where the arena exceeds the device's memory, ExecutionFailed
    where a copy fails; whatever is raised, all threads have ended and the arena is freed.
    """
    schedule, config, device = given.schedule, given.config, stage.device
    check_runnable(schedule)
    if needs_prices(config) and given.weighed is None:
        raise Internal(f"{schedule.name} weighs costs and was given none")
    stores = stage.stores(schedule, store)
    if len(stores) > 1 and schedule.experts.low_fraction > 0 and given.weighed is None:
        raise Internal(f"{schedule.name} stores some experts in a second format and was not told which")
    walked = walk_decisions(given)
    state = fresh_state(config, given.workload, given.capacities, given.weighed)
    slots = Slots(
        device,
        [each.layout for each in stores],
        stores[0].activation,
        num_slots=num_slots(state),
        num_transient=int(walked.counts[0].peak_transient),
    )
    try:
        found = _run(stage, given, stores, slots, state, keep_outputs, poison, progress)
    except RuntimeError as error:
        failure = device_failure(error)
        if failure is None:
            raise
        raise failure from error
    finally:
        with contextlib.suppress(RuntimeError):  # nothing may still read or write what is given back
            device.synchronize()
        device.release(slots.arena)
        del slots
    # What is cancelled depends on how far copies have come: such a run decides anew.
    if not config.cancel and found.counts != walked.counts[0]:
        raise Internal("a run's decisions differ from those of its simulation")
    return found


def walk_decisions(given: RunInput) -> PolicyState:
    """Return the decisions' state after a whole run in which nothing was done."""
    state = fresh_state(given.config, given.workload, given.capacities, given.weighed)
    for _ in decided_layer_steps(given.config, given.workload, state):
        pass
    return state


def _run(
    stage: Stage,
    given: RunInput,
    stores: Sequence[ExpertStore],
    slots: Slots,
    state: PolicyState,
    keep_outputs: bool,
    poison: bool,
    progress: Progress,
) -> Execution:
    schedule, config, workload, device = given.schedule, given.config, given.workload, stage.device
    gate = Gate()
    collecting = gc.isenabled()
    workers: Workers | None = None
    try:
        with device.enter(COMPUTE):
            steps = forced_steps(workload, device)
            preload(stores, slots, state, device)
            on_disk = isinstance(stores[0], DiskStore) and schedule.copy.host_experts is not None
            first = fresh_state(config, workload, given.capacities, given.weighed) if on_disk else state
            workers = start_workers(
                schedule,
                config,
                state,
                device=device,
                stores=stores,
                slots=slots,
                gate=gate,
                most_reads=most_reads(config, workload, first) if on_disk else 0,
                row_bytes=_row_bytes(stage, workload),
                poison=poison,
            )
            program = Program(
                config,
                workload.steps,
                state,
                make_decision(config),
                device=device,
                dense=stage.dense,
                experts=[open_runner(weights, device) for weights in slots.weights],
                expert_bytes=[each.slot_bytes for each in stores],
                gate=gate,
                workers=workers,
                keep_outputs=keep_outputs,
            )
            device.synchronize()
            gc.collect(1)  # the young; a whole collection takes longer than many a run
            gc.disable()  # a collection in the middle of a step would be booked as the host's work
            device.new_epoch()
            began = preemptions()
            origin = time.perf_counter_ns()
            with torch.inference_mode():
                program.run(steps, progress)
            device.synchronize()
    finally:
        if collecting:
            gc.enable()
        if workers is not None:
            workers.close()
    parts = [
        rows.times(
            origin,
            first_layer_step=workload.steps.first_layer_step,
            num_layers=config.num_layers,
            num_experts=config.num_experts,
        )
        for rows in (program.rows, *workers.rows())
    ]
    timeline = timeline_of(parts, str(metadata_of(device)["name"]))
    ends = np.array(program.step_end_ns, np.int64) - origin
    passed = np.diff(np.array([(origin, began), *program.parts], np.int64), axis=0).reshape(len(ends), -1, 2)
    return Execution(
        counts=state.counts[0].copy(),
        timeline=timeline,
        step_ns=np.diff(np.concatenate(([0], ends))),
        part_ns=passed[:, :, 0],
        disturbed=passed[:, :, 1] > 0,
        makespan_ns=int(max(timeline.rows[:, 6].max(initial=0), ends[-1] if len(ends) else 0)),
        ready_hits=program.ready_hits,
        late_hits=program.late_hits,
        slot_bytes=stores[0].slot_bytes,
        expert_bytes=tuple(each.slot_bytes for each in stores),
        outputs=tuple(program.outputs),
        notes=stage.notes,
    )


def forced_steps(workload: Workload, device: Device) -> list[Step]:
    """Return every forward pass with its routing on the device."""
    found = []
    steps, guesses = workload.steps, _guesses(workload)
    for number in range(workload.num_steps):
        tokens = steps.step_token[steps.step_start[number] : steps.step_start[number + 1]]
        experts = np.asarray(steps.experts[tokens]).astype(np.int64)  # [T, num_layers, k]
        shape = PassShape(
            tokens=len(tokens),
            context_tokens=int(workload.step_context[number]),
            requests=1 if steps.step_phase[number] == 0 else len(tokens) - int(guesses[number]),
            guesses=int(guesses[number]),
        )
        found.append(
            Step(
                shape=shape,
                rows=torch.from_numpy(tokens.astype(np.int64)).to(device.place),
                experts=torch.from_numpy(np.ascontiguousarray(experts.transpose(1, 0, 2))).to(device.place),
                offsets=offsets_of(experts, workload.num_experts),
            )
        )
    return found


def preload(stores: Sequence[ExpertStore], slots: Slots, state: PolicyState, device: Device) -> None:
    """Bring what is on the device from the start: a static cache's experts."""
    for key in np.flatnonzero(state.experts["where"] == CACHED).tolist():
        source = stores[int(state.keys[key].format)]
        source.bring(device, slots.bytes_of(int(state.experts["slot"][key])), key, 0, source.slot_bytes)


def _row_bytes(stage: Stage, workload: Workload) -> int:
    """Return the bytes of all rows that the experts of the largest layer step read."""
    rows = int(workload.step_tokens.max(initial=1)) * workload.top_k
    return rows * stage.model.hidden_size * stage.dense.dtype.itemsize


def num_slots(state: PolicyState) -> int:
    """Return the slots that the policies number: cache, staging, stream."""
    return len(state.slots)
