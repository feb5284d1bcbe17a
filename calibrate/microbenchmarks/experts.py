"""Expert kernels measured: one expert by tokens, several in one launch.

Modelled: weights come from slots of an arena larger than the caches, taken in turn, as in a run where an expert was
last used a few layers ago. Ignored: experts whose bytes have just been copied (a run's error budget shows what that is
worth).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...base.units import MIB
from ...devices.device import Device
from ...devices.runners.runner import ExpertRunner, LayerStep, open_runner
from ...devices.stores.host import expert_activation, make_store
from ...devices.stores.slot_sizes import expert_layout
from ...specs.models import ModelSpec
from .harness import Bench

# Twice the last-level cache of an H200 (50 MiB) and thrice that of one core complex of a server CPU (32 MiB).
ARENA_BYTES = 112 * MIB
_MIN_SLOTS, _MAX_SLOTS = 4, 512
_DRAWN = 2


class ExpertArena:
    """Slots full of experts, and the runner that computes them."""

    def __init__(self, device: Device, model: ModelSpec, bits: str, *, arena_bytes: int = ARENA_BYTES) -> None:
        from ...kernels.expert_weights import slot_views

        layout = expert_layout(model, bits)
        self.device, self.model, self.bits = device, model, bits
        self.num_slots = max(_MIN_SLOTS, min(_MAX_SLOTS, arena_bytes // layout.slot_bytes))
        self.slot_bytes = layout.slot_bytes
        self.memory = device.empty(
            (self.num_slots * layout.slot_bytes,), torch.uint8, f"{self.num_slots} experts to measure"
        )
        drawn = make_store(model, bits, device, num_keys=_DRAWN, pinned=False)
        slots = self.memory.view(self.num_slots, layout.slot_bytes)
        for slot in range(self.num_slots):
            slots[slot].copy_(drawn.bytes_of(slot % _DRAWN))
        self.runner: ExpertRunner = open_runner(slot_views(self.memory, layout, expert_activation(model)), device)

    def layer_step(self, tokens: int, experts: int, dtype: torch.dtype) -> LayerStep:
        """Return a layer step of `experts` experts with `tokens` tokens each, ready to be computed."""
        generator = torch.Generator().manual_seed(tokens)
        count = tokens * experts
        h = torch.randn(count, self.model.expert_hidden, generator=generator).to(device=self.device.place, dtype=dtype)
        chosen = torch.arange(experts).repeat_interleave(tokens).view(-1, 1).to(self.device.place)
        logits = torch.zeros(count, max(experts, 2), device=self.device.place, dtype=dtype)
        return self.runner.start(
            h.clone(), h, logits, chosen, [tokens * n for n in range(max(experts, 2) + 1)][: experts + 1]
        )

    def close(self) -> None:
        """Give the memory back."""
        self.device.release(self.memory)


def expert_arguments(model: ModelSpec, tokens: int) -> dict[str, float]:
    """Return the arguments of a sample of one expert."""
    return {
        "tokens": tokens,
        "hidden": model.expert_hidden,
        "intermediate": model.expert_intermediate_size,
        "gated": int(model.gated),
    }


def expert_benches(
    arena: ExpertArena, tokens: Sequence[int], *, dtype: torch.dtype, kind: str = "expert"
) -> list[Bench]:
    """Return a bench for one expert with each number of tokens."""
    found = []
    for count in tokens:
        layer_step = arena.layer_step(count, 1, dtype)

        def run(number: int, layer_step: LayerStep = layer_step) -> None:
            arena.runner.run(layer_step, (0,), (number % arena.num_slots,))

        found.append(
            Bench(kind=kind, labels={"bits": arena.bits}, arguments=expert_arguments(arena.model, count), run=run)
        )
    return found


def grouped_benches(
    arena: ExpertArena, tokens: Sequence[int], experts: Sequence[int], *, dtype: torch.dtype
) -> list[Bench]:
    """Return a bench for one launch of several experts with each number of tokens each."""
    found = []
    for count in tokens:
        for together in (n for n in experts if n <= arena.num_slots):
            layer_step = arena.layer_step(count, together, dtype)

            def run(number: int, layer_step: LayerStep = layer_step, together: int = together) -> None:
                first = number * together
                slots = [(first + place) % arena.num_slots for place in range(together)]
                arena.runner.run(layer_step, range(together), slots)

            arguments = expert_arguments(arena.model, count) | {"experts": together}
            found.append(Bench(kind="grouped", labels={"bits": arena.bits}, arguments=arguments, run=run))
    return found
