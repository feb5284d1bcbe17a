"""What every kernel must compute, slowly and obviously, in float64: loops over experts, one matrix at a time.

Inputs are the very numbers a kernel sees (already rounded to its types, already quantised), so a difference is the kernel's own
arithmetic: its accumulation and the rounding of its result.
Ignored: speed.
"""

from __future__ import annotations

import math

import torch

from .activation import CLAMPED_SWIGLU, GELU, RELU, SWIGLU, Activation
from .expert_weights import ExpertWeights, Matrix, dense_values


def activate(gate: torch.Tensor, up: torch.Tensor | None, activation: Activation | None) -> torch.Tensor:
    """Return the activation of `gate` (and `up`, where gated) in the type given; None leaves `gate` as it is."""
    if activation is None:
        return gate
    if activation.code == SWIGLU and up is not None:
        return gate * torch.sigmoid(gate) * up
    if activation.code == CLAMPED_SWIGLU and up is not None:
        gate = gate.clamp(max=activation.limit)
        return gate * torch.sigmoid(activation.alpha * gate) * (up.clamp(-activation.limit, activation.limit) + 1)
    if activation.code == GELU:
        return 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    if activation.code == RELU:
        return gate.clamp(min=0)
    raise AssertionError(f"no reference for {activation.name}")


def matrix_of_expert(
    matrix: Matrix, expert: int, slot_of_expert: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return one expert's matrix [N, K] and bias [N] in float64."""
    slot = expert if slot_of_expert is None else int(slot_of_expert[expert])
    values = dense_values(matrix, slot, torch.float64)
    return values, None if matrix.bias is None else matrix.bias[slot].double()


def expert_matmul(
    x: torch.Tensor,
    matrix: Matrix,
    offsets: torch.Tensor,
    activation: Activation | None = None,
    *,
    slot_of_expert: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return f(x · wᵀ + bias) [R, N] in float64 for rows sorted by expert; `offsets` [E + 1] on the CPU."""
    halves = 1 if activation is None else activation.halves
    rows = x.double() if x_scale is None else x.double() * x_scale.double().unsqueeze(-1)
    out = torch.zeros(x.shape[0], matrix.num_rows // halves, dtype=torch.float64, device=x.device)
    for expert in range(offsets.shape[0] - 1):
        start, end = int(offsets[expert]), int(offsets[expert + 1])
        if start == end:
            continue
        values, bias = matrix_of_expert(matrix, expert, slot_of_expert)
        product = rows[start:end] @ values.T
        if bias is not None:
            product = product + bias
        gate, up = (product, None) if halves == 1 else product.chunk(2, dim=-1)
        out[start:end] = activate(gate, up, activation)
    return out


def sort_by_expert(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return offsets [E + 1], token of each sorted row [T·k] and row of each choice [T, k], all int32, by a stable sort."""
    offsets = [0]
    token_of_row: list[int] = []
    row_of_choice = torch.zeros(experts.shape, dtype=torch.int32)
    for expert in range(num_experts):
        for token in range(experts.shape[0]):
            for choice in range(experts.shape[1]):
                if int(experts[token, choice]) == expert:
                    row_of_choice[token, choice] = len(token_of_row)
                    token_of_row.append(token)
        offsets.append(len(token_of_row))
    return torch.tensor(offsets, dtype=torch.int32), torch.tensor(token_of_row, dtype=torch.int32), row_of_choice


def combine(y: torch.Tensor, row_of_choice: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return Σ over choices of weight · y[row of choice] [T, H] in float64."""
    out = torch.zeros(row_of_choice.shape[0], y.shape[1], dtype=torch.float64, device=y.device)
    for token in range(row_of_choice.shape[0]):
        for choice in range(row_of_choice.shape[1]):
            out[token] += weights[token, choice].double() * y[int(row_of_choice[token, choice])].double()
    return out


def layer(
    x: torch.Tensor, experts: torch.Tensor, combine_weights: torch.Tensor, weights: ExpertWeights
) -> torch.Tensor:
    """Return one layer's routed experts [T, H] in float64 for tokens `x` [T, H] and their choices [T, k], one at a time."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token in range(x.shape[0]):
        for choice in range(experts.shape[1]):
            expert = int(experts[token, choice])
            one = torch.zeros(expert + 2, dtype=torch.int32)
            one[-1] = 1
            h = expert_matmul(
                x[token : token + 1], weights.gate_up, one, weights.activation, slot_of_expert=weights.slot_of_expert
            )
            y = expert_matmul(h, weights.down, one, slot_of_expert=weights.slot_of_expert)
            out[token] += combine_weights[token, choice].double() * y[0]
    return out
