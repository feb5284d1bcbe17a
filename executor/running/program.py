"""The host's program for a recording: launch the dense part, run the layer step that its routing asks for, go on.

Modelled: forced routing, whatever the states say. Ignored: what happens in a layer step (`layer_steps`), and what anything costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...devices.dense_part import DensePart
from ...devices.device import Device, Mark
from ...devices.runners.runner import ExpertRunner, LayerStep
from ...sim.policies.offload import begin_step
from ...sim.policies.state import (
    Array,
    Decision,
    PolicyConfig,
    PolicyState,
)
from ...sim.policies.steps import Steps
from ...sim.timeline import (
    OP_DENSE,
    OP_HEAD,
    OP_HOST_STEP,
)
from ...specs.models.pass_shape import PassShape
from .copy_engine import Gate
from .layer_steps import LayerSteps
from .workers import Workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one forward pass computes: shapes and forced routing."""

    shape: PassShape
    rows: torch.Tensor
    """int64 [T]: which embeddings the tokens start from."""
    experts: torch.Tensor
    """int64 [num_layers, T, k]."""
    offsets: Sequence[Sequence[int]]
    """For each layer, where each expert's rows begin among those sorted by expert; num_experts + 1 numbers."""


class Program(LayerSteps):
    """One run of a recording; `run` returns when the last step is done and everything admitted has been moved."""

    def __init__(
        self,
        config: PolicyConfig,
        steps: Steps,
        state: PolicyState,
        out: Decision,
        *,
        device: Device,
        dense: DensePart,
        experts: Sequence[ExpertRunner],
        expert_bytes: Sequence[int],
        gate: Gate,
        workers: Workers,
        keep_outputs: bool,
    ) -> None:
        super().__init__(
            config, steps, state, out, device=device, experts=experts, expert_bytes=expert_bytes, gate=gate, workers=workers
        )  # fmt: skip
        self._dense, self._keep = dense, keep_outputs
        self.outputs: list[torch.Tensor] = []

    def run(self, steps: Sequence[Step], progress: Callable[[int, int, str], None]) -> None:
        """Run every step in order."""
        for number, step in enumerate(steps):
            self._device.new_epoch()
            begin_step(self._config, self._steps, self._state, number)
            x = self._step(number, step)
            if self._keep:
                self.outputs.append(x.float().cpu().clone())
            self._gate.check()
            progress(number + 1, len(steps), "forward passes")
        self._end()

    def _step(self, number: int, step: Step) -> torch.Tensor:
        """Run one forward pass; return the last layer's output [T, H]."""
        layers = self._config.num_layers
        tokens = step.shape.tokens
        layer_step: LayerStep | None = None
        for layer in range(layers):
            self._await_cores()
            self._await_places()
            launched = time.perf_counter_ns()
            if layer:
                self._note_part(launched)
            begin = self._device.mark()
            x = self._dense.embed(step.rows) if layer_step is None else self._answered(layer_step)
            x, h, logits = self._dense.group(layer, x, step.shape)
            layer_step = self._experts[0].start(x, h, logits, step.experts[layer], step.offsets[layer])
            end = self._device.mark()
            self._launched(number, max(layer - 1, 0), launched)
            self.rows.computed(OP_DENSE, number, layer, -1, begin, end, tokens)
            end.wait()
            self._layer_step(number, layer, layer_step, end.at_ns())
        self._await_cores()
        self._await_places()
        launched = time.perf_counter_ns()
        begin = self._device.mark()
        x = step.rows if layer_step is None else self._answered(layer_step)
        chosen = self._dense.head(x, step.shape).argmax(dim=-1)
        end = self._device.mark()
        self._launched(number, layers - 1, launched)
        self.rows.computed(OP_HEAD, number, layers - 1, -1, begin, end, tokens)
        end.wait()
        self._sample(number, chosen, end)
        return x

    def _sample(self, number: int, chosen: torch.Tensor, end: Mark) -> None:
        """Read the chosen tokens back: the host's share of a step."""
        chosen.cpu()
        now = time.perf_counter_ns()
        self.rows.hosted(OP_HOST_STEP, number, self._config.num_layers - 1, end.at_ns(), now)
        self.step_end_ns.append(now)
        self._note_part(now)


def offsets_of(experts: Array, num_experts: int) -> list[list[int]]:
    """Return, for each layer of `experts` [T, num_layers, k], where each expert's rows begin once sorted by expert."""
    found = []
    for layer in range(experts.shape[1]):
        counts = np.bincount(experts[:, layer].ravel(), minlength=num_experts)
        found.append([0, *np.cumsum(counts).tolist()])
    return found
