"""The dequantising GEMM in Triton's interpreter: every width, few and many rows, split sums, tails, slots, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kernels_cases import assert_within, normal, poisoned, searching
from moeplan.base.errors import InputError
from moeplan.kernels import reference
from moeplan.kernels.activation import ACTIVATIONS, activation
from moeplan.kernels.dequant_gemm import SplitWorkspace, dequant_down, dequant_gate_up, group_sums
from moeplan.kernels.error_bounds import Arithmetic, expert_bound
from moeplan.kernels.packing import PackedMatrix, pack
from moeplan.kernels.row_groups import groups_from_counts
from moeplan.kernels.tuning import DequantConfig

SWIGLU = activation("swiglu")
FEW = DequantConfig(block_m=8, block_n=16, split_k=1, num_warps=1, num_stages=2, scale_first=False)
SPLIT = DequantConfig(block_m=16, block_n=32, split_k=3, num_warps=1, num_stages=2, scale_first=False)
MANY = DequantConfig(block_m=32, block_n=32, split_k=1, num_warps=4, num_stages=2, scale_first=True)
configs = st.builds(
    DequantConfig,
    block_m=st.sampled_from((8, 16, 32)),
    block_n=st.sampled_from((16, 32)),
    split_k=st.integers(1, 3),
    num_warps=st.just(1),
    num_stages=st.just(2),
    scale_first=st.booleans(),
    sums_inside=st.booleans(),
)


def run(x, matrix, groups, function, config, slots=None, workspace=None):
    """The kernel into a poisoned output, checked element by element."""
    halves = 1 if function is None else function.halves
    out = poisoned((x.shape[0], matrix.num_rows // halves), x.dtype)
    more = {"slot_of_expert": slots, "out": out, "config": config, "workspace": workspace}
    if function is None:
        result = dequant_down(x, matrix, groups, **more)
    else:
        result = dequant_gate_up(x, matrix, groups, function, **more)
    assert result is out
    expected = reference.expert_matmul(x, matrix, groups.offsets, function, slot_of_expert=slots)
    arithmetic = Arithmetic(out_dtype=x.dtype, scale_first=config.scale_first, cuts_bfloat16=x.dtype == torch.bfloat16)
    assert_within(result, expected, expert_bound(x, matrix, groups.offsets, function, arithmetic, slot_of_expert=slots))
    return result


@searching(8, 300)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    num_outputs=st.integers(1, 40),
    bits_and_groups=st.sampled_from(
        [(bits, groups) for bits in (4, 3) for groups in range(1, 9)] + [(2, n) for n in range(1, 10)]
    ),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    function=st.sampled_from((None, *ACTIVATIONS.values())),
    bias=st.booleans(),
    slotted=st.booleans(),
    config=configs,
    seed=st.integers(0, 2**31),
)
@example([1], 16, (4, 4), torch.bfloat16, SWIGLU, False, False, FEW, 0)  # one token, one whole block
@example([1, 0, 3], 17, (4, 6), torch.bfloat16, None, True, True, SPLIT, 1)  # a block and a tail, split sums
@example([9], 20, (3, 7), torch.float16, SWIGLU, False, True, SPLIT, 2)  # five groups and a tail of two
@example([33, 2], 32, (3, 8), torch.bfloat16, SWIGLU, True, False, MANY, 3)  # a rest too long for a tail
@example([5], 8, (2, 9), torch.bfloat16, None, False, False, MANY, 4)  # a block and a lone group
def test_ragged_groups(counts, num_outputs, bits_and_groups, dtype, function, bias, slotted, config, seed):
    bits, num_groups = bits_and_groups
    num_inputs = num_groups * (16 if bits == 2 else 64)
    halves = 1 if function is None else function.halves
    num_slots = len(counts) + 2 if slotted else len(counts)
    packed = pack(normal(seed, num_slots, halves * num_outputs, num_inputs) / num_inputs**0.5, bits)
    matrix = PackedMatrix(
        words=packed.words,
        codes=packed.codes,
        row_scale=packed.row_scale,
        bits=bits,
        num_columns=num_inputs,
        bias=normal(seed + 1, num_slots, halves * num_outputs, dtype=dtype) if bias else None,
    )
    order = torch.randperm(num_slots, generator=torch.Generator().manual_seed(seed))[: len(counts)]
    x = normal(seed + 2, sum(counts), num_inputs, dtype=dtype)
    run(x, matrix, groups_from_counts(counts, "cpu"), function, config, order.to(torch.int32) if slotted else None)


def test_one_workspace_serves_many_calls():
    workspace = SplitWorkspace("cpu")
    workspace.reserve(4, 1)
    workspace.parts.fill_(float("nan"))
    for seed, num_outputs in ((0, 20), (1, 70), (2, 20)):
        matrix = pack(normal(seed, 2, num_outputs, 512), 4)
        run(
            normal(seed + 9, 7, 512, dtype=torch.bfloat16),
            matrix,
            groups_from_counts([3, 4], "cpu"),
            None,
            SPLIT,
            workspace=workspace,
        )
        assert not workspace.counters.any()
        workspace.parts.fill_(float("nan"))


def test_split_sums_do_not_depend_on_who_comes_last():
    matrix = pack(normal(0, 1, 16, 768), 4)
    x = normal(1, 2, 768, dtype=torch.bfloat16)
    groups = groups_from_counts([2], "cpu")
    first = run(x, matrix, groups, None, SPLIT)
    assert torch.equal(first, run(x, matrix, groups, None, SPLIT))


def test_group_sums_are_sums():
    x = normal(5, 3, 37 * 16, dtype=torch.float16)
    expected = x.double().unflatten(1, (37, 16)).sum(-1).T
    assert (group_sums(x, 16).double() - expected).abs().max() < 16 * 2**-23 * x.double().abs().max() * 16


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_whole_numbers_come_out_exact(bits):
    """Weights that are whole, unscaled numbers and inputs that pick one column: nothing may be rounded, so nothing may differ."""
    num_inputs = 640
    values = torch.randint(0, 2**bits, (8, num_inputs), generator=torch.Generator().manual_seed(bits)).float()
    values[:, ::16] = 0
    values[:, 1::16] = 2**bits - 1
    matrix = pack(values, bits)
    x = torch.eye(num_inputs, dtype=torch.bfloat16)[[0, 1, 63, 64, 255, 256, 511, 639]]
    weights = reference.expert_matmul(x, matrix, torch.tensor([0, 8]), None)
    assert torch.equal(run(x, matrix, groups_from_counts([8], "cpu"), None, FEW).double(), weights)


def test_refusals_name_the_argument():
    matrix = pack(normal(0, 2, 32, 64), 4)
    groups = groups_from_counts([1, 2], "cpu")
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    odd = PackedMatrix(
        words=matrix.words, codes=matrix.codes[:, :, :31], row_scale=matrix.row_scale, bits=4, num_columns=64
    )
    for call, field in (
        (lambda: dequant_gate_up(x.float(), matrix, groups, SWIGLU), "x"),
        (lambda: dequant_gate_up(x[:, :32], matrix, groups, SWIGLU), "x"),
        (lambda: dequant_gate_up(x, odd, groups, SWIGLU), "weights.codes"),
        (lambda: dequant_gate_up(x, pack(normal(0, 2, 31, 64), 4), groups, SWIGLU), "weights.words"),
        (lambda: dequant_down(x, pack(normal(0, 1, 32, 64), 4), groups), "num_slots"),
        (lambda: dequant_down(x, matrix, groups, out=torch.zeros(3, 32)), "out"),
        (lambda: group_sums(x, 48), "x"),
    ):
        with pytest.raises(InputError) as refusal:
            call()
        assert refusal.value.field == field
