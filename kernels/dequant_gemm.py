"""Rows times the packed matrices of their experts: 4-, 3- and 2-bit weights expanded in registers on their way to the matrix units.

    y[r] = f(x[r] · ((q − zero) · scale)ᵀ + bias)        q, zero and scale as `packing` defines them

Weights are the first operand of the product, rows of x the second: a tile of words is decoded where the matrix units want their
first operand, in registers, and never goes back to shared memory. One shift and one mask-and-or turn a word into two neighbouring
numbers 128 + q in bfloat16 (1024 + q in float16), whole and exact, with no conversion instruction.

    few rows   each group's plain sum Σ x·(128 + q) is scaled afterwards, in float32: scale · (sum − (128 + zero) · Σ x).
               Σ x of every group comes from a small kernel before (or from inside). Inputs can be split over programs; the last
               one to arrive at a tile adds up the parts in their order, so results do not depend on which it was.
    many rows  weights are scaled first and rounded to x's type, and one long sum runs through the matrix units.

Modelled: ragged groups, slots in an arena, a gated activation on both halves at once, biases. Ignored: rows in float8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..base.errors import InputError
from .activation import NONE, Activation
from .checks import (
    FLOATS,
    check_dtype,
    check_output,
    check_rows_contiguous,
    check_runnable,
    check_same_device,
    check_shape,
    described,
)
from .dequant_decode import add_block, finish
from .device_functions import tile_position
from .grouped_gemm import check_slots, device_of
from .packing import PackedMatrix, check_packed
from .row_groups import RowGroups
from .tuning import DequantConfig, TuningKey, find_config

_GROUP_M = 8
_SUMMED_GROUPS = 16


class SplitWorkspace:
    """Memory for sums split over programs: parts of tiles, and how many parts of each have arrived.

    One serves any number of calls on one stream; it grows when a call needs more. Counters are zero between calls: the program that
    adds up a tile's parts sets its counter back.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.parts = torch.empty(0, dtype=torch.float32, device=device)
        self.counters = torch.zeros(0, dtype=torch.int32, device=device)

    def reserve(self, num_values: int, num_tiles: int) -> None:
        """Return nothing; makes room for `num_values` float32 parts and `num_tiles` counters."""
        if self.parts.numel() < num_values:
            self.parts = torch.empty(num_values, dtype=torch.float32, device=self.parts.device)
        if self.counters.numel() < num_tiles:
            self.counters = torch.zeros(num_tiles, dtype=torch.int32, device=self.counters.device)


def dequant_gate_up(
    x: torch.Tensor,
    weights: PackedMatrix,
    groups: RowGroups,
    activation: Activation,
    *,
    slot_of_expert: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: DequantConfig | None = None,
    workspace: SplitWorkspace | None = None,
) -> torch.Tensor:
    """Return h [R, I]: `activation` of rows `x` [R, H] (bfloat16 or float16) times their experts' packed gate-up matrices.

    `workspace` is used where `config` splits sums; None makes one for this call. Raises InputError for arguments that do not fit.
    """
    return _launch("dequant_gate_up", x, weights, groups, activation, slot_of_expert, out, config, workspace)


def dequant_down(
    h: torch.Tensor,
    weights: PackedMatrix,
    groups: RowGroups,
    *,
    slot_of_expert: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: DequantConfig | None = None,
    workspace: SplitWorkspace | None = None,
) -> torch.Tensor:
    """Return y [R, H]: rows `h` [R, I] times their experts' packed down matrices; arguments as for `dequant_gate_up`."""
    return _launch("dequant_down", h, weights, groups, None, slot_of_expert, out, config, workspace)


def group_sums(x: torch.Tensor, group: int) -> torch.Tensor:
    """Return the float32 sums [K/group, R] of each group of `group` neighbouring inputs of `x` [R, K]."""
    check_runnable(_group_sums_kernel, x.device)
    check_rows_contiguous("x", x)
    num_rows, num_inputs = x.shape
    if num_inputs % group:
        raise InputError("x", described(x), f"its rows are whole groups of {group}", "pad them with zeros")
    sums = torch.empty(num_inputs // group, num_rows, dtype=torch.float32, device=x.device)
    grid = (num_rows, triton.cdiv(sums.shape[0], _SUMMED_GROUPS))
    if num_rows:
        _group_sums_kernel[grid](
            x,
            sums,
            sums.shape[0],
            num_rows,
            x.stride(0),
            GROUP=group,
            BLOCK_G=_SUMMED_GROUPS,
            num_warps=2,
            enable_fp_fusion=True,
        )
    return sums


# The number of rows changes from call to call; code for each divisibility of it would be compiled in the middle of a run.
@triton.jit(do_not_specialize=["num_rows"])
def _group_sums_kernel(
    x_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    num_groups: tl.tensor,
    num_rows: tl.tensor,
    stride_xr: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """x [R, G·GROUP] to sums [G, R]."""
    row = tl.program_id(0)
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    columns = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64) * stride_xr + columns, mask=(g < num_groups)[:, None], other=0.0)
    tl.store(sums_ptr + g * num_rows + row, tl.sum(x.to(tl.float32), axis=1), mask=g < num_groups)


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["slot_ptr", "offsets_ptr", "tile_expert_ptr", "tile_row_ptr", "num_tiles_ptr"],
)
def _dequant_gemm_kernel(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    tile_expert_ptr: tl.tensor,
    tile_row_ptr: tl.tensor,
    num_tiles_ptr: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    num_rows: tl.tensor,
    num_blocks: tl.tensor,
    stride_xr: tl.tensor,
    stride_ws: tl.tensor,
    stride_wn: tl.tensor,
    stride_cs: tl.tensor,
    stride_ss: tl.tensor,
    stride_bs: tl.tensor,
    stride_or: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    TAIL_WORDS: tl.constexpr,
    MASK_N: tl.constexpr,
    MASK_K: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    SUMS_INSIDE: tl.constexpr,
    FLOAT16: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """x [R, K], words [S, (1 or 2)·N, num_words], codes [S, K/GROUP, (1 or 2)·N], out [R, N]; TAIL_WORDS 0: no tails."""
    BLOCK_COLUMNS: tl.constexpr = 16 // BITS * 2 * WORDS
    HALVES: tl.constexpr = 2 if GATED else 1
    tiles_n = tl.cdiv(n, BLOCK_N)
    num_tiles = tl.load(num_tiles_ptr)
    tile = tl.program_id(0)
    if tile >= num_tiles * tiles_n:
        return
    split = tl.program_id(1)
    tile_m, tile_n = tile_position(tile, num_tiles, tiles_n, GROUP_M)
    expert = tl.load(tile_expert_ptr + tile_m)
    end_row = tl.load(offsets_ptr + expert + 1)
    slot = expert
    if slot_ptr is not None:
        slot = tl.load(slot_ptr + expert)
    slot = slot.to(tl.int64)
    rows = tl.load(tile_row_ptr + tile_m) + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < end_row
    col_mask = cols < n
    num_outputs = n * HALVES
    up_words = n.to(tl.int64) * stride_wn

    # This program's share of the full blocks; the tail goes to the last.
    per_split = tl.cdiv(num_blocks, SPLIT_K)
    first_block = split * per_split
    last_block = tl.minimum(first_block + per_split, num_blocks)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xr
    word_rows = words_ptr + slot * stride_ws + cols.to(tl.int64)[:, None] * stride_wn
    code_cols = codes_ptr + slot * stride_cs + cols
    x_ptrs = x_rows + first_block * BLOCK_COLUMNS + tl.arange(0, 2 * WORDS)[None, :]
    word_ptrs = word_rows + first_block * WORDS + tl.arange(0, WORDS)[None, :]
    code_ptrs = code_cols + first_block * (BLOCK_COLUMNS // GROUP) * num_outputs
    sum_rows = tl.minimum(rows, num_rows - 1)
    sum_ptrs = sums_ptr + first_block * (BLOCK_COLUMNS // GROUP) * num_rows + sum_rows
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    acc_up = acc
    for block in range(first_block, last_block):
        acc, acc_up = add_block(
            acc, acc_up, x_ptrs, word_ptrs, code_ptrs, sum_ptrs, up_words, n, row_mask, col_mask, block * BLOCK_COLUMNS, k,
            num_outputs, num_rows, BITS, GROUP, WORDS, MASK_N, MASK_K, GATED, SCALE_FIRST, SUMS_INSIDE, FLOAT16,
        )  # fmt: skip
        x_ptrs += BLOCK_COLUMNS
        word_ptrs += WORDS
        code_ptrs += BLOCK_COLUMNS // GROUP * num_outputs
        sum_ptrs += BLOCK_COLUMNS // GROUP * num_rows
    if TAIL_WORDS:
        if split == SPLIT_K - 1:
            column = num_blocks * BLOCK_COLUMNS
            acc, acc_up = add_block(
                acc, acc_up, x_rows + column + tl.arange(0, 2 * TAIL_WORDS)[None, :],
                word_rows + num_blocks * WORDS + tl.arange(0, TAIL_WORDS)[None, :], code_cols + column // GROUP * num_outputs,
                sums_ptr + column // GROUP * num_rows + sum_rows, up_words, n, row_mask, col_mask, column, k, num_outputs,
                num_rows, BITS, GROUP, TAIL_WORDS, MASK_N, True, GATED, SCALE_FIRST, SUMS_INSIDE, FLOAT16,
            )  # fmt: skip

    scale_ptrs = row_scale_ptr + slot * stride_ss + cols
    bias_ptrs = scale_ptrs
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + slot * stride_bs + cols
    out_ptrs = out_ptr + rows.to(tl.int64)[None, :] * stride_or + cols[:, None]
    if SPLIT_K == 1:
        finish(
            acc, acc_up, scale_ptrs, bias_ptrs, out_ptrs, n, row_mask, col_mask, alpha, limit, ACTIVATION, GATED,
            bias_ptr is not None,
        )  # fmt: skip
    else:
        size: tl.constexpr = BLOCK_N * BLOCK_M
        place = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        parts = parts_ptr + tile.to(tl.int64) * (SPLIT_K * HALVES * size) + place
        tl.store(parts + split * (HALVES * size), acc)
        if GATED:
            tl.store(parts + split * (HALVES * size) + size, acc_up)
        # All threads' parts are written before one of them counts this program in, with release and acquire.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel")
        if arrived == SPLIT_K - 1:
            tl.store(counters_ptr + tile, 0)
            acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
            acc_up = acc
            for s in tl.static_range(SPLIT_K):
                # Past the first-level cache, which is not kept coherent between multiprocessors.
                acc += tl.load(parts + s * (HALVES * size), cache_modifier=".cg")
                if GATED:
                    acc_up += tl.load(parts + s * (HALVES * size) + size, cache_modifier=".cg")
            finish(
                acc, acc_up, scale_ptrs, bias_ptrs, out_ptrs, n, row_mask, col_mask, alpha, limit, ACTIVATION, GATED,
                bias_ptr is not None,
            )  # fmt: skip


def _launch(
    kernel: str,
    x: torch.Tensor,
    weights: PackedMatrix,
    groups: RowGroups,
    activation: Activation | None,
    slot_of_expert: torch.Tensor | None,
    out: torch.Tensor | None,
    config: DequantConfig | None,
    workspace: SplitWorkspace | None,
) -> torch.Tensor:
    """Check everything, then launch the kernel, after the group sums where it needs them."""
    check_runnable(_dequant_gemm_kernel, x.device)
    check_packed("weights", weights)
    fmt, num_inputs = weights.format, weights.num_columns
    halves = 1 if activation is None else activation.halves
    num_outputs = weights.num_rows // halves
    if weights.num_rows % halves:
        raise InputError(
            "weights.words", described(weights.words), "gates and ups are equally many rows", "check the activation"
        )
    check_dtype("x", x, FLOATS)
    check_shape("x", x, (groups.num_rows, num_inputs), "[R, K]: the groups' rows, the matrices' columns")
    check_rows_contiguous("x", x)
    check_slots(slot_of_expert, groups, weights.num_slots)
    for name, tensor in (
        ("weights.words", weights.words),
        ("weights.codes", weights.codes),
        ("offsets", groups.offsets),
    ):
        check_same_device(name, tensor, x.device)
    result = check_output("out", out, (groups.num_rows, num_outputs), x.dtype, x.device)
    if groups.num_rows == 0:
        return result
    if config is None:
        key = TuningKey(kernel=kernel, weights=str(weights.bits), num_outputs=num_outputs, num_inputs=num_inputs)
        config = _found_config(key, groups.rows_per_expert, x.device)
    tiles = groups.tiles(config.block_m)
    num_programs = tiles.max_tiles * triton.cdiv(num_outputs, config.block_n)
    if config.split_k > 1:
        workspace = SplitWorkspace(x.device) if workspace is None else workspace
        workspace.reserve(num_programs * config.split_k * halves * config.block_n * config.block_m, num_programs)
    has_tail = fmt.has_tail(num_inputs)
    _dequant_gemm_kernel[(num_programs, config.split_k)](
        x,
        weights.words,
        weights.codes,
        weights.row_scale,
        weights.bias,
        x if config.scale_first or config.sums_inside else group_sums(x, fmt.group),
        result,
        result if workspace is None else workspace.parts,
        result if workspace is None else workspace.counters,
        slot_of_expert,
        groups.offsets,
        tiles.expert,
        tiles.first_row,
        tiles.num_tiles,
        num_outputs,
        num_inputs,
        groups.num_rows,
        fmt.num_blocks(num_inputs),
        x.stride(0),
        weights.words.stride(0),
        weights.words.stride(1),
        weights.codes.stride(0),
        weights.row_scale.stride(0),
        0 if weights.bias is None else weights.bias.stride(0),
        result.stride(0),
        1.0 if activation is None else activation.alpha,
        0.0 if activation is None else activation.limit,
        ACTIVATION=NONE if activation is None else activation.code,
        GATED=halves == 2,
        BITS=fmt.bits,
        GROUP=fmt.group,
        WORDS=fmt.block_words,
        TAIL_WORDS=fmt.tail_words if has_tail else 0,
        MASK_N=num_outputs % config.block_n != 0,
        MASK_K=not has_tail and num_inputs % fmt.block_columns != 0,
        SCALE_FIRST=config.scale_first,
        SUMS_INSIDE=config.sums_inside,
        FLOAT16=x.dtype == torch.float16,
        SPLIT_K=config.split_k,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        GROUP_M=_GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return result


def _found_config(key: TuningKey, rows_per_expert: int, device: torch.device) -> DequantConfig:
    config = find_config(key, rows_per_expert, *device_of(device))
    if not isinstance(config, DequantConfig):
        raise InputError(
            "config", config, "a configuration of the dequantising GEMM", "check the file of configurations"
        )
    return config
