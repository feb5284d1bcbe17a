"""A model that computes with all its experts in place, while what its routers read and choose is looked at.

Modelled: every expert runs on the host's cores where it lies in the store, in the order of its number; nothing is moved. Router
inputs, logits, choices (the true ones: what experts are asked to compute) and weights are kept for the latest pass. Ignored:
schedules, time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ...devices.runners.cpu import CpuExperts
from .program import best_first
from .session import Loaded
from .supported import stored_bits


class Taps:
    """What routers read and chose in the latest pass, [T, …] for each column."""

    def __init__(self, loaded: Loaded, bits: str = "native") -> None:
        spec = loaded.spec
        store = loaded.store(stored_bits(bits, spec), on_disk=False, pinned=False)
        self._experts = CpuExperts(store.weights(), loaded.device)
        self._num_experts, self._loaded = spec.num_experts, loaded
        none = torch.empty(0)
        self.inputs = [none] * spec.num_moe_layers
        self.logits = [none] * spec.num_moe_layers
        self.ids = [none] * spec.num_moe_layers
        self.weights = [none] * spec.num_moe_layers

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Answer for the model's experts, and listen to its routers, while the context lasts."""
        routers = [layer.router for layer in self._loaded.assembled.layers]
        hooks = [router.register_forward_hook(self._hook(column)) for column, router in enumerate(routers)]
        try:
            with self._loaded.assembled.answered_by(self._answer):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, column: int) -> Any:
        def keep(_: Any, given: tuple[torch.Tensor, ...], found: tuple[torch.Tensor, ...]) -> None:
            self.inputs[column] = given[0].reshape(-1, given[0].shape[-1])
            self.logits[column] = found[0].reshape(-1, self._num_experts)

        return keep

    def _answer(self, column: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ids, weights = best_first(ids, weights)
        self.ids[column], self.weights[column] = ids, weights
        counts = np.bincount(ids.numpy().ravel(), minlength=self._num_experts)
        offsets = [0, *np.cumsum(counts).tolist()]
        layer_step = self._experts.begin(torch.zeros_like(x), x, weights.float(), ids, offsets)
        chosen = np.flatnonzero(counts).tolist()
        self._experts.run(layer_step, chosen, [column * self._num_experts + expert for expert in chosen])
        self._experts.finish(layer_step)
        return layer_step.x
