"""The physical forms of costs: what a kernel, a layer, a copy take, from sizes and a handful of parameters.

    kernel      start + row · rows + ((bytes / bandwidth)³ + compute³)^⅓
    compute     on one unit operations / rate; on a device of many, tiles in waves over them:
                min over tile heights m of max(1, tiles / units) · (operations of a tile / (rate / units) + tile)
    dense part  the kernel's form for its weights, plus reading keys and values, plus attention's operations
    copy        latency + bytes / bandwidth
    exchange    latency + bytes of the busiest port / bandwidth + bytes of all ports / what the ranks share

Modelled: the smooth maximum of memory and compute (exponent 3: at the ridge the two overlap for the most part).
Ignored: caches.
"""

from __future__ import annotations

import numpy as np

from ...kernels.slot_layout import ExpertShape, slot_layout
from ...specs.models import FLOPS_PER_WEIGHT
from .surface import Array, Columns, Form

_SHARPNESS = 3.0
_TILE_HEIGHTS = (16, 32, 64, 128, 256)
_TILE_WIDTH = 128


def expert_form(*, many_units: bool) -> Form:
    """Return the form of one expert's kernels; columns: tokens, hidden, intermediate, gated, units, weight_bytes.

    many_units: the device runs tiles on many units (a GPU); else one unit does everything (a core).
    """

    def seconds(columns: Columns, theta: Array) -> Array:
        start, row, memory, speed = theta[:4]
        compute = _waves(columns, speed, theta[4]) if many_units else _flops(columns) / speed
        memory_s = columns["weight_bytes"] / memory
        total: Array = start + row * columns["tokens"] * columns["hidden"] + _smooth_max(memory_s, compute)
        return total

    def start(columns: Columns, times: Array) -> tuple[float, ...]:
        common = _common_start(times, columns["weight_bytes"], _flops(columns))
        row = 0.01 * float(np.min(times / (columns["tokens"] * columns["hidden"])))
        return (common[0], row, *common[1:], *((float(np.min(times)) / 8,) if many_units else ()))

    parameters = ("start_s", "row_s", "bandwidth", "rate", *(("tile_s",) if many_units else ()))
    return Form(parameters=parameters, start=start, seconds=seconds, axes=("tokens", "weight_bytes"))


def dense_form() -> Form:
    """Return the form of a layer's dense part; columns as samples of kind `dense` have them."""

    def seconds(columns: Columns, theta: Array) -> Array:
        start, token, memory, speed, cache, attention = theta
        weights = _smooth_max(columns["weight_bytes"] / memory, columns["flops"] / speed)
        context = columns["kv_bytes"] / cache + columns["attention_flops"] / attention
        total: Array = start + token * columns["tokens"] + weights + context
        return total

    def start(columns: Columns, times: Array) -> tuple[float, ...]:
        common = _common_start(times, columns["weight_bytes"], columns["flops"])
        token = 0.1 * float(np.min(times / columns["tokens"]))
        cache = _fastest(columns["kv_bytes"], times)
        return (common[0], token, *common[1:], cache, _fastest(columns["attention_flops"], times))

    return Form(
        parameters=("start_s", "token_s", "bandwidth", "rate", "cache_bandwidth", "attention_rate"),
        start=start,
        seconds=seconds,
        axes=("tokens", "context", "requests", "weight_bytes"),
    )


def head_form() -> Form:
    """Return the form of the output matrix; columns tokens, weight_bytes, flops."""

    def seconds(columns: Columns, theta: Array) -> Array:
        start, memory, speed = theta
        total: Array = start + _smooth_max(columns["weight_bytes"] / memory, columns["flops"] / speed)
        return total

    def start(columns: Columns, times: Array) -> tuple[float, ...]:
        return _common_start(times, columns["weight_bytes"], columns["flops"])

    return Form(
        parameters=("start_s", "bandwidth", "rate"), start=start, seconds=seconds, axes=("tokens", "weight_bytes")
    )


def copy_form() -> Form:
    """Return the form of a copy; column bytes."""

    def seconds(columns: Columns, theta: Array) -> Array:
        latency, bandwidth = theta
        total: Array = latency + columns["bytes"] / bandwidth
        return total

    def start(columns: Columns, times: Array) -> tuple[float, ...]:
        return float(np.min(times)) / 2, _fastest(columns["bytes"], times)

    return Form(parameters=("latency_s", "bandwidth"), start=start, seconds=seconds, axes=("bytes",))


def exchange_form(*, shared: bool) -> Form:
    """Return the form of an all-to-all; columns bytes (of the busiest port) and total_bytes (that all ranks send).

    shared: ranks share something, as the memory and cores of one host; else every port is its own.
    """

    def seconds(columns: Columns, theta: Array) -> Array:
        total: Array = theta[0] + columns["bytes"] / theta[1]
        if shared:
            total = total + columns["total_bytes"] / theta[2]
        return total

    def start(columns: Columns, times: Array) -> tuple[float, ...]:
        port = _fastest(columns["bytes"], times)
        return (float(np.min(times)) / 2, port, *((_fastest(columns["total_bytes"], times),) if shared else ()))

    parameters = ("latency_s", "bandwidth", *(("shared_bandwidth",) if shared else ()))
    return Form(parameters=parameters, start=start, seconds=seconds, axes=("total_bytes",))


def _common_start(times: Array, num_bytes: Array, flops: Array) -> tuple[float, float, float]:
    """Return a first guess of (constant part, bandwidth, rate): the best that any point reached."""
    return float(np.min(times)) / 10, _fastest(num_bytes, times), _fastest(flops, times)


def _fastest(amount: Array, times: Array) -> float:
    return float(np.max(amount / times))


def expert_weight_bytes(hidden: int, intermediate: int, gated: bool, bits: str) -> int:
    """Return the bytes of one expert as kernels lay it out."""
    shape = ExpertShape(hidden_size=int(hidden), intermediate_size=int(intermediate), gated=bool(gated))
    return slot_layout(shape, bits).payload_bytes


def _flops(columns: Columns) -> Array:
    matrices = 2.0 + columns["gated"]
    flops: Array = FLOPS_PER_WEIGHT * matrices * columns["tokens"] * columns["hidden"] * columns["intermediate"]
    return flops


def _waves(columns: Columns, speed: float, tile: float) -> Array:
    """Return the time of both matrices in waves of tiles over the device's units, at the best tile height of those known."""
    units, tokens = columns["units"], columns["tokens"]
    total = np.zeros_like(tokens)
    halves = 1.0 + columns["gated"]
    for width, depth in (
        (halves * columns["intermediate"], columns["hidden"]),
        (columns["hidden"], columns["intermediate"]),
    ):
        best = np.full_like(tokens, np.inf)
        for height in _TILE_HEIGHTS:
            tiles = np.ceil(tokens / height) * np.ceil(width / _TILE_WIDTH)
            one = FLOPS_PER_WEIGHT * height * _TILE_WIDTH * depth / (speed / units) + tile
            best = np.minimum(best, np.maximum(1.0, tiles / units) * one)
        total = total + best
    return total


def _smooth_max(one: Array, other: Array) -> Array:
    top: Array = (one**_SHARPNESS + other**_SHARPNESS) ** (1 / _SHARPNESS)
    return top
