"""Small Triton functions that several kernels share: the order of tiles and the function after a matrix.

Shape legend of all kernels: R rows sorted by expert, E experts, S slots, N outputs, K inputs; `_ptr` addresses, `stride_xy` the
distance in elements of array x along y, BLOCK_ sizes of a tile.
Ignored: loads and stores, which each kernel does its own way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import CLAMPED_SWIGLU as _CLAMPED_SWIGLU
from .activation import GELU as _GELU
from .activation import RELU as _RELU
from .activation import SWIGLU as _SWIGLU

# Compiled code reads module constants only in this wrapping.
SWIGLU = tl.constexpr(_SWIGLU)
CLAMPED_SWIGLU = tl.constexpr(_CLAMPED_SWIGLU)
GELU = tl.constexpr(_GELU)
RELU = tl.constexpr(_RELU)
_HALF_SQRT = tl.constexpr(0.7071067811865476)


@triton.jit
def tile_position(tile: tl.tensor, num_tiles: tl.tensor, tiles_n: tl.tensor, GROUP_M: tl.constexpr) -> tl.tensor:
    """Row tile and column tile of the `tile`-th piece of work: GROUP_M row tiles share a sweep over the columns.

    Programs that run at the same time then read few different weights and few different rows, and find both in L2.
    """
    per_group = GROUP_M * tiles_n
    first = tile // per_group * GROUP_M
    height = tl.minimum(num_tiles - first, GROUP_M)
    local = tile % per_group
    return first + local % height, local // height


# The interpreter keeps bfloat16 as bare bits and would multiply those; there operands are widened first, which changes no product.
INTERPRETED = tl.constexpr(type(tile_position).__name__ != "JITFunction")


@triton.jit
def multiply(a: tl.tensor, b: tl.tensor, acc: tl.tensor, IMPRECISE: tl.constexpr) -> tl.tensor:
    """acc + a · b for tiles a [M, K] and b [K, N]: float32 sums of products of 16- or 8-bit floats."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, max_num_imprecise_acc=IMPRECISE)


@triton.jit
def activate(gate: tl.tensor, up: tl.tensor, alpha: tl.tensor, limit: tl.tensor, CODE: tl.constexpr) -> tl.tensor:
    """The function coded CODE (see activation.py) of float32 tiles; plain functions and none at all ignore `up`."""
    if CODE == SWIGLU:
        gate = gate / (1.0 + tl.exp(-gate)) * up
    elif CODE == CLAMPED_SWIGLU:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        gate = gate / (1.0 + tl.exp(-alpha * gate)) * (up + 1.0)
    elif CODE == GELU:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * _HALF_SQRT))
    elif CODE == RELU:
        gate = tl.maximum(gate, 0.0)
    return gate
