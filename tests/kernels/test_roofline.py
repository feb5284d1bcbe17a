"""Operations and fewest bytes, counted by hand."""

from __future__ import annotations

import pytest

from moeplan.kernels.roofline import Work, combine_work, gemm_work, matrix_bytes, permute_work
from moeplan.specs.models import FLOPS_PER_WEIGHT


def test_a_gemm_by_hand():
    """Three experts, one without rows; [6, 4] matrices of 16 bits, gated: 12 rows of weights each."""
    work = gemm_work([2, 0, 3], 6, 4, halves=2)
    assert work == Work(flops=2 * 5 * 12 * 4, num_bytes=2 * (12 * 4 * 2) + 5 * (4 + 6) * 2)


@pytest.mark.parametrize(
    ("weights", "num_bytes"), [("32", 32768), ("16", 16384), ("8", 32 * 260), ("4", 32 * (128 + 8 + 4))]
)
def test_bytes_of_a_matrix(weights, num_bytes):
    assert matrix_bytes(weights, 32, 256) == num_bytes


def test_flops_are_the_planners():
    assert gemm_work([7], 10, 20).flops == FLOPS_PER_WEIGHT * 7 * 200


def test_moving_rows():
    assert permute_work(3, 2, 10) == Work(flops=0, num_bytes=3 * 10 * 2 * 3 + 6 * 4)
    assert combine_work(3, 2, 10) == Work(flops=2 * 3 * 2 * 10, num_bytes=3 * 10 * 2 * 3 + 6 * 8)


def test_the_larger_of_two_times_bounds():
    work = Work(flops=1000, num_bytes=10) + Work(flops=0, num_bytes=90)
    assert work == Work(flops=1000, num_bytes=100)
    assert work.bound_s(flops_per_s=100.0, bytes_per_s=20.0) == 10.0
    assert work.bound_s(flops_per_s=1e6, bytes_per_s=20.0) == 5.0
