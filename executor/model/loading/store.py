"""A checkpoint's experts put into a store, one at a time: quantised as asked for, never more than one beside the store itself.

Modelled: memory (page-locked where that means anything) and a file, both filled straight from the checkpoint's own files. Each
expert's bytes in a file have a checksum, looked at whenever the expert is read whole. Ignored: which experts move when.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ....base.errors import DoesNotFit
from ....devices.device import Device
from ....devices.stores.disk import DiskStore
from ....devices.stores.host import ExpertStore
from ....devices.stores.slot_sizes import expert_layout
from ....kernels.activation import activation
from ....kernels.expert_weights import write_slot
from ....kernels.packing import HALF_QUADRATIC
from ....kernels.slot_layout import SlotLayout
from ....specs.models import ModelSpec
from ...running.failures import DamagedStore
from .assembly import Assembled

Progress = Callable[[int, int, str], None]
_ROW_WORDS = 1021
_ROW_BYTES = _ROW_WORDS * np.dtype(np.uint64).itemsize


def store_bytes(model: ModelSpec, bits: str) -> int:
    """Return the bytes of all experts stored as `bits`."""
    return expert_layout(model, bits).slot_bytes * model.num_moe_layers * model.num_experts


def fill_store(
    assembled: Assembled, bits: str, device: Device, *, pinned: bool, rounding: str = HALF_QUADRATIC, progress: Progress
) -> ExpertStore:
    """Return all experts in host memory, packed by `rounding` where bits are few (`kernels.packing`).

    Raises DoesNotFit, before anything is allocated, where it has too little.
    """
    spec = assembled.spec
    layout = expert_layout(spec, bits)
    count = spec.num_moe_layers * spec.num_experts
    memory = device.host_memory(count * layout.slot_bytes, pinned=pinned, what=f"the store of {count} experts")
    memory.zero_()  # gaps between parts have defined bytes
    store = ExpertStore(layout, activation(assembled.activation), memory, device, num_keys=count)
    views = store.weights()
    try:
        for key in range(count):
            write_slot(views, key, rounding=rounding, **_parts(assembled, key))
            progress(key + 1, count, "experts loaded")
    except BaseException:
        store.close()
        raise
    return store


def fill_file(
    assembled: Assembled,
    bits: str,
    device: Device,
    *,
    folder: Path | None,
    rounding: str = HALF_QUADRATIC,
    progress: Progress,
) -> DiskStore:
    """Return all experts in a temporary file, written one by one; raises DoesNotFit where the disk has too little room."""
    return CheckedFile(_OneByOne(assembled, bits, device, rounding, progress), folder)


class _OneByOne(ExpertStore):
    """Experts as a file is written from them: each made when it is asked for, in a place that the next one takes."""

    def __init__(self, assembled: Assembled, bits: str, device: Device, rounding: str, progress: Progress) -> None:
        layout: SlotLayout = expert_layout(assembled.spec, bits)
        memory = device.host_memory(layout.slot_bytes, pinned=False, what="an expert on its way to the file")
        memory.zero_()
        count = assembled.spec.num_moe_layers * assembled.spec.num_experts
        super().__init__(layout, activation(assembled.activation), memory, device, num_keys=count)
        self._assembled, self._progress, self._views, self._rounding = assembled, progress, self.weights(), rounding

    def bytes_of(self, key: int) -> torch.Tensor:
        """Return uint8 [slot_bytes] of an expert, read and packed for the purpose."""
        write_slot(self._views, 0, rounding=self._rounding, **_parts(self._assembled, key))
        self._progress(key + 1, self.num_keys, "experts written to disk")
        return super().bytes_of(0)


class CheckedFile(DiskStore):
    """A file of experts that remembers a checksum of each, and looks at it when the expert is read."""

    def __init__(self, source: ExpertStore, folder: Path | None = None) -> None:
        self._sums: dict[int, int] = {}
        super().__init__(_Summed(source, self._sums), folder)

    def read(self, target: torch.Tensor, key: int) -> None:
        """Read expert `key`; raises DamagedStore where it is not what was written."""
        super().read(target, key)
        self._check(target, key)

    def bring(self, device: Device, target: torch.Tensor, key: int, low: int, high: int) -> None:
        """Read bytes of an expert into `target`; a whole one is checked where it arrives in host memory."""
        super().bring(device, target, key, low, high)
        if high - low == self.slot_bytes and not device.asynchronous:
            self._check(target[low:high], key)

    def _check(self, found: torch.Tensor, key: int) -> None:
        if checksum(found) != self._sums[key]:
            raise DamagedStore(
                f"expert {key} on disk is not what was written there", "check the disk, then run it again"
            )


class _Summed(ExpertStore):
    """A store whose experts' checksums are noted as they are handed out."""

    def __init__(self, source: ExpertStore, sums: dict[int, int]) -> None:
        super().__init__(
            source.layout,
            source.activation,
            torch.zeros(source.slot_bytes, dtype=torch.uint8),
            num_keys=source.num_keys,
        )
        self._source, self._sums = source, sums

    def bytes_of(self, key: int) -> torch.Tensor:
        """Return uint8 [slot_bytes] of an expert."""
        found = self._source.bytes_of(key)
        self._sums[key] = checksum(found)
        return found


def checksum(found: torch.Tensor) -> int:
    """Return the checksum of an expert's bytes, uint8 [num_bytes].

    Words of 64 bits are added up by columns, and the sums get a CRC: that passes over the bytes ten times as fast as a CRC of all of them,
    which took as long as reading them from a quick disk. One wrong word is always found. Rows of a prime number of words are no
    multiple of a page, so pages that have changed places are found too.
    """
    plain = found.numpy()
    whole = len(plain) // _ROW_BYTES * _ROW_BYTES
    rows = plain[:whole].view(np.uint64).reshape(-1, _ROW_WORDS)
    return zlib.crc32(plain[whole:].data, zlib.crc32(rows.sum(axis=0).data))


def require_room(what: str, needed: int, have: int) -> None:
    """Return nothing; raises DoesNotFit with the bytes that are missing."""
    if needed > have:
        raise DoesNotFit(f"{what} needs {needed} bytes, of {have}", needed - have)


def _parts(assembled: Assembled, key: int) -> dict[str, torch.Tensor]:
    column, expert = divmod(key, assembled.spec.num_experts)
    return assembled.checkpoint.expert(assembled.layers[column].number, expert, assembled.layout)
