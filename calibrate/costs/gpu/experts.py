"""Seconds of the routed experts that sit on one GPU, from the rows of each of them.

    t = start + expert · E + choice · choices + elsewhere + (activations + 2 · tokens · hidden) / activation rate
        + Σ over both products of (memory^1.3 + compute_m^1.3)^(1/1.3)
    memory    = active experts · N · K · bytes / rate
    compute_m = max(1, Σ_e ⌈rows_e / m⌉ · ⌈N / 128⌉ / units) · (2 · m · 128 · K / (flops / units) + tile)

N and K are the width and depth of each product: (2 · intermediate, hidden) and (hidden, intermediate). The tile height m is what the
engine takes before it knows the rows of each expert (`specs.machines.gpu_kernels.HEIGHTS`): the quickest, one by the tokens that enter or
by their choices, or low tiles of a transposed kernel. Where tiles are given their weights anew each takes (128 · K · bytes) / (refill
rate / units) more. Choices are those of all entering tokens; `elsewhere` counts where some of the layer's experts sit on other GPUs.
Modelled: that only experts with rows are read, tiles that are not full, tiles in waves over the units. Ignored: tuned tables of
single shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ....specs.machines.gpu_kernels import ExpertKernel
from ....specs.models import FLOPS_PER_WEIGHT

Array = npt.NDArray[np.float64]

TILE_HEIGHTS = (16, 32, 64, 128, 256)
TILE_WIDTH = 128
_SHARPNESS = 1.3
_LOW = TILE_HEIGHTS[:2]
_POWERS = TILE_HEIGHTS[:4]
_FILLED = 0.9
"""vLLM's and SGLang's `fused_marlin_moe`: the first height that this share of even choices does not fill."""
_TRANSPOSED = 32
"""TensorRT-LLM's `grouped_gemm_dispatch` on GPUs of 132 units: as many even choices an expert, and weights are no longer the rows."""
# Accumulators leave the second product in 32 bits; the activation function reads two and writes one 32-bit value.
_SUM_BYTES, _INNER_BYTES = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """One routed expert, or a slice of it; arrays where operations of different experts are asked for at once."""

    hidden: float | Array
    intermediate: float | Array
    gated: bool
    weight_bytes: float
    """Of one weight, scales included."""
    activation_bytes: float
    """Of one value that is multiplied: 1 for 8-bit products, else 2."""

    def products(self) -> tuple[tuple[float | Array, float | Array], tuple[float | Array, float | Array]]:
        """Return ((N, K) of the first product, (N, K) of the second)."""
        into = (2 if self.gated else 1) * self.intermediate
        return (into, self.hidden), (self.hidden, self.intermediate)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """What the experts of a GPU work on; arrays of one shape, one entry for each operation."""

    active: Array
    """Experts with rows."""
    rows: Array
    """Rows of all of them."""
    tiles: tuple[Array, ...]
    """Σ_e ⌈rows_e / m⌉ for each of `TILE_HEIGHTS`."""
    tokens: Array
    """Tokens that enter."""
    all_rows: Array
    """Choices of all tokens that enter, also of experts on other GPUs."""
    num_experts: float | Array
    """Experts of the GPU, with rows or without."""
    choices: Array
    """Of the tokens that enter, wherever their experts sit: what an engine can know before it sorts them."""
    all_experts: float | Array
    """On all GPUs."""


def entering(rows: Array, top_k: int, share: float) -> Array:
    """Return the tokens behind so many rows, where a GPU holds that share of the experts: a token with several of its even choices there
    enters once.
    """
    return np.asarray(rows * (1 - (1 - share) ** top_k) / (share * top_k))


def load_of_rows(
    rows: npt.ArrayLike, *, tokens: npt.ArrayLike | None = None, all_rows: npt.ArrayLike | None = None,
    choices: npt.ArrayLike | None = None, all_experts: float | None = None,
) -> ExpertLoad:  # fmt: skip
    """Return the load of whole rows `[..., experts]` of each expert.

    tokens, all_rows, choices: `[...]`; None: each row came by itself, from another GPU, and no other choice is seen. all_experts: None
    where all sit here.
    """
    counts = np.asarray(rows, np.float64)
    total = counts.sum(axis=-1)
    seen = total if choices is None else np.broadcast_to(np.asarray(choices, np.float64), total.shape)
    return ExpertLoad(
        choices=seen, all_experts=float(counts.shape[-1]) if all_experts is None else all_experts,
        active=(counts > 0).sum(axis=-1).astype(np.float64), rows=total,
        tiles=tuple(np.ceil(counts / height).sum(axis=-1) for height in TILE_HEIGHTS),
        tokens=total if tokens is None else np.broadcast_to(np.asarray(tokens, np.float64), total.shape),
        all_rows=total if all_rows is None else np.broadcast_to(np.asarray(all_rows, np.float64), total.shape),
        num_experts=float(counts.shape[-1]),
    )  # fmt: skip


def expected_load(rows: Array, active: Array) -> ExpertLoad:
    """Return the load where only expectations are known: mean rows and the chance of any, `[..., experts]`.

    Rows of an active expert scatter around their mean: then half a tile is empty on average, and never less than one runs.
    """
    mean = np.maximum(1.0, np.divide(rows, active, out=np.ones_like(active), where=active > 0))
    tiles = tuple(
        (active * (1 + np.maximum(0.0, (mean - 1) / height - (height - 1) / (2 * height)))).sum(axis=-1)
        for height in TILE_HEIGHTS
    )
    total = rows.sum(axis=-1)
    slots = float(rows.shape[-1])
    return ExpertLoad(active=active.sum(axis=-1), rows=total, tiles=tiles, tokens=total, all_rows=total, num_experts=slots,
                      choices=total, all_experts=slots)  # fmt: skip


def experts_s(kernel: ExpertKernel, shape: ExpertShape, load: ExpertLoad, num_units: float) -> Array:
    """Return seconds of each operation of `load`, the start included also where nothing runs."""
    rows = load.all_rows if kernel.all_rows else load.rows
    total = (
        kernel.start_s
        + kernel.expert_s * load.num_experts
        + kernel.choice_s * load.choices
        + np.where(load.all_experts > load.num_experts, kernel.elsewhere_s, 0.0)
        + (rows * row_bytes(shape) + 2 * load.tokens * shape.hidden) / kernel.activation_bytes_per_s
    )
    for width, depth in shape.products():
        memory = load.active * (width * depth * shape.weight_bytes / kernel.bytes_per_s)
        compute = _compute_s(kernel, load, width, depth, shape.weight_bytes, num_units)
        total = total + _smooth(memory, np.where(load.active > 0, compute, 0.0))
    return np.asarray(total)


def row_bytes(shape: ExpertShape) -> float | Array:
    """Return the bytes of activations that one row moves."""
    outer = shape.hidden * (2 * shape.activation_bytes + _SUM_BYTES)
    return outer + shape.intermediate * (_INNER_BYTES + 2 * shape.activation_bytes)


def item_s(
    kernel: ExpertKernel, shape: ExpertShape, rows: Array, num_units: float, *, num_experts: int, top_k: int
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return (seconds that one expert with so many rows adds to an operation of many, whether compute takes the longer part).

    It is one of all of a layer's experts, each with as many rows: then waves are full and tiles as high as the engine makes them.
    """
    rows, many = np.asarray(rows, np.float64), float(num_experts)
    here = rows > 0
    total = many * rows
    load = ExpertLoad(
        active=np.asarray(many * here, np.float64), rows=total, tokens=total / top_k, all_rows=total, choices=total, num_experts=many,
        all_experts=many, tiles=tuple(many * np.ceil(rows / height) for height in TILE_HEIGHTS),
    )  # fmt: skip
    fixed = kernel.start_s + kernel.expert_s * many
    seconds = np.where(here, (experts_s(kernel, shape, load, num_units) - fixed) / many, 0.0)
    products = shape.products()
    memory = sum(
        (width * depth * shape.weight_bytes / kernel.bytes_per_s for width, depth in products), np.zeros_like(rows)
    )
    compute = sum((_compute_s(kernel, load, width, depth, shape.weight_bytes, num_units) for width, depth in products),
                  np.zeros_like(rows))  # fmt: skip
    return seconds, np.asarray(compute / many > memory)


def _compute_s(
    kernel: ExpertKernel,
    load: ExpertLoad,
    width: float | Array,
    depth: float | Array,
    weight_bytes: float,
    num_units: float,
) -> Array:
    """Return seconds of a product's tiles, as high as the engine makes them for such a load."""
    columns = np.ceil(width / TILE_WIDTH) / num_units
    by_height = [
        np.maximum(1.0, tiles * columns) * _tile_s(kernel, height, depth, num_units)
        for height, tiles in zip(TILE_HEIGHTS, load.tiles, strict=True)
    ]
    refill: float | Array = 0.0
    if kernel.refill_bytes_per_s is not None:
        refill = TILE_WIDTH * depth * weight_bytes * num_units / kernel.refill_bytes_per_s
    refilled = [
        whole + np.maximum(1.0, tiles * columns) * refill for whole, tiles in zip(by_height, load.tiles, strict=True)
    ]
    if kernel.heights in ("best", "transposed"):
        compute = np.minimum.reduce(by_height)
    elif kernel.heights == "powers":
        each = load.choices / load.num_experts
        last = len(_POWERS) - 1
        compute = np.select([np.asarray(each <= height) for height in _POWERS[:last]], refilled[:last], refilled[last])
    else:
        compute = np.select(_heights(kernel.heights, load), by_height[: len(_LOW)], by_height[len(_LOW)])
    if kernel.heights == "transposed":
        even = np.ceil(load.choices / load.all_experts)
        compute = np.select([even <= TILE_HEIGHTS[0], even < _TRANSPOSED], refilled[:2], compute)
    return np.asarray(compute)


def _heights(rule: str, load: ExpertLoad) -> list[npt.NDArray[np.bool_]]:
    """Return which operations take the lowest tiles and which the next; the others take those after."""
    if rule == "tokens":
        few = np.asarray(load.tokens <= load.num_experts)
        return [few, np.zeros_like(few)]
    each = load.choices / load.num_experts
    return [np.asarray(each < _FILLED * height) for height in _LOW]


def _tile_s(kernel: ExpertKernel, height: int, depth: float | Array, num_units: float) -> float | Array:
    return FLOPS_PER_WEIGHT * height * TILE_WIDTH * depth / (kernel.flops_per_s / num_units) + kernel.tile_s


def _smooth(one: Array, other: Array) -> Array:
    return np.asarray((one**_SHARPNESS + other**_SHARPNESS) ** (1 / _SHARPNESS))
