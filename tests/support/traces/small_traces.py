"""A small valid recording, and what equal recordings are."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from moeplan.traces.format import (
    RoutingTrace,
)


def small_trace(**changes: Any) -> RoutingTrace:
    """Return a valid recording of 5 tokens in 2 requests, 3 layers, 4 of 6 experts' ids, with every optional column."""
    experts = np.array(
        [
            [[0, 1], [2, 3], [4, 5]],
            [[1, 2], [3, 4], [5, 0]],
            [[5, 4], [3, 2], [1, 0]],
            [[0, 5], [1, 4], [2, 3]],
            [[3, 0], [4, 1], [5, 2]],
        ],
        dtype=np.uint8,
    )
    predicted = np.full((5, 3, 2, 2), -1, dtype=np.int16)
    predicted[:, 1:, 0] = [[2, 3]]
    predicted[:, 2, 1] = [[0, 4]]
    probability = np.where(predicted >= 0, np.float16(0.25), np.float16(0))
    fields: dict[str, Any] = {
        "experts": experts,
        "request": np.array([0, 0, 0, 7, 7], dtype=np.int32),
        "position": np.array([0, 1, 2, 0, 5], dtype=np.int32),
        "phase": np.array([0, 0, 1, 0, 1], dtype=np.uint8),
        "num_experts": 6,
        "model": "tiny",
        "layer_ids": (1, 2, 5),
        "source": "by hand",
        "licence": "CC0",
        "weights": np.full((5, 3, 2), 0.5, dtype=np.float16),
        "predicted": predicted,
        "predicted_prob": probability.astype(np.float16),
        "metadata": {"note": "five tokens — «ünïcode»", "a": ""},
    }
    return RoutingTrace(**(fields | changes))


def same(a: RoutingTrace, b: RoutingTrace) -> None:
    """Assert that two recordings are equal in every field."""
    for field in dataclasses.fields(RoutingTrace):
        mine, yours = getattr(a, field.name), getattr(b, field.name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == yours.dtype and np.array_equal(mine, yours), field.name
        else:
            assert mine == yours, field.name
