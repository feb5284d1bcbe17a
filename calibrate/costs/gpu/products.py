"""Seconds of a product of activations with a matrix of dense weights.

    t = start + √((bytes / rate)² + (operations / flops)²) + values to quantise / their rate

Bytes are the weights' and those of 16-bit activations in and out. Operations are 2 · m · n · k, or those of whole tiles in waves
over the units where a kernel's times show them. Ignored: split products, and weights that stay in caches.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ....specs.machines.gpu_kernels import ProductKernel
from ....specs.models import FLOPS_PER_WEIGHT

Array = npt.NDArray[np.float64]

_TILES = ((64, 64), (64, 128), (128, 128))
"""Heights and widths of tiles; the quickest is taken."""
_ACTIVATION_BYTES = 2


def product_s(
    kernel: ProductKernel, m: npt.ArrayLike, n: npt.ArrayLike, k: npt.ArrayLike, weight_bytes: float, num_units: int
) -> Array:
    """Return seconds of `m` rows times a matrix of `k` by `n` weights, each of `weight_bytes` bytes."""
    rows, width, depth = (np.asarray(each, np.float64) for each in (m, n, k))
    memory, compute = product_work_s(kernel, rows, width, depth, weight_bytes, num_units)
    total = kernel.start_s + np.hypot(memory, compute)
    if kernel.quantised_values_per_s is not None:
        total = total + rows * depth / kernel.quantised_values_per_s
    return np.asarray(total)


def product_work_s(kernel: ProductKernel, rows: Array, width: Array, depth: Array, weight_bytes: float,
                   num_units: int) -> tuple[Array, Array]:  # fmt: skip
    """Return (seconds of moving bytes, seconds of operations)."""
    num_bytes = width * depth * weight_bytes + _ACTIVATION_BYTES * rows * (width + depth)
    return num_bytes / kernel.bytes_per_s, operations(
        rows, width, depth, num_units, waves=kernel.waves
    ) / kernel.flops_per_s


def operations(rows: Array, width: Array, depth: Array, num_units: int, *, waves: bool) -> Array:
    """Return the operations of a product; waves: of all units for as many whole tiles as the slowest of them has."""
    plain = FLOPS_PER_WEIGHT * rows * width * depth
    if not waves:
        return plain
    best = np.full(np.broadcast(rows, width, depth).shape, np.inf)
    for height, wide in _TILES:
        tiles = np.ceil(rows / height) * np.ceil(width / wide)
        whole = np.ceil(tiles / num_units) * num_units * FLOPS_PER_WEIGHT * height * wide * depth
        best = np.minimum(best, whole)
    return np.asarray(best)
