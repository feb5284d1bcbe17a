"""Seconds of an exchange between GPUs: start + bytes / bandwidth · (1 + √(half size / bytes)).

Bytes are those that the busiest port sends or receives: (n−1)/n of the buffer for an all-to-all, a gather or a scatter, twice that for
a reduction. Modelled: bandwidth that grows with size for longer than latency explains; where nobody measured a reduction, steps over the
links, by how cards are joined: modules with links to all others halve what is left in every step, cards behind slots pass it round a
ring. Ignored: which rank sends to which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ....specs.machines.gpu_kernels import INSIDE, ExchangeKernel, GpuKernels
from ....specs.machines.profile import Constant

Array = npt.NDArray[np.float64]
ALL_REDUCE, ALL_GATHER = "all-reduce", "all-gather"


def exchange_s(kernel: ExchangeKernel, num_bytes: npt.ArrayLike, *, speed: float = 1.0) -> Array:
    """Return seconds of an exchange whose busiest port moves `num_bytes`; speed: of everything but the start."""
    moved = np.asarray(num_bytes, np.float64)
    return np.asarray(kernel.start_s + (moved + np.sqrt(kernel.half_bytes * moved)) / (kernel.bytes_per_s * speed))


def quickest_s(kernels: Sequence[ExchangeKernel], num_bytes: npt.ArrayLike, *, speed: float = 1.0) -> Array:
    """Return seconds of an exchange that may run on any of several kernels, the quickest for its size."""
    return np.asarray(np.min([exchange_s(kernel, num_bytes, speed=speed) for kernel in kernels], axis=0))


def reductions_of(
    measured: Mapping[str, tuple[ExchangeKernel, ...]],
    ranks: int,
    step: Constant,
    rate: Constant,
    *,
    ring: bool = False,
) -> dict[str, tuple[ExchangeKernel, ...]]:
    """Return the kernels of an all-reduce and an all-gather between `ranks` ranks of one machine: as measured, else steps over links.

    measured: kernels by operation, as `kernels_of` finds them. step: from one rank to another, however little it carries. rate: of a
    rank's links in one direction. ring: each rank reaches its neighbours only. A gather has half of a reduction's steps.
    """
    steps = 2 * ((ranks - 1) if ring else math.log2(ranks))
    found = {}
    for operation, count in ((ALL_REDUCE, steps), (ALL_GATHER, steps / 2)):
        made = ExchangeKernel(
            name="steps over links", start_s=count * step.value, bytes_per_s=rate.value, half_bytes=0.0,
            relative_uncertainty=max(step.relative_uncertainty, rate.relative_uncertainty),
        )  # fmt: skip
        found[operation] = measured.get(operation) or (made,)
    return found


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
        nearest[ALL_REDUCE] = (*nearest.get(ALL_REDUCE, ()), *own)
    if place == INSIDE and "all-to-all" in nearest:
        for operation in ("normal-dispatch", "normal-combine", "low-latency-dispatch", "low-latency-combine"):
            nearest.setdefault(operation, nearest["all-to-all"])
    return nearest
