"""Seconds of an exchange between GPUs: start + bytes / bandwidth · (1 + √(half size / bytes)).

Bytes are those that the busiest port sends or receives: (n−1)/n of the buffer for an all-to-all, a gather or a scatter, twice that for
a reduction. Modelled: bandwidth that grows with size for longer than latency explains. Ignored: which rank sends to which.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ....specs.machines.gpu_kernels import INSIDE, ExchangeKernel, GpuKernels

Array = npt.NDArray[np.float64]


def exchange_s(kernel: ExchangeKernel, num_bytes: npt.ArrayLike, *, speed: float = 1.0) -> Array:
    """Return seconds of an exchange whose busiest port moves `num_bytes`; speed: of everything but the start."""
    moved = np.asarray(num_bytes, np.float64)
    return np.asarray(kernel.start_s + (moved + np.sqrt(kernel.half_bytes * moved)) / (kernel.bytes_per_s * speed))


def kernels_of(kernels: GpuKernels, place: str, ranks: int) -> dict[str, tuple[ExchangeKernel, ...]]:
    """Return what exchanges between `ranks` ranks of a node (or nodes) may run on, by operation.

    Where just so many were not measured, the nearest number is taken. A reduction runs on the engine's own kernel or on NCCL's. Without
    measured dispatches, they run on NCCL's all-to-all.
    """
    found: dict[str, dict[int, ExchangeKernel]] = {}
    for key, kernel in kernels.exchanges.items():
        operation, _, where = key.partition("/")
        tier, _, number = where.rpartition("-")
        if tier == place and number.isdigit():
            found.setdefault(operation, {})[int(number)] = kernel
    nearest: dict[str, tuple[ExchangeKernel, ...]] = {
        operation: (by_ranks[min(by_ranks, key=lambda n: (abs(math.log(n / ranks)), n))],)
        for operation, by_ranks in found.items()
    }
    own = nearest.pop("engine-all-reduce", ())
    if own:
        nearest["all-reduce"] = (*nearest.get("all-reduce", ()), *own)
    if place == INSIDE and "all-to-all" in nearest:
        for operation in ("normal-dispatch", "normal-combine", "low-latency-dispatch", "low-latency-combine"):
            nearest.setdefault(operation, nearest["all-to-all"])
    return nearest
