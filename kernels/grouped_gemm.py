"""Rows times the matrices of their experts, for weights of 16 bits and float8: gate-up with its activation, and down.

    y[r] = f(x[r] · w[slot(expert(r))]ᵀ + bias)        rows r sorted by expert, w [S, halves·N, K]

One kernel does both matrices of an expert. Work is cut into tiles of BLOCK_M rows of one expert by BLOCK_N outputs; with a gated
activation a program multiplies its rows with the gate's and the up's weights at once (the rows are read once) and applies the
function before it stores. Programs either take one tile each or stay and walk over all of them.

Modelled: ragged groups, experts without rows, slots anywhere in an arena, tails of every dimension, biases, float8 with a scale for
each row of x and of w. On Hopper both operands can come through tensor descriptors (TMA); elsewhere, or where strides do not
allow it, through addresses, with the same result. Ignored: sums split over programs (few rows are bound by the weights' bytes,
and there the outputs make enough tiles).

Accumulation is in float32. Float8 products leave the tensor core's narrower accumulator after every BLOCK_K of them.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

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
from .device_functions import activate, multiply, tile_position
from .expert_weights import DenseMatrix, check_matrix
from .row_groups import RowGroups
from .tuning import GroupedConfig, TuningKey, find_config

_FLOAT8 = torch.float8_e4m3fn
_DESCRIPTOR_ALIGNMENT_BYTES = 16
_DESCRIPTOR_CAPABILITY = (9, 0)
_FLOAT8_CAPABILITY = (8, 9)


def grouped_gate_up(
    x: torch.Tensor,
    weights: DenseMatrix,
    groups: RowGroups,
    activation: Activation,
    *,
    slot_of_expert: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    config: GroupedConfig | None = None,
    multiprocessors: int | None = None,
) -> torch.Tensor:
    """Return h [R, I]: `activation` of rows `x` [R, H] times their experts' gate-up matrices [S, halves·I, H].

    x and weights are both bfloat16, both float16 (the result is of that type too), or both float8 e4m3; float8 rows come with
    `x_scale` float32 [R], and the result is `out_dtype`. `slot_of_expert` int32 [E] tells where each expert lies (None: expert e
    in slot e). `config` None looks one up. `multiprocessors`: of the device, as many as the launch may use; None: all. Raises
    InputError for arguments that do not fit together.
    """
    return _launch(
        "grouped_gate_up",
        x,
        weights,
        groups,
        activation,
        slot_of_expert,
        x_scale,
        out,
        out_dtype,
        config,
        multiprocessors,
    )


def grouped_down(
    h: torch.Tensor,
    weights: DenseMatrix,
    groups: RowGroups,
    *,
    slot_of_expert: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    config: GroupedConfig | None = None,
    multiprocessors: int | None = None,
) -> torch.Tensor:
    """Return y [R, H]: rows `h` [R, I] times their experts' down matrices [S, H, I]; arguments as for `grouped_gate_up`."""
    return _launch(
        "grouped_down", h, weights, groups, None, slot_of_expert, x_scale, out, out_dtype, config, multiprocessors
    )


def descriptors_allowed(tensor: torch.Tensor) -> bool:
    """Return whether `tensor` can be read through a tensor descriptor: strides, address and, on a GPU, the device."""
    item = tensor.element_size()
    aligned = all(stride * item % _DESCRIPTOR_ALIGNMENT_BYTES == 0 for stride in tensor.stride()[:-1])
    if not aligned or tensor.stride(-1) != 1 or tensor.data_ptr() % _DESCRIPTOR_ALIGNMENT_BYTES or 0 in tensor.shape:
        return False
    return tensor.device.type != "cuda" or torch.cuda.get_device_capability(tensor.device) >= _DESCRIPTOR_CAPABILITY


# Tables are slices at any offset; code for each alignment of them would be compiled in the middle of a run.
@triton.jit(
    do_not_specialize_on_alignment=["slot_ptr", "offsets_ptr", "tile_expert_ptr", "tile_row_ptr", "num_tiles_ptr"]
)
def _grouped_gemm_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    x_desc: tl.tensor,
    w_desc: tl.tensor,
    bias_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    w_scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    tile_expert_ptr: tl.tensor,
    tile_row_ptr: tl.tensor,
    num_tiles_ptr: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    stride_xr: tl.tensor,
    stride_ws: tl.tensor,
    stride_wn: tl.tensor,
    stride_bs: tl.tensor,
    stride_ss: tl.tensor,
    stride_or: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    FLOAT8: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """x [R, K], w [S, (1 or 2)·N, K], out [R, N]; x_desc and w_desc replace x_ptr and w_ptr where DESCRIPTORS."""
    # The tensor core adds this many float8 products before the sum moves to float32; other types need no such limit.
    IMPRECISE: tl.constexpr = BLOCK_K if FLOAT8 else 0
    tiles_n = tl.cdiv(n, BLOCK_N)
    num_tiles = tl.load(num_tiles_ptr)
    for tile in tl.range(tl.program_id(0), num_tiles * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_position(tile, num_tiles, tiles_n, GROUP_M)
        expert = tl.load(tile_expert_ptr + tile_m)
        first_row = tl.load(tile_row_ptr + tile_m)
        end_row = tl.load(offsets_ptr + expert + 1)
        slot = expert
        if slot_ptr is not None:
            slot = tl.load(slot_ptr + expert)
        rows = first_row + tl.arange(0, BLOCK_M)
        cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        row_mask = rows < end_row
        col_mask = cols < n
        x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_xr + ks[None, :]
        w_ptrs = w_ptr + slot.to(tl.int64) * stride_ws + cols.to(tl.int64)[:, None] * stride_wn + ks[None, :]
        up_offset = n.to(tl.int64) * stride_wn
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        acc_up = acc
        for k0 in range(0, k, BLOCK_K):
            if DESCRIPTORS:
                # Rows of the next expert and beyond the matrix come along; they only reach outputs that are not stored. Columns
                # beyond K come as zeros.
                x = x_desc.load([first_row, k0])
                w = tl.reshape(w_desc.load([slot, tile_n * BLOCK_N, k0]), [BLOCK_N, BLOCK_K])
            else:
                x_mask = row_mask[:, None]
                w_mask = col_mask[:, None]
                if not EVEN_K:
                    x_mask = x_mask & (ks < k - k0)[None, :]
                    w_mask = w_mask & (ks < k - k0)[None, :]
                x = tl.load(x_ptrs, mask=x_mask, other=0.0)
                w = tl.load(w_ptrs, mask=w_mask, other=0.0)
            acc = multiply(x, w.T, acc, IMPRECISE)
            if GATED:
                if DESCRIPTORS:
                    w_up = tl.reshape(w_desc.load([slot, n + tile_n * BLOCK_N, k0]), [BLOCK_N, BLOCK_K])
                else:
                    w_up = tl.load(w_ptrs + up_offset, mask=w_mask, other=0.0)
                acc_up = multiply(x, w_up.T, acc_up, IMPRECISE)
            if not DESCRIPTORS:
                x_ptrs += BLOCK_K
                w_ptrs += BLOCK_K
        if FLOAT8:
            row_scale = tl.load(x_scale_ptr + rows, mask=row_mask, other=0.0)[:, None]
            scales = w_scale_ptr + slot.to(tl.int64) * stride_ss + cols
            acc *= row_scale * tl.load(scales, mask=col_mask, other=0.0)[None, :]
            if GATED:
                acc_up *= row_scale * tl.load(scales + n, mask=col_mask, other=0.0)[None, :]
        if bias_ptr is not None:
            biases = bias_ptr + slot.to(tl.int64) * stride_bs + cols
            acc += tl.load(biases, mask=col_mask, other=0.0).to(tl.float32)[None, :]
            if GATED:
                acc_up += tl.load(biases + n, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        acc = activate(acc, acc_up, alpha, limit, ACTIVATION)
        out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_or + cols[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])


def _launch(
    kernel: str,
    x: torch.Tensor,
    weights: DenseMatrix,
    groups: RowGroups,
    activation: Activation | None,
    slot_of_expert: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    out: torch.Tensor | None,
    out_dtype: torch.dtype,
    config: GroupedConfig | None,
    multiprocessors: int | None,
) -> torch.Tensor:
    """Check everything, then launch the one kernel."""
    check_runnable(_grouped_gemm_kernel, x.device)
    check_matrix("weights", weights)
    num_inputs = weights.num_columns
    halves = 1 if activation is None else activation.halves
    num_outputs = weights.num_rows // halves
    if weights.num_rows % halves:
        raise InputError(
            "weights.values", described(weights.values), "gates and ups are equally many rows", "check the activation"
        )
    check_shape("x", x, (groups.num_rows, num_inputs), "[R, K]: the groups' rows, the matrices' columns")
    check_rows_contiguous("x", x)
    is_float8 = x.dtype == _FLOAT8
    check_dtype("x", x, (*FLOATS, _FLOAT8))
    check_dtype("weights.values", weights.values, (x.dtype,))
    _check_float8(x, x_scale, groups.num_rows, is_float8)
    check_slots(slot_of_expert, groups, weights.num_slots)
    for name, tensor in (("weights.values", weights.values), ("offsets", groups.offsets)):
        check_same_device(name, tensor, x.device)
    dtype = out_dtype if is_float8 else x.dtype
    result = check_output("out", out, (groups.num_rows, num_outputs), dtype, x.device)
    if groups.num_rows == 0:
        return result
    if config is None:
        key = TuningKey(
            kernel=kernel, weights="8" if is_float8 else "16", num_outputs=num_outputs, num_inputs=num_inputs
        )
        config = _found_config(key, groups.rows_per_expert, x.device)
    tiles = groups.tiles(config.block_m)
    with_descriptors = config.descriptors and descriptors_allowed(x) and descriptors_allowed(weights.values)
    _grouped_gemm_kernel[(_num_programs(config, tiles.max_tiles, num_outputs, x.device, multiprocessors),)](
        x,
        weights.values,
        _descriptor(x, [config.block_m, config.block_k]) if with_descriptors else None,
        _descriptor(weights.values, [1, config.block_n, config.block_k]) if with_descriptors else None,
        weights.bias,
        x_scale,
        weights.row_scale,
        result,
        slot_of_expert,
        groups.offsets,
        tiles.expert,
        tiles.first_row,
        tiles.num_tiles,
        num_outputs,
        num_inputs,
        x.stride(0),
        weights.values.stride(0),
        weights.values.stride(1),
        0 if weights.bias is None else weights.bias.stride(0),
        0 if weights.row_scale is None else weights.row_scale.stride(0),
        result.stride(0),
        1.0 if activation is None else activation.alpha,
        0.0 if activation is None else activation.limit,
        ACTIVATION=NONE if activation is None else activation.code,
        GATED=halves == 2,
        FLOAT8=is_float8,
        DESCRIPTORS=with_descriptors,
        EVEN_K=num_inputs % config.block_k == 0,
        FLATTEN=config.flatten,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    return result


def check_slots(slot_of_expert: torch.Tensor | None, groups: RowGroups, num_slots: int) -> None:
    """Return nothing; raises InputError where experts with rows may lie in no slot.

    A table on a GPU is only checked for shape and type: looking into it would make the host wait.
    """
    if slot_of_expert is None:
        if num_slots < groups.num_experts:
            raise InputError(
                "num_slots", num_slots, f"at least one for each of {groups.num_experts} experts", "pass slot_of_expert"
            )
        return
    check_dtype("slot_of_expert", slot_of_expert, (torch.int32,))
    check_shape("slot_of_expert", slot_of_expert, (groups.num_experts,), "one slot for each expert")
    check_same_device("slot_of_expert", slot_of_expert, groups.offsets.device)
    if slot_of_expert.device.type == "cpu":
        used = slot_of_expert[groups.offsets.diff() > 0]
        if used.numel() and (int(used.min()) < 0 or int(used.max()) >= num_slots):
            raise InputError(
                "slot_of_expert", used.tolist(), f"slots are 0 … {num_slots - 1}", "copy the expert into a slot first"
            )


@functools.cache
def device_of(device: torch.device) -> tuple[str, tuple[int, int] | None]:
    """Return the name of a device and its compute capability (None off CUDA), by which configurations are looked up."""
    if device.type != "cuda":
        return device.type, None
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


def _found_config(key: TuningKey, rows_per_expert: int, device: torch.device) -> GroupedConfig:
    config = find_config(key, rows_per_expert, *device_of(device))
    if not isinstance(config, GroupedConfig):
        raise InputError("config", config, "a configuration of the grouped GEMM", "check the file of configurations")
    return config


def _num_programs(
    config: GroupedConfig, max_tiles: int, num_outputs: int, device: torch.device, multiprocessors: int | None
) -> int:
    per_tile = max_tiles * triton.cdiv(num_outputs, config.block_n)
    if multiprocessors is not None:
        if multiprocessors < 1:
            raise InputError("multiprocessors", multiprocessors, "below one", "leave it out to use all of them")
        return int(min(per_tile, multiprocessors * (config.programs_per_sm or 1)))
    if config.programs_per_sm is None or device.type != "cuda":
        return int(per_tile)
    resident = torch.cuda.get_device_properties(device).multi_processor_count * config.programs_per_sm
    return int(min(per_tile, resident))


def _descriptor(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def _check_float8(x: torch.Tensor, x_scale: torch.Tensor | None, num_rows: int, is_float8: bool) -> None:
    if is_float8 != (x_scale is not None):
        raise InputError(
            "x_scale", x_scale is not None, "float8 rows come with a scale each, others without", "match x and x_scale"
        )
    if x_scale is None:
        return
    check_dtype("x_scale", x_scale, (torch.float32,))
    check_shape("x_scale", x_scale, (num_rows,), "one scale for each row")
    check_rows_contiguous("x_scale", x_scale)
    check_same_device("x_scale", x_scale, x.device)
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < _FLOAT8_CAPABILITY:
        raise InputError("x", described(x), "this GPU has no float8 matrix units", "use bfloat16")
