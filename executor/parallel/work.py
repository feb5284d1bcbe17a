"""What a rank computes: its dense part, and the experts in its slots on the rows that came; all of it really, on one core.

Modelled: weights are drawn from the seed by layer and logical expert, so that every copy of an expert on any rank is the same
and a single process can hold them all. A batch of a rank has caches of its own: it decodes as many requests as it has
tokens. A grouped launch on a CPU is a loop over experts, as for one device, so both kernels are one here.
Ignored: exchanges, and prompts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...base.errors import InputError
from ...devices.dense_part import DensePart
from ...devices.device import CpuDevice
from ...devices.runners.cpu import row_dtype
from ...devices.stores.host import expert_activation
from ...devices.stores.slot_sizes import expert_layout
from ...kernels.cpu import Scratch, run_expert
from ...kernels.expert_weights import slot_views, write_slot
from ...specs.models import ModelSpec
from ...specs.models.pass_shape import PassShape
from .routes import IntArray

_EXPERT_SEED, _EMBED_SEED = 7919, 104729


class Experts:
    """Experts of all layers, as `placed: [layers, slots]` names them."""

    def __init__(self, model: ModelSpec, bits: str, placed: IntArray, seed: int, *, drawn: bool = True) -> None:
        """drawn: weights are drawn from the seed; otherwise slots stay zeros until something is copied into them."""
        layout, function = expert_layout(model, bits), expert_activation(model)
        self._slots = placed.shape[1]
        self.slot_bytes = layout.slot_bytes
        self._memory = torch.zeros(placed.size * layout.slot_bytes, dtype=torch.uint8)
        self._weights = slot_views(self._memory, layout, function)
        self.dtype = row_dtype(self._weights)
        self._scratch = Scratch()
        for layer in range(len(placed) if drawn else 0):
            for slot in range(self._slots):
                number = layer * model.num_experts + int(placed[layer, slot])
                generator = torch.Generator().manual_seed(seed * _EXPERT_SEED + number)
                matrices: dict[str, torch.Tensor] = {}
                biases: dict[str, Any] = {}
                for name, (num_rows, num_columns) in layout.shape.matrices.items():
                    matrices[name] = torch.randn(num_rows, num_columns, generator=generator).mul_(num_columns**-0.5)
                    if layout.shape.bias:
                        biases[f"{name}_bias"] = torch.randn(num_rows, generator=generator).mul_(0.1)
                write_slot(self._weights, layer * self._slots + slot, matrices["gate_up"], matrices["down"], **biases)

    def slot(self, layer: int, slot: int) -> torch.Tensor:
        """Return the bytes of one slot, uint8 [slot_bytes], to be read or written."""
        first = (layer * self._slots + slot) * self.slot_bytes
        return self._memory[first : first + self.slot_bytes]

    def run(self, layer: int, rows: torch.Tensor, slots: IntArray, weights: torch.Tensor) -> torch.Tensor:
        """Return float32 [rows, H]: the weighted sum of the answers of `slots: [rows, top_k]` (own numbers, -1 for none)."""
        answers = torch.zeros(rows.shape, dtype=torch.float32)
        typed = rows.to(self.dtype)
        for slot in np.unique(slots[slots >= 0]).tolist():
            row, choice = (torch.from_numpy(each) for each in np.nonzero(slots == slot))
            found = run_expert(
                typed.index_select(0, row), self._weights, layer * self._slots + slot, scratch=self._scratch
            )
            answers.index_add_(0, row, found.float() * weights[row, choice].unsqueeze(1))
        return answers


class Dense:
    """The dense part of one batch of one rank."""

    def __init__(self, model: ModelSpec, tokens: int, context_tokens: int, seed: int) -> None:
        self.shape = PassShape(tokens=tokens, context_tokens=tokens * context_tokens, requests=tokens)
        self._part = DensePart(model, CpuDevice(), dtype=torch.float32, largest=self.shape, seed=seed)

    def group(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (x, what experts read, router logits) before MoE layer `layer`."""
        return self._part.group(layer, x, self.shape)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of every token."""
        return self._part.head(x, self.shape)


def hidden_states(model: ModelSpec, num_tokens: int, step: int, seed: int) -> torch.Tensor:
    """Return the states [tokens, H] in which the tokens of a step begin."""
    generator = torch.Generator().manual_seed(seed * _EMBED_SEED + step)
    return torch.randn(num_tokens, model.hidden_size, generator=generator)


def check_batches(tokens: int) -> None:
    """Return nothing; raises InputError for a batch without tokens, which has nothing to decode."""
    if tokens < 1:
        raise InputError(
            "tokens", tokens, "a batch of a rank has no token", "give each rank more tokens, or fewer batches"
        )
