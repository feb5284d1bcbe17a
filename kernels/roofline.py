"""Operations and fewest bytes of each kernel call: what speeds are measured against.

Modelled: every input read once, every output written once, weights only of experts that have rows. Ignored: what a kernel
moves beyond that (re-reads, padding to tiles, workspace of split sums). Whole numbers only, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .slot_layout import ITEM_BYTES, packed_format

FLOPS_PER_WEIGHT = 2
"""A multiplication and an addition for every weight that a row meets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one call must do."""

    flops: int
    num_bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(flops=self.flops + other.flops, num_bytes=self.num_bytes + other.num_bytes)

    def bound_s(self, *, flops_per_s: float, bytes_per_s: float) -> float:
        """Return the seconds below which no version runs on a device with these two ceilings."""
        return max(self.flops / flops_per_s, self.num_bytes / bytes_per_s)


def matrix_bytes(weights: str, num_rows: int, num_columns: int) -> int:
    """Return the bytes of one matrix [num_rows, num_columns] stored as `weights` ("32", "16", "8", "4", "3", "2")."""
    if weights in ("32", "16"):
        return int(weights) // 8 * num_rows * num_columns
    if weights == "8":
        return num_rows * (num_columns + 4)
    return packed_format(int(weights)).num_bytes(num_rows, num_columns)


def gemm_work(
    rows_of_expert: Sequence[int],
    num_outputs: int,
    num_inputs: int,
    *,
    halves: int = 1,
    weights: str = "16",
    dtype: str = "bfloat16",
) -> Work:
    """Return the work of rows [R, num_inputs] times one matrix [halves·num_outputs, num_inputs] for each expert.

    `rows_of_expert` [num_experts] counts rows; experts without any cost nothing. Activations are `dtype` in and out; the function
    between two matrices is not counted.
    """
    num_rows = sum(rows_of_expert)
    num_active = sum(1 for count in rows_of_expert if count)
    return Work(
        flops=FLOPS_PER_WEIGHT * num_rows * halves * num_outputs * num_inputs,
        num_bytes=num_active * matrix_bytes(weights, halves * num_outputs, num_inputs)
        + num_rows * (num_inputs + num_outputs) * ITEM_BYTES[dtype],
    )


def permute_work(num_tokens: int, top_k: int, hidden_size: int, *, dtype: str = "bfloat16") -> Work:
    """Return the work of gathering each token's row once for every expert it visits."""
    item = ITEM_BYTES[dtype]
    return Work(
        flops=0, num_bytes=num_tokens * hidden_size * item * (1 + top_k) + num_tokens * top_k * ITEM_BYTES["int32"]
    )


def combine_work(num_tokens: int, top_k: int, hidden_size: int, *, dtype: str = "bfloat16") -> Work:
    """Return the work of summing the weighted answers of each token's experts."""
    item = ITEM_BYTES[dtype]
    return Work(
        flops=FLOPS_PER_WEIGHT * num_tokens * top_k * hidden_size,
        num_bytes=num_tokens * hidden_size * item * (1 + top_k)
        + num_tokens * top_k * (ITEM_BYTES["int32"] + ITEM_BYTES["float32"]),
    )
