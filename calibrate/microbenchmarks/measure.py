"""A whole calibration of a device: which benchmarks, at which sizes, in which order.

Modelled: shapes come from models (one, or several that span a range); sizes of tokens, contexts and copies are spread
over ratios; a quick calibration takes fewer of everything and stays under half a minute on a CPU. The engine's own
host costs are measured by the engine, and handed in. Ignored: fitting (`fit`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ...base.errors import InputError
from ...base.units import KIB, MIB
from ...devices.dense_part import DensePart
from ...devices.device import COMPUTE, TO_DEVICE, TO_HOST, Device
from ...devices.stores.slot_sizes import expert_layout
from ...specs.models import ModelSpec
from ...specs.models.pass_shape import largest_shape, pass_shapes
from ..samples import Sample, SampleSet
from .ceilings import ceiling_benches, sizes_for
from .collectives import ExchangeExtent, measure_all_to_all, rank_counts
from .copies import POOL_BYTES, CopyPool, companion, copy_benches, copying, disk_benches, piece_benches
from .cores import NUM_PARTS, core_benches, host_device, measure_cores
from .dense import dense_benches, head_benches
from .experts import ExpertArena, expert_benches, grouped_benches
from .harness import Bench, Harness, Progress
from .journal import Journal

_MIN_COPY_BYTES = 4 * KIB
_COMPANION_BYTES = 4 * MIB
_DISK_ROUNDS = 6
_WHILE_TOKENS = (1, 8)
_CORE_ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much is measured."""

    expert_tokens: tuple[int, ...]
    group_tokens: tuple[int, ...]
    group_experts: tuple[int, ...]
    pass_tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    copy_bytes: tuple[int, ...]
    passes: int = 1
    """How often everything is measured in turn: a machine that is slow for a while slows a pass, not one kind of work."""
    rounds: int
    """In each pass."""
    repetitions: int
    disk: bool
    core_tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 48, 128)
    run_shapes: int | None = None
    """Of how many models runs are measured, the first and the last among them; None: of all."""
    run_layers: int = 4
    run_passes: tuple[tuple[int, int], ...] = ((1, 6), (4, 4))
    """Runs: requests decoded together, and how many passes of them."""
    host_cores: bool = True
    """Experts on the host's cores too: where misses may run that are not fetched."""


FULL = Extent(
    expert_tokens=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128),
    group_tokens=(1, 2, 4, 8, 16, 32, 64, 128),
    group_experts=(2, 4, 8),
    pass_tokens=(1, 2, 4, 8, 16, 32, 64, 128),
    contexts=(128, 512, 2048),
    copy_bytes=(
        16 * KIB,
        64 * KIB,
        256 * KIB,
        512 * KIB,
        MIB,
        2 * MIB,
        3 * MIB,
        4 * MIB,
        6 * MIB,
        8 * MIB,
        12 * MIB,
        16 * MIB,
        24 * MIB,
        32 * MIB,
    ),
    passes=5,
    rounds=1,
    repetitions=4,
    disk=True,
)
QUICK = Extent(
    expert_tokens=(1, 2, 3, 4, 8, 16, 32, 64, 128),
    group_tokens=(1, 4, 16, 64, 128),
    group_experts=(2, 4),
    pass_tokens=(1, 4, 16, 48, 128),
    contexts=(128, 512),
    copy_bytes=(16 * KIB, 256 * KIB, MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB),
    passes=1,
    rounds=4,
    repetitions=2,
    disk=True,
    run_shapes=2,
)


@dataclass(slots=True)
class Allowance:
    """How long the parts of a measurement may take; what one leaves unused, the later ones share."""

    seconds: float | None
    """Left for the parts to come; None: as long as they take."""
    parts: int
    """To come."""

    @contextlib.contextmanager
    def part(self, count: int = 1) -> Iterator[float | None]:
        """Give how long each of the next `count` parts may take, and note how long they took together."""
        began = time.monotonic()
        yield None if self.seconds is None else self.seconds / max(1, self.parts)
        self.parts -= count
        if self.seconds is not None:
            self.seconds = max(0.0, self.seconds - (time.monotonic() - began))


def _num_parts(device: Device, models: int, bits: int, extent: Extent) -> int:
    """Return how many parts a whole measurement has, apart from the engine's own runs and exchanges."""
    directions = 4 if device.kind == "cuda" else 2
    in_a_pass = directions + models * (1 + 2 * bits)
    cores = models * bits * NUM_PARTS if extent.host_cores else 0
    return 1 + extent.passes * in_a_pass + cores + int(extent.disk)


def measure_device(
    device: Device,
    models: Sequence[ModelSpec],
    bits: Sequence[str],
    *,
    extent: Extent,
    dtype: torch.dtype,
    host: Callable[[], Sequence[Sample]] | None = None,
    seconds: float | None = None,
    progress: Progress = lambda done, total, note: None,
    journal: Journal | None = None,
    exchanges: ExchangeExtent | None = None,
) -> SampleSet:
    """Return samples of everything a profile of `device` needs, with the shapes of `models` and weights stored as `bits`.

    host: returns the engine's own costs. seconds: about how long all of it may take but these and the exchanges; beyond its share a
    part ends with the round it is in.
    journal: keeps the parts that are done, and holds those that need not be measured again. exchanges: the all-to-alls between
    processes; None leaves them out.
    Raises InputError without models or formats, DoesNotFit where a model's layers exceed the device.
    """
    if not models or not bits:
        raise InputError("calibrate", "no model or format", "nothing to measure", "name a model and its weight formats")
    harness = Harness(device, progress, journal)
    allowance = Allowance(seconds, _num_parts(device, len(models), len(bits), extent))
    began = time.monotonic()
    copy_bytes, side = sizes_for(device, quick=extent is QUICK)
    with device.enter(COMPUTE):
        ceilings = ceiling_benches(device, copy_bytes=copy_bytes, side=side)
    with allowance.part() as share:
        harness.measure(ceilings, rounds=3, repetitions=2, seconds=share, what="ceilings")
    for number in range(extent.passes):
        if host is not None:
            harness.keep(host, "the engine's own costs")
        _measure_copies(harness, device, extent, models, bits, allowance)
        for model in models:
            _measure_dense(harness, device, model, bits[0], extent, dtype, allowance)
            for kind in bits:
                # What the host's cores do is no part of most schedules: one pass tells enough of it.
                with_cores = extent.host_cores and number == 0
                _measure_experts(harness, device, model, kind, extent, dtype, allowance, with_cores=with_cores)
        if number == 0 and extent.disk:
            _measure_disk(harness, device, models, bits, allowance)
    if exchanges is not None:
        _measure_exchanges(harness, device, exchanges)
    progress(1, 1, f"measured in {time.monotonic() - began:.1f} s")
    names = " and ".join(model.name for model in models)
    return harness.finish(model=names, quick=extent is QUICK)


def _measure(harness: Harness, benches: Sequence[Bench], extent: Extent, allowance: Allowance, what: str) -> None:
    """Measure one part as often as the extent says, within its share of the time."""
    with allowance.part() as share:
        harness.measure(benches, rounds=extent.rounds, repetitions=extent.repetitions, seconds=share, what=what)


def _measure_copies(
    harness: Harness,
    device: Device,
    extent: Extent,
    models: Sequence[ModelSpec],
    bits: Sequence[str],
    allowance: Allowance,
) -> None:
    """Measure copies in both directions, in pieces, and in each other's way; sizes reach up to whole experts."""
    kinds = (True, False) if device.kind == "cuda" else (True,)
    slots = {expert_layout(model, kind).slot_bytes for model in models for kind in bits}
    sizes = sorted({*extent.copy_bytes, _COMPANION_BYTES, *slots})
    for pinned in kinds:
        pool = CopyPool(device, pinned=pinned, pool_bytes=max(POOL_BYTES, 2 * max(slots)))
        for direction in (TO_DEVICE, TO_HOST):
            benches = copy_benches(pool, direction, sizes)
            if pinned and direction == TO_DEVICE:
                benches += piece_benches(pool, direction, 8 * MIB, (1, 2, 8))
            if pinned:
                other = TO_HOST if direction == TO_DEVICE else TO_DEVICE
                benches += copy_benches(
                    pool, direction, (_COMPANION_BYTES,), during=other, companion=copying(pool, other, _COMPANION_BYTES)
                )
            _measure(harness, benches, extent, allowance, f"copies {direction}")
        pool.close()


def _measure_disk(
    harness: Harness, device: Device, models: Sequence[ModelSpec], bits: Sequence[str], allowance: Allowance
) -> None:
    """Measure reading experts from disk."""
    benches, close = disk_benches(device, models, bits)
    try:
        with allowance.part() as share:
            harness.measure(benches, rounds=_DISK_ROUNDS, repetitions=3, seconds=share, what="disk")
    finally:
        close()


def _measure_dense(
    harness: Harness,
    device: Device,
    model: ModelSpec,
    bits: str,
    extent: Extent,
    dtype: torch.dtype,
    allowance: Allowance,
) -> None:
    """Measure the dense part of a layer and the output matrix."""
    shapes = pass_shapes(extent.pass_tokens, extent.contexts)
    used = device.mark_memory()
    with device.enter(COMPUTE):
        arena = ExpertArena(device, model, bits, arena_bytes=MIB)
        dense = DensePart(model, device, dtype=dtype, largest=largest_shape(shapes))
        with torch.inference_mode():
            benches = dense_benches(dense, arena.runner, shapes) + head_benches(dense, extent.pass_tokens)
    _measure(harness, benches, extent, allowance, f"dense part of {model.name}")
    del arena, dense, benches
    device.release_since(used)


def _measure_experts(
    harness: Harness,
    device: Device,
    model: ModelSpec,
    bits: str,
    extent: Extent,
    dtype: torch.dtype,
    allowance: Allowance,
    *,
    with_cores: bool,
) -> None:
    """Measure one format's experts alone, in groups, beside copies, and copies beside them."""
    used = device.mark_memory()
    with device.enter(COMPUTE), torch.inference_mode():
        arena = ExpertArena(device, model, bits)
        alone = expert_benches(arena, extent.expert_tokens, dtype=dtype)
        groups = grouped_benches(arena, extent.group_tokens, extent.group_experts, dtype=dtype)
    pool = CopyPool(device, pinned=True)
    size = max(_MIN_COPY_BYTES, min(arena.slot_bytes, pool.pool_bytes // 4))
    beside = [
        type(bench)(
            kind="expert_while",
            labels=dict(bench.labels) | {"companion": TO_DEVICE},
            arguments=bench.arguments,
            run=bench.run,
            during=copying(pool, TO_DEVICE, size),
        )
        for bench in alone
        if bench.arguments["tokens"] in _WHILE_TOKENS
    ]
    _measure(harness, alone + groups + beside, extent, allowance, f"{bits}-bit experts of {model.name}")
    busy = companion(device, COMPUTE, alone[0].run)
    copies = copy_benches(pool, TO_DEVICE, (size,), during=f"compute {bits}", companion=busy) + copy_benches(
        pool, TO_DEVICE, (size,)
    )
    _measure(harness, copies, extent, allowance, f"copies beside {bits}-bit experts")
    if with_cores:
        with allowance.part(NUM_PARTS) as share:
            measure_cores(
                harness,
                pool,
                core_benches(model, bits, extent.core_tokens, host_device(device)),
                alone,
                copy_bytes=size,
                rounds=_CORE_ROUNDS,
                repetitions=extent.repetitions,
                seconds=share,
                while_tokens=_WHILE_TOKENS,
            )
    pool.close()
    del arena, alone, groups, beside, copies, pool, busy
    device.release_since(used)


def _measure_exchanges(harness: Harness, device: Device, extent: ExchangeExtent) -> None:
    """Measure all-to-alls between processes of this machine; where that cannot be done, a warning says why."""
    backend = "nccl" if device.kind == "cuda" else "gloo"
    counts, reason = rank_counts(extent, backend)
    if reason is not None:
        harness.notes.append(reason)
    for ranks in counts:
        run = partial(measure_all_to_all, ranks, backend=backend, extent=extent, progress=harness.progress)
        try:
            harness.keep(run, f"all-to-all between {ranks} ranks")
        except InputError as error:
            harness.notes.append(f"all-to-all between {ranks} ranks was not measured: {error}")
