"""The same work with torch on the host: an expert's two matrices for the rows that reach it, straight from a slot.

    expert by expert   run_expert, run_rows: one matrix product for each matrix; packed weights of many rows are expanded into scratch first
    batched            run_rows_batched: rows padded to the longest group, one batched product over all experts that have any

Everything runs on the calling thread and torch's intra-op pool as the caller set it up (`torch.set_num_threads`, affinity):
no pool is made, resized or assumed here. Products are in the rows' type (float32 or bfloat16; torch accumulates in float32);
weights of another type are expanded to it first.

Modelled: float32, bfloat16, float16, float8 and packed weights, biases, every activation; packed weights of few rows are decoded inside
the product (`cpu_packed`). Ignored: decoding float8 inside the product (expanding costs a pass over the expanded weights, which is part
of what calibration measures).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ..base.errors import InputError
from . import cpu_packed
from .activation import Activation
from .checks import check_dtype, check_output, check_shape, described
from .expert_weights import DenseMatrix, ExpertWeights, Matrix
from .packing import PackedMatrix, scale_and_zero
from .reference import activate
from .slot_layout import PackedFormat

COMPUTE_DTYPES = (torch.float32, torch.bfloat16)
"""Types that rows may have here."""


class Scratch:
    """Room for expanded weights, reused from call to call so that a measured step allocates nothing."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor; the next call with the same `name` and `dtype` may return the same memory."""
        size = 1
        for length in shape:
            size *= length
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=dtype)
            self._buffers[name, dtype] = buffer
        return buffer[:size].view(shape)


def run_expert(
    x: torch.Tensor,
    weights: ExpertWeights,
    slot: int,
    *,
    out: torch.Tensor | None = None,
    scratch: Scratch | None = None,
) -> torch.Tensor:
    """Return y [n, H]: the expert in `slot` applied to rows `x` [n, H] (float32 or bfloat16)."""
    _check_rows(x, weights)
    if not 0 <= slot < weights.gate_up.num_slots:
        raise InputError(
            "slot", slot, f"slots are 0 … {weights.gate_up.num_slots - 1}", "copy the expert into a slot first"
        )
    scratch = Scratch() if scratch is None else scratch
    result = check_output("out", out, (x.shape[0], weights.hidden_size), x.dtype, x.device)
    h = _product(x, weights.gate_up, slot, scratch, scratch.take("h", (x.shape[0], weights.gate_up.num_rows), x.dtype))
    return _product(activated(h, weights.activation), weights.down, slot, scratch, result)


def run_rows(
    rows: torch.Tensor,
    weights: ExpertWeights,
    offsets: Sequence[int],
    *,
    order: Sequence[int] | None = None,
    out: torch.Tensor | None = None,
    scratch: Scratch | None = None,
) -> torch.Tensor:
    """Return y [R, H] for `rows` [R, H] sorted by expert, one expert after the other.

    `offsets` [E + 1] on the host. `order` names the experts to run and when (None: all that have rows, ascending); rows of experts
    that are not in it are left as they are in `out`, so an executor can run an expert once its weights have arrived.
    """
    _check_rows(rows, weights)
    starts = _checked_offsets(offsets, rows.shape[0])
    scratch = Scratch() if scratch is None else scratch
    result = check_output("out", out, (rows.shape[0], weights.hidden_size), rows.dtype, rows.device)
    for expert in range(len(starts) - 1) if order is None else order:
        start, end = starts[expert], starts[expert + 1]
        if start < end:
            run_expert(rows[start:end], weights, _slot_of(weights, expert), out=result[start:end], scratch=scratch)
    return result


def run_rows_batched(
    rows: torch.Tensor,
    weights: ExpertWeights,
    offsets: Sequence[int],
    *,
    out: torch.Tensor | None = None,
    scratch: Scratch | None = None,
) -> torch.Tensor:
    """Return y [R, H] as `run_rows` does, with one batched product for each matrix over all experts that have rows.

    Rows are padded to the longest group. Plain weights of neighbouring slots are read in place; others are copied together first.
    """
    _check_rows(rows, weights)
    starts = _checked_offsets(offsets, rows.shape[0])
    scratch = Scratch() if scratch is None else scratch
    result = check_output("out", out, (rows.shape[0], weights.hidden_size), rows.dtype, rows.device)
    active = [expert for expert in range(len(starts) - 1) if starts[expert] < starts[expert + 1]]
    if not active:
        return result
    slots = [_slot_of(weights, expert) for expert in active]
    longest = max(starts[expert + 1] - starts[expert] for expert in active)
    padded = scratch.take("padded", (len(active), longest, rows.shape[1]), rows.dtype).zero_()
    for place, expert in enumerate(active):
        start, end = starts[expert], starts[expert + 1]
        padded[place, : end - start] = rows[start:end]
    h = _batched_product(padded, weights.gate_up, slots, scratch)
    y = _batched_product(activated(h, weights.activation), weights.down, slots, scratch)
    for place, expert in enumerate(active):
        start, end = starts[expert], starts[expert + 1]
        result[start:end] = y[place, : end - start]
    return result


def activated(product: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Return the activation [..., I] of a gate-up product [..., halves·I], computed in float32, in the product's type."""
    wide = product.float()
    gate, up = wide.chunk(2, dim=-1) if activation.gated else (wide, None)
    return activate(gate, up, activation).to(product.dtype)


def expand(matrix: Matrix, slot: int, out: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Return `out` [N, K], filled with the matrix in `slot` in out's type, each weight rounded once."""
    if isinstance(matrix, PackedMatrix):
        return _expand_packed(matrix, slot, out, scratch)
    values = matrix.values[slot]
    out.copy_(values)
    return out if matrix.row_scale is None else out.mul_(matrix.row_scale[slot].unsqueeze(-1))


def _expand_packed(matrix: PackedMatrix, slot: int, out: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Decode words to whole numbers, shift each group by its zero point (exact in bfloat16 too), scale it (rounded once)."""
    fmt = matrix.format
    if cpu_packed.usable():
        return cpu_packed.decode(matrix, slot, out, scratch.take("row", (matrix.num_columns,), torch.float32))
    full_words = fmt.num_blocks(matrix.num_columns) * fmt.block_words
    words = matrix.words[slot]
    _decode(words[:, :full_words], fmt, fmt.block_words, out, 0, scratch)
    if fmt.has_tail(matrix.num_columns):
        first = fmt.num_blocks(matrix.num_columns) * fmt.block_columns
        _decode(words[:, full_words:], fmt, fmt.tail_words, out, first, scratch)
    scale, zero = scale_and_zero(matrix.codes[slot].T, fmt.bits)
    scale = scale * matrix.row_scale[slot].unsqueeze(-1)
    groups = out.view(out.shape[0], -1, fmt.group)
    groups.sub_(zero.unsqueeze(-1).to(out.dtype))
    groups.mul_(scale.unsqueeze(-1))
    return out


def _decode(
    words: torch.Tensor, fmt: PackedFormat, block_words: int, out: torch.Tensor, first: int, scratch: Scratch
) -> None:
    """Write the whole numbers of blocks of words [N, B·C] to columns `first` … of `out`; columns beyond its end are padding."""
    block_columns = 2 * fmt.num_planes * block_words
    num_blocks = words.shape[1] // block_words
    whole = min(num_blocks, (out.shape[1] - first) // block_columns)
    end = first + whole * block_columns
    _decode_planes(words[:, : whole * block_words], fmt, block_words, out[:, first:end], scratch)
    if whole < num_blocks:
        last = scratch.take("last block", (out.shape[0], block_columns), out.dtype)
        _decode_planes(words[:, whole * block_words :], fmt, block_words, last, scratch)
        out[:, end:] = last[:, : out.shape[1] - end]


def _decode_planes(
    words: torch.Tensor, fmt: PackedFormat, block_words: int, out: torch.Tensor, scratch: Scratch
) -> None:
    """Fill `out` [N, B·columns of a block] from whole blocks, plane by plane: two fields of a word are two 16-bit numbers."""
    num_rows, num_words = words.shape
    if num_words == 0:
        return
    fields = scratch.take("fields", (num_rows, num_words), torch.int32)
    planes = out.unflatten(1, (num_words // block_words, fmt.num_planes, 2 * block_words))
    for plane in range(fmt.num_planes):
        torch.bitwise_right_shift(words, plane * fmt.bits, out=fields)
        fields.bitwise_and_((2**fmt.bits - 1) * 0x10001)
        planes[:, :, plane].copy_(fields.view(torch.int16).unflatten(1, (-1, 2 * block_words)))


def _product(x: torch.Tensor, matrix: Matrix, slot: int, scratch: Scratch, out: torch.Tensor) -> torch.Tensor:
    """x [n, K] times the matrix [N, K] in `slot`, transposed, plus its bias, into `out` [n, N]."""
    if isinstance(matrix, PackedMatrix) and len(x) <= cpu_packed.FEW_ROWS and cpu_packed.usable():
        cpu_packed.product(x, matrix, slot, out)
    else:
        torch.mm(x, _plain(matrix, slot, x.dtype, scratch).T, out=out)
    if matrix.bias is not None:
        out.add_(matrix.bias[slot].to(out.dtype))
    return out


def _plain(matrix: Matrix, slot: int, dtype: torch.dtype, scratch: Scratch) -> torch.Tensor:
    """The matrix in `slot` as numbers of `dtype`: in place where it is that already, else in scratch."""
    if isinstance(matrix, DenseMatrix) and matrix.values.dtype == dtype:
        return matrix.values[slot]
    return expand(matrix, slot, scratch.take("matrix", (matrix.num_rows, matrix.num_columns), dtype), scratch)


def _batched_product(x: torch.Tensor, matrix: Matrix, slots: list[int], scratch: Scratch) -> torch.Tensor:
    """x [A, n, K] times the matrices in `slots` [A], transposed, plus their biases."""
    neighbours = slots == list(range(slots[0], slots[0] + len(slots)))
    if isinstance(matrix, DenseMatrix) and matrix.values.dtype == x.dtype and neighbours:
        stack = matrix.values[slots[0] : slots[0] + len(slots)]
    else:
        stack = scratch.take("stack", (len(slots), matrix.num_rows, matrix.num_columns), x.dtype)
        for place, slot in enumerate(slots):
            expand(matrix, slot, stack[place], scratch)
    product = torch.bmm(x, stack.transpose(1, 2))
    if matrix.bias is not None:
        product.add_(matrix.bias[slots].to(product.dtype).unsqueeze(1))
    return product


def _slot_of(weights: ExpertWeights, expert: int) -> int:
    return expert if weights.slot_of_expert is None else int(weights.slot_of_expert[expert])


def _check_rows(x: torch.Tensor, weights: ExpertWeights) -> None:
    check_dtype("rows", x, COMPUTE_DTYPES)
    check_shape("rows", x, (None, weights.hidden_size), "[R, H]")
    if x.device.type != "cpu":
        raise InputError("rows", described(x), "this path runs on the CPU", "use moeplan.kernels.experts on a GPU")


def _checked_offsets(offsets: Sequence[int], num_rows: int) -> list[int]:
    starts = [int(start) for start in offsets]
    rising = all(a <= b for a, b in itertools.pairwise(starts))
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != num_rows or not rising:
        raise InputError("offsets", starts, f"they rise from 0 to the {num_rows} rows", "sort the rows by expert first")
    return starts
