"""The matrices of experts as kernels take them: one stack per matrix with a slot in front, and a table from expert to slot.

    arena: uint8 [num_slots · slot_bytes] ──views──► ExpertWeights(gate_up [S, halves·I, H], down [S, H, I], slot_of_expert [E])

Modelled: an arena of equal slots, each laid out by `slot_layout`; copying an expert is copying its slot's bytes. A stack that is
its own storage (a model held whole, [E, N, K] as transformers keeps it) is the same thing without a table. Ignored: which
expert is in which slot when (the executor's business).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..base.errors import InputError
from .activation import Activation
from .checks import check_dtype, check_rows_contiguous, check_shape, described
from .packing import NEAREST, PackedMatrix, check_packed, pack, unpack
from .slot_layout import ALIGNMENT_BYTES, Part, SlotLayout

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int32": torch.int32,
    "int16": torch.int16,
}
LARGEST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMatrix:
    """Matrices `values` [num_slots, N, K]; `row_scale` float32 [num_slots, N] with float8; `bias` [num_slots, N] or None."""

    values: torch.Tensor
    row_scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def num_slots(self) -> int:
        """Matrices held."""
        return self.values.shape[0]

    @property
    def num_rows(self) -> int:
        """Rows of each matrix."""
        return self.values.shape[1]

    @property
    def num_columns(self) -> int:
        """Columns of each matrix."""
        return self.values.shape[2]


Matrix = DenseMatrix | PackedMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Everything the experts of one layer need."""

    gate_up: Matrix
    down: Matrix
    activation: Activation
    slot_of_expert: torch.Tensor | None = None
    """int32 [num_experts]: the slot each expert lies in; None where expert e lies in slot e."""

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        return self.gate_up.num_columns

    @property
    def intermediate_size(self) -> int:
        """Width between the two matrices."""
        return self.down.num_columns


def check_matrix(field: str, matrix: Matrix) -> None:
    """Return nothing; raises InputError where the parts of a matrix do not belong together."""
    if isinstance(matrix, PackedMatrix):
        check_packed(field, matrix)
    else:
        check_shape(f"{field}.values", matrix.values, (None, None, None), "[num_slots, N, K]")
        check_rows_contiguous(f"{field}.values", matrix.values)
        is_float8 = matrix.values.dtype == torch.float8_e4m3fn
        if is_float8 != (matrix.row_scale is not None):
            raise InputError(
                f"{field}.row_scale",
                matrix.row_scale is not None,
                "float8 has a scale for each row, others none",
                "match them",
            )
        if matrix.row_scale is not None:
            check_dtype(f"{field}.row_scale", matrix.row_scale, (torch.float32,))
            check_shape(f"{field}.row_scale", matrix.row_scale, (matrix.num_slots, matrix.num_rows), "[num_slots, N]")
            check_rows_contiguous(f"{field}.row_scale", matrix.row_scale)
    if matrix.bias is not None:
        check_shape(f"{field}.bias", matrix.bias, (matrix.num_slots, matrix.num_rows), "[num_slots, N]")
        check_rows_contiguous(f"{field}.bias", matrix.bias)


def check_experts(weights: ExpertWeights) -> None:
    """Return nothing; raises InputError where gate-up, down and activation do not fit together."""
    check_matrix("gate_up", weights.gate_up)
    check_matrix("down", weights.down)
    halves = weights.activation.halves
    rows, hidden = weights.gate_up.num_rows, weights.hidden_size
    if rows != halves * weights.intermediate_size or weights.down.num_rows != hidden:
        raise InputError(
            "gate_up, down",
            f"[{rows}, {hidden}] and [{weights.down.num_rows}, {weights.intermediate_size}]",
            f"with {weights.activation.name} they are [{halves}·I, H] and [H, I]",
            "check the activation and the order of the matrices",
        )


def slot_views(
    arena: torch.Tensor,
    layout: SlotLayout,
    activation: Activation,
    slot_of_expert: torch.Tensor | None = None,
    *,
    slot_bytes: int | None = None,
) -> ExpertWeights:
    """Return the experts in `arena` (uint8 [num_slots · slot_bytes]) as strided views; nothing is copied.

    slot_bytes: from one slot to the next where slots are larger than this layout needs, as they are where several formats share them.
    Raises InputError for an arena that is not contiguous bytes, does not hold whole slots or is not aligned.
    """
    check_dtype("arena", arena, (torch.uint8,))
    check_shape("arena", arena, (None,), "one run of bytes")
    each = layout.slot_bytes if slot_bytes is None else slot_bytes
    if each < layout.slot_bytes or each % ALIGNMENT_BYTES:
        raise InputError(
            "slot_bytes", each, f"a slot of {layout.slot_bytes} bytes must fit, aligned", "take the largest layout's"
        )
    if arena.numel() == 0 or arena.numel() % each or (arena.numel() > 1 and arena.stride(0) != 1):
        raise InputError(
            "arena",
            described(arena),
            f"it holds whole slots of {each} bytes",
            "allocate it from the layout",
        )
    # Views of wider types need their own alignment; descriptors and 16-byte loads need 16.
    if (arena.storage_offset() + arena.untyped_storage().data_ptr()) % 16:
        raise InputError(
            "arena", described(arena), "it starts at a multiple of 16 bytes", "do not slice it at odd offsets"
        )
    if activation.gated != layout.shape.gated:
        raise InputError(
            "activation",
            activation.name,
            f"the layout is {'' if layout.shape.gated else 'not '}gated",
            "use the model's own",
        )
    parts = {part.name: _view(arena, part, each) for part in layout.parts}
    weights = ExpertWeights(
        gate_up=_matrix(parts, "gate_up", layout),
        down=_matrix(parts, "down", layout),
        activation=activation,
        slot_of_expert=slot_of_expert,
    )
    check_experts(weights)
    return weights


def write_slot(
    weights: ExpertWeights,
    slot: int,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    rounding: str = NEAREST,
    **biases: torch.Tensor,
) -> None:
    """Return nothing; stores one expert's float matrices in `slot`, quantised as the slot's format asks.

    rounding: how packed weights are chosen (`packing.ROUNDINGS`).

    `biases` are `gate_up_bias` [halves·I] and `down_bias` [H], given exactly when the layout has them.
    """
    for name, matrix, values in (("gate_up", weights.gate_up, gate_up), ("down", weights.down, down)):
        check_shape(name, values, (matrix.num_rows, matrix.num_columns), "one expert's matrix")
        bias = biases.pop(f"{name}_bias", None)
        if (bias is None) != (matrix.bias is None):
            raise InputError(
                f"{name}_bias",
                bias is not None,
                "biases are given exactly when the slots have them",
                "check the layout",
            )
        if matrix.bias is not None and bias is not None:
            matrix.bias[slot].copy_(bias)
        if isinstance(matrix, PackedMatrix):
            packed = pack(values, matrix.bits, rounding)
            matrix.words[slot].copy_(packed.words[0])
            matrix.codes[slot].copy_(packed.codes[0])
            matrix.row_scale[slot].copy_(packed.row_scale[0])
        elif matrix.row_scale is not None:
            narrow, scale = to_float8(values)
            matrix.values[slot].copy_(narrow)
            matrix.row_scale[slot].copy_(scale)
        else:
            matrix.values[slot].copy_(values)
    if biases:
        raise InputError("biases", sorted(biases), "they are gate_up_bias and down_bias", "drop the others")


def dense_values(matrix: Matrix, slot: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix [N, K] in `slot` as plain numbers of `dtype`, expanded where it is quantised."""
    if isinstance(matrix, PackedMatrix):
        one = PackedMatrix(
            words=matrix.words[slot : slot + 1],
            codes=matrix.codes[slot : slot + 1],
            row_scale=matrix.row_scale[slot : slot + 1],
            bits=matrix.bits,
            num_columns=matrix.num_columns,
        )
        return unpack(one, dtype)[0]
    values = matrix.values[slot]
    if matrix.row_scale is None:
        return values.to(dtype)
    return (values.float() * matrix.row_scale[slot].unsqueeze(-1)).to(dtype)


def to_float8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `values` [..., K] as float8 e4m3 and the float32 scale [...] of each row: its largest magnitude over 448."""
    wide = values.float()
    largest = wide.abs().amax(-1)
    scale = torch.where(largest > 0, largest / LARGEST_FLOAT8, torch.ones_like(largest))
    return (wide / scale.unsqueeze(-1)).clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn), scale


def deinterleave_gate_up(rows: torch.Tensor) -> torch.Tensor:
    """Return [..., 2·I, K] with all gates before all ups, of `rows` that alternate gate, up (as gpt-oss checkpoints do)."""
    return torch.cat([rows[..., 0::2, :], rows[..., 1::2, :]], dim=-2)


def _view(arena: torch.Tensor, part: Part, slot_bytes: int) -> torch.Tensor:
    dtype = _DTYPES[part.dtype]
    typed = arena.view(dtype)
    inner = [1]
    for size in reversed(part.shape[1:]):
        inner.insert(0, inner[0] * size)
    sizes, strides = (arena.numel() // slot_bytes, *part.shape), (slot_bytes // dtype.itemsize, *inner)
    return typed.as_strided(sizes, strides, typed.storage_offset() + part.offset_bytes // dtype.itemsize)


def _matrix(parts: dict[str, torch.Tensor], name: str, layout: SlotLayout) -> Matrix:
    bias = parts.get(f"{name}.bias")
    if f"{name}.words" in parts:
        return PackedMatrix(
            words=parts[f"{name}.words"],
            codes=parts[f"{name}.codes"],
            row_scale=parts[f"{name}.row_scale"],
            bits=int(layout.weights),
            num_columns=layout.shape.matrices[name][1],
            bias=bias,
        )
    return DenseMatrix(values=parts[f"{name}.values"], row_scale=parts.get(f"{name}.row_scale"), bias=bias)
