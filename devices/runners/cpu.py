"""Experts on the host's cores: torch, one expert after another, from the slots they lie in.

Rows are of the type that weights are stored as where that is float32 or bfloat16, else bfloat16, which halves what
expanding a quantised matrix writes. Ignored: several cores at once; the compute thread has one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...kernels.cpu import COMPUTE_DTYPES, Scratch, run_expert
from ...kernels.expert_weights import DenseMatrix, ExpertWeights
from ..device import Device
from .runner import ExpertRunner, LayerStep


def row_dtype(weights: ExpertWeights) -> torch.dtype:
    """Return the type that rows have here beside these weights."""
    stored = weights.gate_up.values.dtype if isinstance(weights.gate_up, DenseMatrix) else torch.bfloat16
    return stored if stored in COMPUTE_DTYPES else torch.bfloat16


class CpuExperts(ExpertRunner):
    """Each expert's rows at a time; a grouped launch is a loop."""

    def __init__(self, weights: ExpertWeights, device: Device) -> None:
        super().__init__(weights, device)
        self._scratch = Scratch()
        self._dtype = row_dtype(weights)

    def begin(
        self, x: torch.Tensor, h: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, offsets: Sequence[int]
    ) -> LayerStep:
        """Return the layer step; rows are gathered at once, but of a single token, whose row is every choice's."""
        if len(h) == 1:
            choices = experts[0].tolist()
            places = torch.tensor(sorted(range(len(choices)), key=choices.__getitem__))
            row = h.to(self._dtype)
            return LayerStep(
                x, row.expand(len(choices), -1), row.new_empty(len(choices), h.shape[1]), weights, offsets, places
            )
        order = torch.argsort(experts.reshape(-1), stable=True)
        rows = h.to(self._dtype).index_select(0, torch.div(order, experts.shape[1], rounding_mode="floor"))
        return LayerStep(x, rows, torch.empty_like(rows), weights, offsets, order)

    def run(self, layer_step: LayerStep, experts: Sequence[int], slots: Sequence[int]) -> None:
        """Compute each of `experts` from its slot; rows that were gathered for another format are converted."""
        for expert, slot in zip(experts, slots, strict=True):
            low, high = layer_step.offsets[expert], layer_step.offsets[expert + 1]
            rows, answers = layer_step.rows[low:high], layer_step.answers[low:high]
            if rows.dtype == self._dtype:
                run_expert(rows, self.weights, slot, out=answers, scratch=self._scratch)
            else:
                answers.copy_(run_expert(rows.to(self._dtype), self.weights, slot, scratch=self._scratch))

    def finish(self, layer_step: LayerStep) -> None:
        """Put the answers back in the order of the choices and add them up in float32."""
        tokens, top_k = layer_step.weights.shape
        if tokens == 1:
            mixed = layer_step.weights[:, layer_step.order] @ layer_step.answers.float()
            layer_step.x = layer_step.x + mixed.to(layer_step.x.dtype)
            return
        by_choice = torch.empty(tokens * top_k, layer_step.x.shape[1])
        by_choice.index_copy_(0, layer_step.order, layer_step.answers.float())
        layer_step.x = layer_step.x + torch.bmm(
            layer_step.weights.unsqueeze(1), by_choice.view(tokens, top_k, -1)
        ).squeeze(1).to(layer_step.x.dtype)
