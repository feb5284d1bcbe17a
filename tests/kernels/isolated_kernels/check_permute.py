"""Sorting, gathering and combining in Triton's interpreter, and a whole layer of them with both GEMMs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kernels_cases import assert_within, normal, poisoned, searching
from moeplan.base.errors import InputError
from moeplan.kernels import permute as permuting
from moeplan.kernels import reference
from moeplan.kernels.activation import activation
from moeplan.kernels.expert_weights import slot_views, write_slot
from moeplan.kernels.experts import run_layer
from moeplan.kernels.permute import combine, permute, sort_by_expert
from moeplan.kernels.slot_layout import ExpertShape, slot_layout


@searching(14, 300)
@given(
    num_tokens=st.integers(1, 40),
    top_k=st.integers(1, 5),
    num_experts=st.integers(1, 40),
    dtype=st.sampled_from((torch.int32, torch.int64, torch.int16, torch.uint8)),
    seed=st.integers(0, 2**31),
)
@example(1, 1, 1, torch.int32, 0)
@example(40, 5, 1, torch.int64, 0)  # all to one
def test_sorting_is_stable_by_one_program_and_by_torch(num_tokens, top_k, num_experts, dtype, seed):
    experts = torch.randint(0, num_experts, (num_tokens, top_k), generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )
    offsets, token_of_row, row_of_choice = reference.sort_by_expert(experts, num_experts)
    for permutation in (sort_by_expert(experts, num_experts), permuting._sort_with_torch(experts, num_experts)):
        assert permutation.offsets.tolist() == offsets.tolist()
        assert permutation.token_of_row.tolist() == token_of_row.tolist()
        assert permutation.row_of_choice.tolist() == row_of_choice.tolist()


def test_many_choices_go_to_torch():
    experts = torch.arange(permuting.ONE_PROGRAM_CHOICES + 2).view(-1, 2) % 7
    permutation = sort_by_expert(experts, 7)
    assert permutation.groups.num_rows == permuting.ONE_PROGRAM_CHOICES + 2
    assert torch.equal(
        experts.flatten()[permutation.row_of_choice.flatten().argsort()], experts.flatten().sort().values
    )


@searching(8, 100)
@given(
    num_tokens=st.integers(1, 9),
    top_k=st.integers(1, 4),
    width=st.sampled_from((1, 7, 64, 1025)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    seed=st.integers(0, 2**31),
)
def test_gather_and_weighted_sum(num_tokens, top_k, width, dtype, seed):
    experts = torch.randint(0, 6, (num_tokens, top_k), generator=torch.Generator().manual_seed(seed))
    permutation = sort_by_expert(experts, 6)
    x = normal(seed, num_tokens, width, dtype=dtype)
    rows = permute(x, permutation, out=poisoned((num_tokens * top_k, width), dtype))
    assert torch.equal(rows, x[permutation.token_of_row.long()])
    weights = normal(seed + 1, num_tokens, top_k)
    out = combine(rows, permutation, weights, out=poisoned((num_tokens, width), dtype))
    expected = reference.combine(rows, permutation.row_of_choice, weights)
    magnitude = reference.combine(rows.abs(), permutation.row_of_choice, weights.abs())
    cut = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-11
    assert_within(out, expected, (top_k + 1) * 2.0**-23 * magnitude + cut * expected.abs() + 2.0**-24)


@pytest.mark.parametrize("weights", ["16", "8", "4", "3", "2"])
def test_a_whole_layer(weights):
    """From tokens to tokens out of an arena; two roundings in between make this a check of plumbing, not of last bits."""
    shape = ExpertShape(hidden_size=64, intermediate_size=128, bias=True)
    layout = slot_layout(shape, weights, dtype="float16")
    slots = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    experts_weights = slot_views(
        torch.zeros(4 * layout.slot_bytes, dtype=torch.uint8), layout, activation("swiglu"), slots
    )
    for slot in range(4):
        write_slot(
            experts_weights,
            slot,
            normal(slot, 256, 64) / 8,
            normal(slot + 9, 64, 128) / 11,
            gate_up_bias=normal(slot + 20, 256) / 4,
            down_bias=normal(slot + 30, 64) / 4,
        )
    x = normal(50, 5, 64, dtype=torch.float16)
    experts = torch.tensor([[0, 1], [3, 0], [1, 3], [0, 3], [3, 1]])  # nobody chose 2
    combine_weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(1))
    out = run_layer(x, experts, combine_weights, experts_weights, 4)
    expected = reference.layer(x, experts, combine_weights, experts_weights)
    error = ((out.double() - expected).norm() / expected.norm()).item()
    # float16 rounds the rows in between once (2**-11); float8 rounds each of both matrices' inputs to 4 bits (2**-4, 1/sqrt(3)
    # of it in the mean), and errors of many inputs average.
    assert error < (0.06 if weights == "8" else 2.0**-10)


def test_refusals_name_the_argument():
    permutation = sort_by_expert(torch.tensor([[0, 1], [1, 0]]), 2)
    for call, field in (
        (lambda: sort_by_expert(torch.tensor([[0, 2]]), 2), "experts"),
        (lambda: sort_by_expert(torch.tensor([[-1, 0]]), 2), "experts"),
        (lambda: sort_by_expert(torch.tensor([0, 1]), 2), "experts"),
        (lambda: sort_by_expert(torch.zeros(2, 2), 2), "experts"),
        (lambda: permute(torch.zeros(3, 8), permutation), "x"),
        (lambda: combine(torch.zeros(4, 8), permutation, torch.ones(2, 3)), "weights"),
        (lambda: combine(torch.zeros(3, 8), permutation, torch.ones(2, 2)), "y"),
        (lambda: combine(torch.zeros(4, 8), permutation, torch.ones(2, 2).double()), "weights"),
    ):
        with pytest.raises(InputError) as refusal:
            call()
        assert refusal.value.field == field
