"""How far a kernel's result may be from the float64 reference: a bound for every single element, derived, not tuned.

What a correct kernel may do, and no more:
    sums        K products added in float32 in any order, by matrix units that may cut a bit where IEEE would round:
                (K + 8) · 2**-23 · Σ |x|·|w|
    float8      inside the matrix unit sums keep at least 13 bits below the largest term for a few instructions (about 14 by the
                DeepSeek-V3 technical report, §3.3.2): another 2**-10 · Σ |x|·|w|
    packed      few rows: sums are of x·(base + q), with base 128 (bfloat16) or 1024 (float16), before base + zero is taken off
                again, so the same relative error of sums is of (base + 2**bits) · scale · Σ |x|; many rows: each weight is
                rounded once to x's type
    activation  passes an error on with at most its steepest slope; exp and erf of the device are good to 2**-18
    result      rounded once to its type; Triton's interpreter cuts bfloat16 instead, which doubles that

A wrong index, a missing tail or a swapped half is outside these by orders of magnitude.
Ignored: errors of the inputs themselves; both sides see the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import reference
from .activation import CLAMPED_SWIGLU, Activation
from .expert_weights import Matrix
from .packing import PackedMatrix, scale_and_zero

_UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
_SMALLEST = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}
_SUM_STEP = 2.0**-23
_FLOAT8_SUM = 2.0**-10
_FUNCTION = 2.0**-18
# Steepest slopes: x·sigmoid(a·x) 1.0999 for every a, GELU 1.1290, ReLU 1.
_STEEPEST = 1.13


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """What is to be known about a kernel's arithmetic."""

    out_dtype: torch.dtype
    float8: bool = False
    scale_first: bool | None = None
    """Packed weights only: scaled and rounded before they are multiplied (True), or their groups' sums after (False)."""
    weight_dtype: torch.dtype | None = None
    """Type weights are rounded to before they are multiplied, where that is not what they are stored as."""
    cuts_bfloat16: bool = False
    """Results in bfloat16 are cut, not rounded (Triton's interpreter)."""


def expert_bound(
    x: torch.Tensor,
    matrix: Matrix,
    offsets: torch.Tensor,
    activation: Activation | None,
    arithmetic: Arithmetic,
    *,
    slot_of_expert: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the largest allowed |result − reference.expert_matmul(…)| [R, N] in float64, for the same arguments."""
    halves = 1 if activation is None else activation.halves
    rows = (x.double() if x_scale is None else x.double() * x_scale.double().unsqueeze(-1)).abs()
    bound = torch.zeros(x.shape[0], matrix.num_rows // halves, dtype=torch.float64, device=x.device)
    for expert in range(offsets.shape[0] - 1):
        start, end = int(offsets[expert]), int(offsets[expert + 1])
        if start == end:
            continue
        values, bias = reference.matrix_of_expert(matrix, expert, slot_of_expert)
        signed = (
            x[start:end].double()
            if x_scale is None
            else x[start:end].double() * x_scale[start:end].double().unsqueeze(-1)
        )
        product = signed @ values.T
        slot = expert if slot_of_expert is None else int(slot_of_expert[expert])
        error = _product_error(rows[start:end], values, matrix, slot, x.dtype, arithmetic)
        if bias is not None:
            product = product + bias
            error = error + 2 * _SUM_STEP * (product.abs() + bias.abs())
        bound[start:end] = _after(product, error, activation, arithmetic)
    return bound


def worst_ratio(result: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> float:
    """Return the largest |result − expected| / bound; above 1 is a wrong result, NaN anywhere is infinity."""
    if result.numel() == 0:
        return 0.0
    ratio = (result.double() - expected).abs() / bound
    return float("inf") if bool(torch.isnan(ratio).any()) else float(ratio.max())


def rounding(dtype: torch.dtype, *, cut: bool = False) -> float:
    """Return the largest relative error of one rounding to `dtype` (of cutting, where `cut`)."""
    return _UNIT_ROUNDOFF[dtype] * (2 if cut else 1)


def _product_error(
    rows: torch.Tensor, values: torch.Tensor, matrix: Matrix, slot: int, x_dtype: torch.dtype, arithmetic: Arithmetic
) -> torch.Tensor:
    """Error of x · wᵀ for |x| `rows` [n, K] and float64 `values` [N, K]."""
    magnitude: torch.Tensor = rows @ values.abs().T
    steps = (rows.shape[1] + 8) * _SUM_STEP
    error: torch.Tensor = steps * magnitude
    if arithmetic.float8:
        error = error + _FLOAT8_SUM * magnitude
    if arithmetic.weight_dtype is not None:
        error = error + rounding(arithmetic.weight_dtype, cut=arithmetic.cuts_bfloat16) * magnitude
    if not isinstance(matrix, PackedMatrix) or arithmetic.scale_first is None:
        return error
    fmt = matrix.format
    base = 1024 if x_dtype == torch.float16 else 128
    scale, _ = scale_and_zero(matrix.codes[slot].T, fmt.bits)
    scale = (scale * matrix.row_scale[slot].unsqueeze(-1)).double()
    sums: torch.Tensor = rows.unflatten(-1, (-1, fmt.group)).sum(-1)
    raw: torch.Tensor = (base + 2**fmt.bits) * sums @ scale.T
    if arithmetic.scale_first:
        # (base + q)·scale − (base + zero)·scale in float32, then one rounding to x's type.
        error = error + 4 * _SUM_STEP * raw + rounding(x_dtype, cut=arithmetic.cuts_bfloat16) * magnitude
    else:
        error = error + (2 * fmt.group + 16) * _SUM_STEP * raw + steps * raw / base
    return error


def _after(
    product: torch.Tensor, error: torch.Tensor, activation: Activation | None, arithmetic: Arithmetic
) -> torch.Tensor:
    """Error of the rounded activation of `product` [n, halves·N], which is itself off by up to `error`."""
    if activation is None:
        value, spread = product, error
    elif activation.gated:
        gate, up = product.chunk(2, dim=-1)
        gate_error, up_error = error.chunk(2, dim=-1)
        value = reference.activate(gate, up, activation)
        clamped = activation.code == CLAMPED_SWIGLU
        reach = (up.clamp(-activation.limit, activation.limit) + 1).abs() if clamped else up.abs()
        gate = gate.clamp(max=activation.limit) if clamped else gate
        glu = (gate * torch.sigmoid(activation.alpha * gate)).abs()
        spread = _STEEPEST * gate_error * (reach + up_error) + glu * up_error + _FUNCTION * glu * reach
    else:
        value = reference.activate(product, None, activation)
        spread = _STEEPEST * error + _FUNCTION * product.abs()
    unit = rounding(arithmetic.out_dtype, cut=arithmetic.cuts_bfloat16 and arithmetic.out_dtype == torch.bfloat16)
    return spread + unit * (value.abs() + spread) + _SMALLEST[arithmetic.out_dtype]
