"""One layer's routed experts on a GPU, from tokens in to tokens out: permute, gate-up, down, combine.

    x [T, H], experts [T, k], weights [T, k] ──► out [T, H]

Modelled: all three kinds of weights (16 bits, float8, packed); rows are rounded to float8 before each matrix that is. Ignored:
shared experts and the router, which are dense work of the layer.
"""

from __future__ import annotations

import torch

from ..base.errors import InputError
from .dequant_gemm import SplitWorkspace, dequant_down, dequant_gate_up
from .expert_weights import DenseMatrix, ExpertWeights, to_float8
from .grouped_gemm import grouped_down, grouped_gate_up
from .packing import PackedMatrix
from .permute import Permutation, combine, permute, sort_by_expert
from .row_groups import RowGroups


def run_layer(
    x: torch.Tensor,
    experts: torch.Tensor,
    combine_weights: torch.Tensor,
    weights: ExpertWeights,
    num_experts: int,
    *,
    permutation: Permutation | None = None,
    workspace: SplitWorkspace | None = None,
) -> torch.Tensor:
    """Return out [T, H], the weighted sum of each token's experts, for tokens `x` [T, H] in bfloat16 or float16.

    `experts` [T, k] chosen among `num_experts`, `combine_weights` float32 [T, k]. A `permutation` made before (a replayed routing)
    saves the sort. Raises InputError for arguments that do not fit together.
    """
    permutation = sort_by_expert(experts, num_experts) if permutation is None else permutation
    rows = permute(x, permutation)
    y = run_rows(rows, weights, permutation.groups, workspace=workspace)
    return combine(y, permutation, combine_weights)


def run_rows(
    rows: torch.Tensor, weights: ExpertWeights, groups: RowGroups, *, workspace: SplitWorkspace | None = None
) -> torch.Tensor:
    """Return y [R, H]: both matrices of every row's expert, for `rows` [R, H] sorted by expert."""
    slots = weights.slot_of_expert
    gate_up, down = weights.gate_up, weights.down
    if isinstance(gate_up, PackedMatrix) and isinstance(down, PackedMatrix):
        h = dequant_gate_up(rows, gate_up, groups, weights.activation, slot_of_expert=slots, workspace=workspace)
        return dequant_down(h, down, groups, slot_of_expert=slots, workspace=workspace)
    if not (isinstance(gate_up, DenseMatrix) and isinstance(down, DenseMatrix)):
        raise InputError(
            "weights",
            "packed and plain",
            "both matrices of an expert are stored alike",
            "lay slots out with slot_layout",
        )
    if gate_up.row_scale is None:
        h = grouped_gate_up(rows, gate_up, groups, weights.activation, slot_of_expert=slots)
        return grouped_down(h, down, groups, slot_of_expert=slots)
    narrow, scale = to_float8(rows)
    h = grouped_gate_up(
        narrow, gate_up, groups, weights.activation, slot_of_expert=slots, x_scale=scale, out_dtype=rows.dtype
    )
    narrow, scale = to_float8(h)
    return grouped_down(narrow, down, groups, slot_of_expert=slots, x_scale=scale, out_dtype=rows.dtype)
