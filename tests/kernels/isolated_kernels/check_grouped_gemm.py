"""The grouped GEMM in Triton's interpreter: random ragged groups, types, activations, slots and tiles against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kernels_cases import assert_within, normal, poisoned, searching
from moeplan.base.errors import InputError
from moeplan.kernels import reference
from moeplan.kernels.activation import ACTIVATIONS, activation
from moeplan.kernels.error_bounds import Arithmetic, expert_bound
from moeplan.kernels.expert_weights import DenseMatrix, to_float8
from moeplan.kernels.grouped_gemm import descriptors_allowed, grouped_down, grouped_gate_up
from moeplan.kernels.row_groups import groups_from_counts, groups_from_offsets
from moeplan.kernels.tuning import GroupedConfig

TILE = GroupedConfig(block_m=16, block_n=32, block_k=32, group_m=2, num_warps=4, num_stages=2)
SWIGLU = activation("swiglu")
configs = st.builds(
    GroupedConfig,
    block_m=st.sampled_from((16, 32)),
    block_n=st.sampled_from((16, 32, 64)),
    block_k=st.sampled_from((32, 64)),
    group_m=st.integers(1, 3),
    num_warps=st.just(4),
    num_stages=st.just(2),
    descriptors=st.booleans(),
    flatten=st.booleans(),
)


def run(x, matrix, groups, function, config, slots=None, x_scale=None, out_dtype=torch.bfloat16):
    """The kernel into a poisoned output, checked element by element."""
    dtype = out_dtype if x_scale is not None else x.dtype
    halves = 1 if function is None else function.halves
    out = poisoned((x.shape[0], matrix.num_rows // halves), dtype)
    more = {"slot_of_expert": slots, "x_scale": x_scale, "out": out, "out_dtype": out_dtype, "config": config}
    if function is None:
        result = grouped_down(x, matrix, groups, **more)
    else:
        result = grouped_gate_up(x, matrix, groups, function, **more)
    assert result is out
    expected = reference.expert_matmul(x, matrix, groups.offsets, function, slot_of_expert=slots, x_scale=x_scale)
    arithmetic = Arithmetic(out_dtype=dtype, float8=x_scale is not None, cuts_bfloat16=True)
    bound = expert_bound(x, matrix, groups.offsets, function, arithmetic, slot_of_expert=slots, x_scale=x_scale)
    assert_within(result, expected, bound)


@searching(14, 400)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    num_outputs=st.integers(1, 70),
    num_inputs=st.integers(1, 100),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    function=st.sampled_from((None, *ACTIVATIONS.values())),
    bias=st.booleans(),
    slotted=st.booleans(),
    config=configs,
    seed=st.integers(0, 2**31),
)
@example([1], 16, 16, torch.bfloat16, SWIGLU, False, False, TILE, 0)  # one token
@example([0, 0, 3], 33, 40, torch.float16, None, True, True, TILE, 1)  # experts without rows, tails of every dimension
@example([17, 0, 64, 1], 64, 64, torch.bfloat16, ACTIVATIONS["clamped-swiglu"], True, True, TILE, 2)
def test_ragged_groups(counts, num_outputs, num_inputs, dtype, function, bias, slotted, config, seed):
    halves = 1 if function is None else function.halves
    num_experts, num_rows = len(counts), sum(counts)
    # Slots: two more than experts, in any order, in memory with gaps between them.
    num_slots = num_experts + 2 if slotted else num_experts
    storage = normal(seed, num_slots, halves * num_outputs + 3, num_inputs, dtype=dtype)
    matrix = DenseMatrix(
        values=storage[:, : halves * num_outputs],
        bias=normal(seed + 1, num_slots, halves * num_outputs, dtype=dtype) if bias else None,
    )
    order = torch.randperm(num_slots, generator=torch.Generator().manual_seed(seed))[:num_experts]
    slots = order.to(torch.int32) if slotted else None
    x = normal(seed + 2, num_rows, num_inputs, dtype=dtype)
    run(x, matrix, groups_from_counts(counts, "cpu"), function, config, slots)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("function", [SWIGLU, None])
def test_float8(descriptors, function):
    counts = [5, 0, 20]
    halves = 1 if function is None else function.halves
    values, row_scale = to_float8(normal(3, 3, halves * 48, 64))
    x, x_scale = to_float8(normal(4, 25, 64))
    config = GroupedConfig(
        block_m=16, block_n=32, block_k=32, group_m=2, num_warps=4, num_stages=2, descriptors=descriptors
    )
    matrix = DenseMatrix(values=values, row_scale=row_scale)
    run(x, matrix, groups_from_counts(counts, "cpu"), function, config, x_scale=x_scale, out_dtype=torch.float16)


def test_descriptors_are_used_only_where_strides_allow():
    assert descriptors_allowed(torch.zeros(4, 8, 16, dtype=torch.bfloat16))
    assert not descriptors_allowed(torch.zeros(4, 8, 12, dtype=torch.bfloat16))  # rows of 24 bytes
    assert not descriptors_allowed(torch.zeros(8, 16, dtype=torch.bfloat16).T)


def test_no_rows_at_all():
    matrix = DenseMatrix(values=normal(0, 2, 32, 16, dtype=torch.bfloat16))
    result = grouped_gate_up(
        torch.empty(0, 16, dtype=torch.bfloat16), matrix, groups_from_counts([0, 0], "cpu"), SWIGLU, config=TILE
    )
    assert result.shape == (0, 16)


def test_a_configuration_is_found_when_none_is_given():
    matrix = DenseMatrix(values=normal(0, 1, 32, 16, dtype=torch.bfloat16))
    groups = groups_from_counts([3], "cpu")
    x = normal(1, 3, 16, dtype=torch.bfloat16)
    assert torch.equal(
        grouped_gate_up(x, matrix, groups, SWIGLU), grouped_gate_up(x, matrix, groups, SWIGLU, config=TILE)
    )


@searching(10, 200)
@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=40), block_m=st.sampled_from((8, 16, 64)))
def test_tiles_cover_every_row_once(counts, block_m):
    groups = groups_from_counts(counts, "cpu")
    tiles = groups.tiles(block_m)
    expected = [
        (expert, first)
        for expert, count in enumerate(counts)
        for first in range(int(groups.offsets[expert]), int(groups.offsets[expert]) + count, block_m)
    ]
    num_tiles = int(tiles.num_tiles)
    assert num_tiles <= tiles.max_tiles
    assert list(zip(tiles.expert[:num_tiles].tolist(), tiles.first_row[:num_tiles].tolist(), strict=True)) == expected


def test_groups_from_offsets_are_those_from_counts():
    counted = groups_from_counts([2, 0, 3], "cpu")
    given_offsets = groups_from_offsets(torch.tensor([0, 2, 2, 5], dtype=torch.int32), 5)
    assert given_offsets.offsets.tolist() == counted.offsets.tolist()
    assert (given_offsets.num_rows, given_offsets.num_active, given_offsets.rows_per_expert) == (5, 2, 3)


def test_refusals_name_the_argument():
    bfloat16 = torch.bfloat16
    matrix = DenseMatrix(values=torch.zeros(2, 32, 16, dtype=bfloat16))
    groups = groups_from_counts([1, 2], "cpu")
    x = torch.zeros(3, 16, dtype=bfloat16)
    for call, field in (
        (lambda: grouped_gate_up(x[:2], matrix, groups, SWIGLU), "x"),
        (lambda: grouped_gate_up(x.float(), matrix, groups, SWIGLU), "x"),
        (lambda: grouped_gate_up(x.half(), matrix, groups, SWIGLU), "weights.values"),
        (lambda: grouped_gate_up(torch.zeros(16, 3, dtype=bfloat16).T, matrix, groups, SWIGLU), "x"),
        (
            lambda: grouped_gate_up(x, DenseMatrix(values=torch.zeros(2, 31, 16, dtype=bfloat16)), groups, SWIGLU),
            "weights.values",
        ),
        (
            lambda: grouped_gate_up(x, DenseMatrix(values=torch.zeros(1, 32, 16, dtype=bfloat16)), groups, SWIGLU),
            "num_slots",
        ),
        (
            lambda: grouped_gate_up(x, matrix, groups, SWIGLU, slot_of_expert=torch.tensor([0, 2], dtype=torch.int32)),
            "slot_of_expert",
        ),
        (lambda: grouped_gate_up(x, matrix, groups, SWIGLU, slot_of_expert=torch.tensor([0, 1])), "slot_of_expert"),
        (lambda: grouped_gate_up(x, matrix, groups, SWIGLU, x_scale=torch.ones(3)), "x_scale"),
        (lambda: grouped_gate_up(x, matrix, groups, SWIGLU, out=torch.zeros(3, 8, dtype=bfloat16)), "out"),
        (lambda: groups_from_counts([1, -1], "cpu"), "rows_of_expert"),
        (lambda: groups_from_counts([], "cpu"), "rows_of_expert"),
        (lambda: groups_from_counts([0] * 5000, "cpu"), "num_experts"),
        (lambda: groups_from_offsets(torch.tensor([0, 3, 2], dtype=torch.int32), 2), "offsets"),
        (lambda: groups_from_offsets(torch.tensor([0, 3]), 3), "offsets"),
    ):
        with pytest.raises(InputError) as refusal:
            call()
        assert refusal.value.field == field
