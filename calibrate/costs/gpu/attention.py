"""Seconds of attention: grouped (keys and values of few heads) and latent (MLA), decoding and over prompts.

    decoding   start + bytes of keys and values / rate + ⌈requests · key–value heads / units⌉ · wave + doubling · log₂(1 + context / 64)
    a prompt   start + (operations + 2 · pairs · softmax width) / flops + bytes of queries, outputs, keys and values / rate
               + ⌈tokens / 128⌉ · requests · heads / units · tile
    latents    start + √((bytes of latents / rate)² + (operations, heads in blocks of 64 / flops)²) + bytes of heads / rate + doubling · …
               + ⌈requests · blocks of heads / units⌉ · context / 64 · page, where no context is divided over units
    a layer    start + √((bytes of weights and latents / rate)² + (operations / flops)²)

Modelled: contexts of equal length. Ignored: windows (their context is what they see), kernels that fall back to slow code with more
than 16 heads a key–value head.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ....specs.machines.gpu_kernels import DecodeAttention, LatentDecode, LatentLayer, PromptAttention

Array: TypeAlias = npt.NDArray[np.float64]
Sizes: TypeAlias = float | Array
"""Of one operation, or of many at once."""

_CONTEXT_UNIT = 64
_QUERY_TILE = 128
_HEAD_BLOCK = 64


def decode_s(
    kernel: DecodeAttention, kv_bytes: Sizes, requests: Sizes, kv_heads: Sizes,
    context: Sizes, num_units: int,
) -> Array:  # fmt: skip
    """Return seconds of one token of each of `requests`; kv_bytes: read for all of them. context: of each."""
    waves = np.ceil(np.asarray(requests, np.float64) * kv_heads / num_units)
    moved = np.asarray(kv_bytes, np.float64) / kernel.bytes_per_s
    return np.asarray(kernel.start_s + moved + waves * kernel.wave_s + kernel.doubling_s * _doublings(context))


def prompt_s(
    kernel: PromptAttention, flops: Sizes, num_bytes: Sizes, requests: Sizes, heads: Sizes,
    tokens: Sizes, num_units: int, *, pairs: Sizes = 0.0, full_waves: bool = False,
) -> Array:  # fmt: skip
    """Return seconds of `tokens` new tokens of each of `requests`; num_bytes: of queries, outputs, keys and values.

    pairs: meetings of a query and a key, of all heads. full_waves: fewer tiles than units take as long as one wave (as kernels of
    latent attention do).
    """
    tiles = np.asarray(requests, np.float64) * heads * np.ceil(np.asarray(tokens, np.float64) / _QUERY_TILE)
    moved = np.asarray(num_bytes, np.float64) / kernel.bytes_per_s
    work = (
        np.asarray(flops, np.float64) + 2 * kernel.softmax_width * np.asarray(pairs, np.float64)
    ) / kernel.flops_per_s
    if full_waves:
        waves = np.maximum(1.0, tiles / num_units)
        return np.asarray(kernel.start_s + waves * (work / tiles * num_units + kernel.tile_s) + moved)
    return np.asarray(kernel.start_s + work + moved + tiles / num_units * kernel.tile_s)


def latent_decode_s(
    kernel: LatentDecode, latent_bytes: Sizes, flops_a_head: Sizes, heads: Sizes,
    head_bytes: Sizes, context: Sizes, *, requests: Sizes = 1.0, num_units: int = 1,
) -> Array:  # fmt: skip
    """Return seconds of one token of each request. flops_a_head: of all requests, for one head. head_bytes: of all heads."""
    blocks = np.ceil(np.asarray(heads, np.float64) / _HEAD_BLOCK)
    memory = np.asarray(latent_bytes, np.float64) / kernel.bytes_per_s
    compute = np.asarray(flops_a_head, np.float64) * blocks * _HEAD_BLOCK / kernel.flops_per_s
    moved = np.asarray(head_bytes, np.float64) / kernel.head_bytes_per_s
    waves = np.ceil(np.asarray(requests, np.float64) * blocks / num_units)
    alone = waves * (np.asarray(context, np.float64) / _CONTEXT_UNIT) * kernel.page_s
    return np.asarray(
        kernel.start_s + np.hypot(memory, compute) + moved + kernel.doubling_s * _doublings(context) + alone
    )


def latent_layer_s(kernel: LatentLayer, num_bytes: Sizes, flops: Sizes) -> Array:
    """Return seconds of a whole layer of latent attention; num_bytes: of weights, latents and activations."""
    memory = np.asarray(num_bytes, np.float64) / kernel.bytes_per_s
    return np.asarray(kernel.start_s + np.hypot(memory, np.asarray(flops, np.float64) / kernel.flops_per_s))


def _doublings(context: Sizes) -> Array:
    return np.asarray(np.log1p(np.asarray(context, np.float64) / _CONTEXT_UNIT) / math.log(2))
