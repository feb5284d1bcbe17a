"""Tokens to experts and back: sort the choices by expert, gather the tokens' rows, sum the experts' answers.

    experts [T, k] ──sort_by_expert──► Permutation ──permute──► rows [R, H] sorted by expert ──…──► y [R, H] ──combine──► [T, H]

R = T·k. The sort is stable (token by token, then choice by choice), so a recording always runs in the same order. Few choices are
sorted by one program of one kernel, which counts and places them in chunks; many by torch's radix sort. Both orders are equal.

Modelled: any number of choices, experts nobody chose. Ignored: choices to be dropped (capacity limits), replicas of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..base.errors import InputError
from .checks import (
    check_dtype,
    check_output,
    check_rows_contiguous,
    check_runnable,
    check_same_device,
    check_shape,
    described,
)
from .row_groups import RowGroups, groups_from_offsets

ONE_PROGRAM_CHOICES = 4096
"""Most choices that one program sorts; beyond, torch's sort over the whole device is faster than walking in chunks."""
_CHUNK = 32
_BLOCK_COLUMNS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Permutation:
    """Where each choice went: `offsets` int32 [E + 1], `token_of_row` int32 [R], `row_of_choice` int32 [T, k]."""

    offsets: torch.Tensor
    token_of_row: torch.Tensor
    row_of_choice: torch.Tensor

    @property
    def groups(self) -> RowGroups:
        """The sorted rows by expert, as the GEMMs take them."""
        return groups_from_offsets(self.offsets, self.token_of_row.shape[0])


def sort_by_expert(experts: torch.Tensor, num_experts: int) -> Permutation:
    """Return where the choices `experts` [T, k] (any integers) of `num_experts` experts go.

    Expert numbers out of range raise InputError on the CPU; on a GPU they are the caller's promise, since looking would make the
    host wait.
    """
    check_shape("experts", experts, (None, None), "[T, k]")
    check_dtype("experts", experts, (torch.int32, torch.int64, torch.int16, torch.uint8))
    if num_experts < 1 or experts.shape[1] < 1:
        raise InputError(
            "experts", described(experts), "at least one expert and one choice for each token", "check the router"
        )
    if (
        experts.device.type == "cpu"
        and experts.numel()
        and not 0 <= int(experts.min()) <= int(experts.max()) < num_experts
    ):
        raise InputError(
            "experts",
            [int(experts.min()), int(experts.max())],
            f"experts are 0 … {num_experts - 1}",
            "check the router",
        )
    num_choices = experts.numel()
    if num_choices > ONE_PROGRAM_CHOICES:
        return _sort_with_torch(experts, num_experts)
    check_runnable(_sort_kernel, experts.device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=experts.device)
    token_of_row = torch.empty(num_choices, dtype=torch.int32, device=experts.device)
    row_of_choice = torch.empty(experts.shape, dtype=torch.int32, device=experts.device)
    _sort_kernel[(1,)](
        experts.contiguous(),
        offsets,
        token_of_row,
        row_of_choice,
        num_choices,
        num_experts,
        experts.shape[1],
        CHUNK=_CHUNK,
        BLOCK_E=max(triton.next_power_of_2(num_experts), 16),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return Permutation(offsets=offsets, token_of_row=token_of_row, row_of_choice=row_of_choice)


def permute(x: torch.Tensor, permutation: Permutation, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return rows [R, H]: the tokens `x` [T, H] in the order of their experts, one row for each choice."""
    check_runnable(_permute_kernel, x.device)
    check_shape("x", x, (permutation.row_of_choice.shape[0], None), "[T, H]")
    check_rows_contiguous("x", x)
    check_same_device("x", x, permutation.token_of_row.device)
    num_rows, width = permutation.token_of_row.shape[0], x.shape[1]
    rows = check_output("out", out, (num_rows, width), x.dtype, x.device)
    if rows.numel():
        _permute_kernel[(num_rows, triton.cdiv(width, _BLOCK_COLUMNS))](
            x,
            permutation.token_of_row,
            rows,
            width,
            x.stride(0),
            rows.stride(0),
            BLOCK=min(_BLOCK_COLUMNS, triton.next_power_of_2(width)),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return rows


def combine(
    y: torch.Tensor, permutation: Permutation, weights: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return [T, H]: for each token the sum over its choices of weight times the expert's row of `y` [R, H].

    `weights` float32 [T, k]. Summed in float32 in the order of choices, rounded once to y's type.
    """
    check_runnable(_combine_kernel, y.device)
    num_tokens, top_k = permutation.row_of_choice.shape
    check_shape("y", y, (num_tokens * top_k, None), "[R, H]")
    check_rows_contiguous("y", y)
    check_dtype("weights", weights, (torch.float32,))
    check_shape("weights", weights, (num_tokens, top_k), "[T, k]")
    check_rows_contiguous("weights", weights)
    for name, tensor in (("y", y), ("weights", weights)):
        check_same_device(name, tensor, permutation.row_of_choice.device)
    result = check_output("out", out, (num_tokens, y.shape[1]), y.dtype, y.device)
    width = y.shape[1]
    if result.numel():
        _combine_kernel[(num_tokens, triton.cdiv(width, _BLOCK_COLUMNS))](
            y,
            permutation.row_of_choice,
            weights,
            result,
            width,
            y.stride(0),
            weights.stride(0),
            result.stride(0),
            TOP_K=top_k,
            BLOCK=min(_BLOCK_COLUMNS, triton.next_power_of_2(width)),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return result


@triton.jit(do_not_specialize=["num_choices", "num_experts", "top_k"], do_not_specialize_on_alignment=["experts_ptr"])
def _sort_kernel(
    experts_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    token_of_row_ptr: tl.tensor,
    row_of_choice_ptr: tl.tensor,
    num_choices: tl.tensor,
    num_experts: tl.tensor,
    top_k: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """A counting sort by one program: count every expert's choices, then place them chunk by chunk."""
    e = tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], dtype=tl.int32)
    for first in range(0, num_choices, CHUNK):
        c = first + tl.arange(0, CHUNK)
        expert = tl.load(experts_ptr + c, mask=c < num_choices, other=0).to(tl.int32)
        chosen = ((expert[:, None] == e[None, :]) & (c < num_choices)[:, None]).to(tl.int32)
        counts += tl.sum(chosen, axis=0)
    ends = tl.cumsum(counts, axis=0)
    tl.store(offsets_ptr + e, ends - counts, mask=e < num_experts)
    tl.store(offsets_ptr + num_experts, num_choices)
    next_row = ends - counts
    for first in range(0, num_choices, CHUNK):
        c = first + tl.arange(0, CHUNK)
        expert = tl.load(experts_ptr + c, mask=c < num_choices, other=0).to(tl.int32)
        chosen = ((expert[:, None] == e[None, :]) & (c < num_choices)[:, None]).to(tl.int32)
        # Rows of this expert taken before the chunk, and earlier in it.
        row = tl.sum(chosen * (next_row[None, :] + tl.cumsum(chosen, axis=0) - chosen), axis=1)
        tl.store(row_of_choice_ptr + c, row, mask=c < num_choices)
        tl.store(token_of_row_ptr + row, c // top_k, mask=c < num_choices)
        next_row += tl.sum(chosen, axis=0)


@triton.jit
def _permute_kernel(
    x_ptr: tl.tensor,
    token_of_row_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.tensor,
    stride_xt: tl.tensor,
    stride_or: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program copies one block of columns of one row."""
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_of_row_ptr + row).to(tl.int64)
    values = tl.load(x_ptr + token * stride_xt + cols, mask=cols < width)
    tl.store(out_ptr + row.to(tl.int64) * stride_or + cols, values, mask=cols < width)


@triton.jit
def _combine_kernel(
    y_ptr: tl.tensor,
    row_of_choice_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    width: tl.tensor,
    stride_yr: tl.tensor,
    stride_wt: tl.tensor,
    stride_ot: tl.tensor,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program sums one block of columns of one token over its choices, in their order."""
    token = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(row_of_choice_ptr + token * TOP_K + j).to(tl.int64)
        weight = tl.load(weights_ptr + token * stride_wt + j)
        acc += weight * tl.load(y_ptr + row * stride_yr + cols, mask=cols < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * stride_ot + cols, acc.to(out_ptr.dtype.element_ty), mask=cols < width)


def _sort_with_torch(experts: torch.Tensor, num_experts: int) -> Permutation:
    """The same permutation by torch's stable sort."""
    flat = experts.flatten().long()
    order = flat.sort(stable=True).indices
    # Not bincount, which looks at its largest value on the host.
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=flat.device)
    offsets[1:] = counts.cumsum(0)
    row_of_choice = torch.empty_like(flat, dtype=torch.int32)
    row_of_choice[order] = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
    token_of_row = (order // experts.shape[1]).to(torch.int32)
    return Permutation(offsets=offsets, token_of_row=token_of_row, row_of_choice=row_of_choice.view(experts.shape))
