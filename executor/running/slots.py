"""Device memory for experts: one arena whose first slots are the cache's, the staging and the stream slots, and whose
last ones are transient buffers.

Modelled: slots are numbered as in `sim.policies.state`; a transient buffer is given to a transfer when it starts and
taken back when the layer step it was fetched for is over. Where experts come in two formats, any slot can hold either. Ignored:
which expert belongs where (that is decided by the policies).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...base.errors import Internal
from ...devices.device import Device
from ...kernels.activation import Activation
from ...kernels.expert_weights import ExpertWeights, slot_views
from ...kernels.slot_layout import SlotLayout
from .transfers import Transfer

# All bits set is a NaN in every floating-point format used here: a slot that is read too early shows in the output.
POISON = 0xFF


class Slots:
    """The arena of a run."""

    def __init__(
        self,
        device: Device,
        layouts: Sequence[SlotLayout],
        function: Activation,
        *,
        num_slots: int,
        num_transient: int,
    ) -> None:
        self.slot_bytes = max(layout.slot_bytes for layout in layouts)
        self.num_slots = num_slots
        total = max(1, num_slots + num_transient)
        self.arena = device.empty((total * self.slot_bytes,), torch.uint8, f"an arena of {total} experts")
        self.arena.zero_()  # every page exists before anything is timed
        device.synchronize()  # slots are filled on streams that know nothing of this one
        self.weights: list[ExpertWeights] = [
            slot_views(self.arena, layout, function, slot_bytes=self.slot_bytes) for layout in layouts
        ]
        """All slots as experts of each weight format; what lies in a slot is known to who filled it."""
        self._slots = self.arena.view(total, self.slot_bytes)
        self._free = list(range(num_slots, num_slots + num_transient))

    def bytes_of(self, slot: int) -> torch.Tensor:
        """Return uint8 [slot_bytes] of a slot."""
        return self._slots[slot]

    def destination(self, transfer: Transfer) -> int:
        """Return the slot that the next piece of a transfer goes to, giving it a transient buffer where it needs one.

        Raises Internal where there is none left: the policies said how many are needed.
        """
        if not transfer.transient:
            return transfer.slot
        if transfer.slot < 0:
            if not self._free:
                raise Internal("more transient experts at once than the policies counted")
            transfer.slot = self._free.pop()
        return transfer.slot

    def give_back(self, transfer: Transfer) -> None:
        """Take back the buffer of a transient transfer, where it has one."""
        if transfer.transient and transfer.slot >= 0:
            self._free.append(transfer.slot)
            transfer.slot = -1
