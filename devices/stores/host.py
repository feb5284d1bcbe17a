"""Where all experts live: host memory, page-locked where that means anything (a file below it: `disk_store`).

Modelled: every expert is one run of bytes laid out as a slot, so moving an expert is copying bytes. Weights are
random, drawn from a seed and quantised as the format asks; where memory is short, experts may share places. Ignored: reading
real checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch

from ...kernels.activation import Activation, activation
from ...kernels.expert_weights import ExpertWeights, slot_views, write_slot
from ...kernels.slot_layout import SlotLayout
from ...specs.models import ModelSpec
from ..device import Device
from .slot_sizes import expert_layout

# The activation of experts in models of these families; every other gated model uses SwiGLU, every other plain one ReLU.
_ACTIVATIONS = {"gpt_oss": "clamped-swiglu"}


def expert_activation(model: ModelSpec) -> Activation:
    """Return the function between an expert's matrices."""
    return activation(_ACTIVATIONS.get(model.family, "swiglu" if model.gated else "relu"))


class ExpertStore:
    """All experts in host memory, each in a run of bytes; expert `key` lies in place `key` modulo the number of places."""

    def __init__(
        self,
        layout: SlotLayout,
        function: Activation,
        memory: torch.Tensor,
        device: Device | None = None,
        *,
        num_keys: int | None = None,
    ) -> None:
        self.layout, self.activation = layout, function
        self.slot_bytes = layout.slot_bytes
        self._device = device
        self._slots = memory.view(-1, self.slot_bytes)
        self._num_keys = self.num_places if num_keys is None else num_keys

    @property
    def num_keys(self) -> int:
        """Experts held."""
        return self._num_keys

    @property
    def num_places(self) -> int:
        """Runs of bytes they share; as many as experts where memory allows."""
        return self._slots.shape[0]

    def weights(self) -> ExpertWeights:
        """Return all places as matrices, place `key` in slot `key`."""
        return slot_views(self._slots.view(-1), self.layout, self.activation)

    def bytes_of(self, key: int) -> torch.Tensor:
        """Return uint8 [slot_bytes] of an expert."""
        return self._slots[key % self.num_places]

    def bring(self, device: Device, target: torch.Tensor, key: int, low: int, high: int) -> None:
        """Copy bytes `low` to `high` of expert `key` to the same bytes of `target`, on the thread's stream."""
        device.copy(target[low:high], self.bytes_of(key)[low:high])

    def take_back(self, device: Device, source: torch.Tensor, key: int) -> None:
        """Copy a slot's bytes back into expert `key`'s place, on the thread's stream."""
        device.copy(self.bytes_of(key), source)

    def close(self) -> None:
        """Let go of the memory, and unlock it where a device gave it."""
        if self._device is not None:
            self._device.release_host(self._slots.view(-1))
        self._slots = torch.empty(0, self.slot_bytes, dtype=torch.uint8)


def make_store(
    model: ModelSpec,
    weights: str,
    device: Device,
    *,
    num_keys: int,
    pinned: bool = True,
    distinct: int | None = None,
    places: int | None = None,
    seed: int = 0,
) -> ExpertStore:
    """Return a store of `num_keys` experts with random weights.

    distinct: draw only so many experts and repeat their bytes (each key still has memory of its own); None draws all. places:
    memory for only so many experts, which they share; None gives each its own. Raises DoesNotFit where the host has too little memory.
    """
    layout, function = expert_layout(model, weights), expert_activation(model)
    num_places = num_keys if places is None else min(places, num_keys)
    what = f"the store of {num_keys} experts"
    memory = device.host_memory(num_places * layout.slot_bytes, pinned=pinned, what=what)
    memory.zero_()  # gaps between parts have defined bytes, and every page is touched before anything is timed
    store = ExpertStore(layout, function, memory, device, num_keys=num_keys)
    drawn = num_places if distinct is None else min(distinct, num_places)
    views = store.weights()
    # Drawn and packed where that is fast; what is drawn depends on the kind of device.
    place = device.place
    generator = torch.Generator(device=place).manual_seed(seed)
    for key in range(drawn):
        biases: dict[str, Any] = {}
        matrices = {}
        for name, (num_rows, num_columns) in layout.shape.matrices.items():
            matrices[name] = torch.randn(num_rows, num_columns, generator=generator, device=place).mul_(
                num_columns**-0.5
            )
            if layout.shape.bias:
                biases[f"{name}_bias"] = torch.randn(num_rows, generator=generator, device=place).mul_(0.1)
        write_slot(views, key, matrices["gate_up"], matrices["down"], **biases)
    for key in range(drawn, num_places):
        store.bytes_of(key).copy_(store.bytes_of(key % drawn))
    return store
