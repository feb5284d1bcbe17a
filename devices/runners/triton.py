"""Experts on a GPU: the Triton kernels, one launch for any set of experts, from the slots they lie in.

Modelled: tokens are sorted and gathered on the device; the host knows the offsets, because the routing is replayed,
and so never waits. A launch of one expert needs nothing from the host but two views of tables that lie on the device;
a launch of several sends their rows, offsets and slots in one small copy. Ignored: CUDA graphs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from ...kernels.dequant_gemm import SplitWorkspace
from ...kernels.expert_weights import ExpertWeights
from ...kernels.experts import run_rows
from ...kernels.permute import combine, permute, sort_by_expert
from ...kernels.row_groups import groups_from_offsets
from ..device import Device
from .runner import ExpertRunner, LayerStep


class TritonExperts(ExpertRunner):
    """Grouped kernels over whatever experts a launch is given."""

    def __init__(self, weights: ExpertWeights, device: Device) -> None:
        super().__init__(weights, device)
        self._slots = torch.arange(weights.gate_up.num_slots, dtype=torch.int32, device=device.place)
        self._ends = torch.zeros(0, 2, dtype=torch.int32, device=device.place)
        self._workspace = SplitWorkspace(device.place)

    def begin(
        self, x: torch.Tensor, h: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, offsets: Sequence[int]
    ) -> LayerStep:
        """Return the layer step, sorted and gathered by the device."""
        order = sort_by_expert(experts, len(offsets) - 1)
        rows = permute(h, order)
        return LayerStep(x, rows, torch.empty_like(rows), weights, offsets, order)

    def run(self, layer_step: LayerStep, experts: Sequence[int], slots: Sequence[int]) -> None:
        """Compute `experts` from their slots in one launch for each matrix."""
        if len(experts) == 1:
            low, high = layer_step.offsets[experts[0]], layer_step.offsets[experts[0] + 1]
            self._reach(len(layer_step.rows))
            groups = groups_from_offsets(self._ends[high - low], high - low)
            weights = dataclasses.replace(self.weights, slot_of_expert=self._slots[slots[0] : slots[0] + 1])
            layer_step.answers[low:high] = run_rows(
                layer_step.rows[low:high], weights, groups, workspace=self._workspace
            )
            return
        spans = [(layer_step.offsets[expert], layer_step.offsets[expert + 1]) for expert in experts]
        ends = np.cumsum([0] + [high - low for low, high in spans])
        sent = np.concatenate([ends, slots, *(np.arange(low, high) for low, high in spans)]).astype(np.int32)
        there = torch.from_numpy(sent).to(self.device.place, non_blocking=True)
        split = len(experts) + 1
        groups = groups_from_offsets(there[:split], int(ends[-1]))
        weights = dataclasses.replace(self.weights, slot_of_expert=there[split : split + len(experts)])
        rows = there[split + len(experts) :]
        answers = run_rows(layer_step.rows.index_select(0, rows), weights, groups, workspace=self._workspace)
        layer_step.answers.index_copy_(0, rows.long(), answers)

    def _reach(self, num_rows: int) -> None:
        """Make the offsets of one expert with up to `num_rows` rows; a layer step may have been started by another format's runner."""
        if num_rows >= len(self._ends):
            self._ends = torch.zeros(2 * num_rows + 1, 2, dtype=torch.int32, device=self.device.place)
            self._ends[:, 1] = torch.arange(len(self._ends), dtype=torch.int32, device=self.device.place)

    def finish(self, layer_step: LayerStep) -> None:
        """Sum the weighted answers of each token."""
        layer_step.x = layer_step.x + combine(layer_step.answers, layer_step.order, layer_step.weights)
