"""Experts on the host's cores measured: alone, beside the device's kernels and copies, and these beside them.

Modelled: the place where a run computes misses that it does not fetch: the stream CORES, with experts that lie in host memory
and are in no cache. Where the device is the host itself, copies and these experts may have to share a core; they then take turns
of some milliseconds, so what one of them is worth is told by a window of many operations, interruptions included. Ignored: how
rows get there from a GPU (a few kilobytes), several layer steps at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from ...base.units import NS_PER_S
from ...devices.device import COMPUTE, CORES, TO_DEVICE, CpuDevice, Device, host_threads
from ...specs.models import ModelSpec
from .copies import CopyPool, companion, copy_benches, copying
from .experts import ExpertArena, expert_benches
from .harness import Bench, Harness

Companion = Callable[[], contextlib.AbstractContextManager[None]]

_WINDOW_NS = 20_000_000
"""Several turns of two threads on one core: a turn is 3 ms by default on Linux, of which few systems differ."""
NUM_PARTS = 4
"""Parts that `measure_cores` consists of, each with its own time; one less on a device that works on its own."""


def host_device(device: Device) -> CpuDevice:
    """Return the device whose cores compute what is not fetched: the host, which may be the device itself."""
    return device if isinstance(device, CpuDevice) else CpuDevice(host_threads=host_threads())


def core_benches(model: ModelSpec, bits: str, tokens: Sequence[int], host: CpuDevice) -> list[Bench]:
    """Return a bench for one expert on the host's cores with each number of tokens."""
    arena = ExpertArena(host, model, bits)
    benches = expert_benches(arena, tokens, dtype=torch.float32, kind="cpu_expert")
    return [dataclasses.replace(bench, stream=CORES) for bench in benches]


def measure_cores(
    harness: Harness,
    pool: CopyPool,
    alone: Sequence[Bench],
    kernels: Sequence[Bench],
    *,
    copy_bytes: int,
    rounds: int,
    repetitions: int,
    seconds: float | None,
    while_tokens: Sequence[int],
) -> None:
    """Measure one format's experts on the host's cores (`alone`), and them and others beside each other.

    kernels: the same experts on the device. while_tokens: numbers of tokens for which companions are measured.
    """
    device, host = harness.device, host_device(harness.device)
    bits = alone[0].labels["bits"]
    on_host = partial(harness.measure_on_host, host=host, rounds=rounds, repetitions=repetitions, seconds=seconds)
    measure = partial(harness.measure, rounds=rounds, repetitions=repetitions, seconds=seconds)
    on_host(alone, what=f"{bits}-bit experts on the host's cores")
    few = [bench for bench in alone if bench.arguments["tokens"] in while_tokens]
    beside = [_beside(bench, TO_DEVICE, copying(pool, TO_DEVICE, copy_bytes)) for bench in few]
    if not device.asynchronous:
        busy = companion(device, COMPUTE, kernels[0].run)
        beside += [_beside(bench, COMPUTE, busy) for bench in few]
    on_host(beside, what=f"{bits}-bit experts on the host's cores beside others")
    cores = companion(host, CORES, alone[0].run)
    copies = copy_benches(pool, TO_DEVICE, (copy_bytes,), during=f"{CORES} {bits}", companion=cores)
    if not device.asynchronous:
        copies = [_in_windows(bench) for bench in copies]
    measure(copies, what=f"copies beside {bits}-bit experts on the host's cores")
    if not device.asynchronous:
        slowed = [
            dataclasses.replace(
                bench, kind="expert_while", labels=dict(bench.labels) | {"companion": CORES}, during=cores
            )
            for bench in kernels
            if bench.arguments["tokens"] in while_tokens
        ]
        measure(slowed, what=f"{bits}-bit experts beside the host's cores")


def _beside(bench: Bench, companion_name: str, during: Companion) -> Bench:
    """Return the bench of an expert on the cores while something else runs."""
    labels = dict(bench.labels) | {"companion": companion_name}
    return _in_windows(dataclasses.replace(bench, kind="cpu_expert_while", labels=labels, during=during))


def _in_windows(bench: Bench) -> Bench:
    """Return a bench that times a window of repetitions: the mean of one, whoever else had the core meanwhile."""

    def timed(number: int) -> float:
        began, count = time.perf_counter_ns(), 0
        while True:
            bench.run(number + count)
            count += 1
            taken = time.perf_counter_ns() - began
            if taken >= _WINDOW_NS:
                return taken / count / NS_PER_S

    return dataclasses.replace(bench, timed=timed, interrupted=True)
