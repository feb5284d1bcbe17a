"""Experts of float32 weights on a GPU: cuBLAS, one expert after another, since the Triton kernels are for narrower weights.

Rows come and go in the model's own type and are float32 in between; products are plain float32 (no TF32). Sorting, gathering and
combining are those of `triton_experts`. Ignored: launching several experts at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn import functional

from ...base.errors import InputError
from ...kernels.expert_weights import DenseMatrix
from ...kernels.reference import activate
from .runner import LayerStep
from .triton import TritonExperts


class PlainExperts(TritonExperts):
    """Each expert's rows at a time; a grouped launch is a loop."""

    def run(self, layer_step: LayerStep, experts: Sequence[int], slots: Sequence[int]) -> None:
        """Compute each of `experts` from its slot."""
        first, second = self.weights.gate_up, self.weights.down
        if not (isinstance(first, DenseMatrix) and isinstance(second, DenseMatrix)):
            raise InputError("experts.bits", "packed", "plain experts are not packed", "use the Triton kernels")
        function = self.weights.activation
        for expert, slot in zip(experts, slots, strict=True):
            low, high = layer_step.offsets[expert], layer_step.offsets[expert + 1]
            rows = layer_step.rows[low:high].to(first.values.dtype)
            wide = functional.linear(rows, first.values[slot], None if first.bias is None else first.bias[slot])
            gate, up = wide.chunk(2, dim=-1) if function.gated else (wide, None)
            h = activate(gate, up, function)
            layer_step.answers[low:high] = functional.linear(
                h, second.values[slot], None if second.bias is None else second.bias[slot]
            )
