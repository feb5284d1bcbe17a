"""The routed experts of one layer step, really computed from slots, whichever experts a launch is given.

    x, h [T, H], logits [T, E], experts [T, k] ── start ──► layer step ── run(some experts and their slots) … ── finish ──► layer step.x

Modelled: tokens are sorted by expert once, weights are the router's own (softmax over forced choices, or as a model's router
says), each launch computes the rows of its experts, and the weighted answers are added to x. Ignored: which launch an expert belongs to
(that is decided).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels.expert_weights import DenseMatrix, ExpertWeights
from ..device import Device


@dataclass(slots=True)
class LayerStep:
    """One MoE layer of one forward pass."""

    x: torch.Tensor
    """[T, H]: the residual stream, to which answers are added."""
    rows: torch.Tensor
    """[T·k, H]: what experts read, sorted by expert."""
    answers: torch.Tensor
    """[T·k, H]: what they answered."""
    weights: torch.Tensor
    """[T, k]: the router's weights."""
    offsets: Sequence[int]
    """Rows of expert e are offsets[e] to offsets[e + 1] − 1; known to the host."""
    order: Any
    """How rows were sorted, as the runner keeps it."""


class ExpertRunner(ABC):
    """Computes experts that lie in the slots of an arena."""

    def __init__(self, weights: ExpertWeights, device: Device) -> None:
        self.weights, self.device = weights, device

    def start(
        self, x: torch.Tensor, h: torch.Tensor, logits: torch.Tensor, experts: torch.Tensor, offsets: Sequence[int]
    ) -> LayerStep:
        """Return the layer step of tokens `x` [T, H], read by experts as `h` [T, H], whose experts are `experts` int64 [T, k]."""
        return self.begin(x, h, gate(logits, experts), experts, offsets)

    @abstractmethod
    def begin(
        self, x: torch.Tensor, h: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, offsets: Sequence[int]
    ) -> LayerStep:
        """Return the same for choices whose weights, float32 [T, k], a router has said."""

    @abstractmethod
    def run(self, layer_step: LayerStep, experts: Sequence[int], slots: Sequence[int]) -> None:
        """Compute `experts`, which lie in `slots`, in one launch."""

    @abstractmethod
    def finish(self, layer_step: LayerStep) -> None:
        """Add the weighted answers to `layer_step.x`; the layer step's last launch calls it."""


def gate(logits: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Return the router's weights float32 [T, k] of the forced choices: a softmax over their logits."""
    return torch.softmax(logits.gather(1, experts).float(), dim=-1)


def open_runner(weights: ExpertWeights, device: Device) -> ExpertRunner:
    """Return the runner for a device."""
    if device.kind == "cuda":
        if isinstance(weights.gate_up, DenseMatrix) and weights.gate_up.values.dtype == torch.float32:
            from .plain import PlainExperts

            return PlainExperts(weights, device)
        from .triton import TritonExperts

        return TritonExperts(weights, device)
    from .cpu import CpuExperts

    return CpuExperts(weights, device)
