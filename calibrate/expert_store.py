"""Where all experts live: host memory, page-locked where that means anything, or a file on disk as a third tier.

Modelled: every expert is one run of bytes laid out as a slot, so moving an expert is copying bytes. Weights are
random, drawn from a seed and quantised as the format asks. Ignored: reading real checkpoints.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch

from ..errors import InputError
from ..kernels.activation import Activation, activation
from ..kernels.expert_weights import ExpertWeights, slot_views, write_slot
from ..kernels.slot_layout import ExpertShape, SlotLayout, slot_layout
from ..specs import ModelSpec
from ..units import NS_PER_S
from .device import Device, Mark

# The activation of experts in models of these families; every other gated model uses SwiGLU, every other plain one ReLU.
_ACTIVATIONS = {"gpt_oss": "clamped-swiglu"}
_NUM_BOUNCES = 2


def expert_layout(model: ModelSpec, weights: str) -> SlotLayout:
    """Return how one of `model`'s experts lies in a slot when stored as `weights`; raises UnknownName or InputError."""
    shape = ExpertShape(
        hidden_size=model.hidden_size,
        intermediate_size=model.expert_intermediate_size,
        gated=model.gated,
        bias=model.expert_bias,
    )
    return slot_layout(shape, weights)


def expert_activation(model: ModelSpec) -> Activation:
    """Return the function between an expert's matrices."""
    return activation(_ACTIVATIONS.get(model.family, "swiglu" if model.gated else "relu"))


class ExpertStore:
    """All experts in host memory: `num_keys` slots of bytes."""

    def __init__(
        self, layout: SlotLayout, function: Activation, memory: torch.Tensor, device: Device | None = None
    ) -> None:
        self.layout, self.activation = layout, function
        self.slot_bytes = layout.slot_bytes
        self._device = device
        self._aside: torch.Tensor | None = None
        self._slots = memory.view(-1, self.slot_bytes)

    @property
    def num_keys(self) -> int:
        """Experts held."""
        return self._slots.shape[0]

    def weights(self) -> ExpertWeights:
        """Return all experts as matrices, expert `key` in slot `key`."""
        return slot_views(self._slots.view(-1), self.layout, self.activation)

    def bytes_of(self, key: int) -> torch.Tensor:
        """Return uint8 [slot_bytes] of an expert."""
        return self._slots[key]

    def bring(self, device: Device, target: torch.Tensor, key: int, low: int, high: int) -> None:
        """Copy bytes `low` to `high` of expert `key` to the same bytes of `target`, on the thread's stream."""
        device.copy(target[low:high], self._slots[key, low:high])

    def take_back(self, device: Device, source: torch.Tensor, key: int, *, aside: bool = False) -> None:
        """Copy a slot's bytes back into expert `key`'s place, on the thread's stream; with `aside`, to where nobody reads them."""
        if aside and self._aside is None:
            self._aside = device.host_memory(self.slot_bytes, pinned=True, what="a buffer beside the store")
        device.copy(self._slots[key] if self._aside is None or not aside else self._aside, source)

    def close(self) -> None:
        """Let go of the memory, and unlock it where a device gave it."""
        if self._device is not None:
            self._device.release_host(self._slots.view(-1))
            if self._aside is not None:
                self._device.release_host(self._aside)
        self._slots = torch.empty(0, self.slot_bytes, dtype=torch.uint8)


class DiskStore(ExpertStore):
    """All experts in a file; pieces are read when they are needed, past the page cache where the system allows dropping it."""

    def __init__(self, source: ExpertStore, folder: Path | None = None, *, drop_cache: bool = True) -> None:
        super().__init__(source.layout, source.activation, torch.empty(0, dtype=torch.uint8))
        self._count = source.num_keys
        self._drop = drop_cache and hasattr(os, "posix_fadvise")
        self._file = tempfile.NamedTemporaryFile(dir=folder, prefix="moeplan-experts-")  # noqa: SIM115 - closed by `close`
        for key in range(source.num_keys):
            self._file.write(source.bytes_of(key).numpy().data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._bounces: list[tuple[torch.Tensor, Mark | None]] = []

    @property
    def num_keys(self) -> int:
        """Experts held."""
        return self._count

    def weights(self) -> ExpertWeights:
        """Refuse: the experts are not in memory."""
        raise InputError("store", "disk", "its experts are not in memory", "keep the store they were written from")

    def bring(self, device: Device, target: torch.Tensor, key: int, low: int, high: int) -> None:
        """Read bytes `low` to `high` of expert `key` into the same bytes of `target`."""
        begin, size = key * self.slot_bytes + low, high - low
        if device.asynchronous:
            self._device = device
            if len(self._bounces) == _NUM_BOUNCES:
                bounce, copied = self._bounces.pop(0)
                if copied is not None:
                    copied.wait()
            else:
                bounce = device.host_memory(self.slot_bytes, pinned=True, what="a disk buffer")
            self._read(bounce[:size], begin)
            device.copy(target[low:high], bounce[:size])
            self._bounces.append((bounce, device.mark()))
        else:
            self._read(target[low:high], begin)

    def take_back(self, device: Device, source: torch.Tensor, key: int, *, aside: bool = False) -> None:
        """Refuse: the file is only read."""
        raise InputError(
            "copy.write_back",
            True,
            "experts on disk are only read",
            "set copy.write_back=false, or keep them in memory",
        )

    def close(self) -> None:
        """Delete the file, and unlock the buffers."""
        for bounce, copied in self._bounces:
            if copied is not None:
                copied.wait()
            if self._device is not None:
                self._device.release_host(bounce)
        self._bounces.clear()
        self._file.close()

    def read_s(self, target: torch.Tensor, key: int) -> float:
        """Return the seconds that reading expert `key` into uint8 `target` [slot_bytes] takes, past the cache if that is dropped."""
        begin = key * self.slot_bytes
        if self._drop:
            os.posix_fadvise(self._file.fileno(), begin, self.slot_bytes, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter_ns()
        self._read(target, begin)
        return (time.perf_counter_ns() - started) / NS_PER_S

    def _read(self, target: torch.Tensor, begin: int) -> None:
        view = target.numpy().data
        done = 0
        while done < len(view):
            got = os.preadv(self._file.fileno(), [view[done:]], begin + done)
            if got == 0:
                raise OSError(f"the expert file ends at byte {begin + done}")
            done += got
        if self._drop:
            os.posix_fadvise(self._file.fileno(), begin, len(view), os.POSIX_FADV_DONTNEED)


def make_store(
    model: ModelSpec,
    weights: str,
    device: Device,
    *,
    num_keys: int,
    pinned: bool = True,
    distinct: int | None = None,
    seed: int = 0,
) -> ExpertStore:
    """Return a store of `num_keys` experts with random weights.

    distinct: draw only so many experts and repeat their bytes (each key still has memory of its own); None draws all.
    Raises DoesNotFit where the host has too little memory.
    """
    layout, function = expert_layout(model, weights), expert_activation(model)
    memory = device.host_memory(num_keys * layout.slot_bytes, pinned=pinned, what=f"the store of {num_keys} experts")
    memory.zero_()  # gaps between parts have defined bytes, and every page is touched before anything is timed
    store = ExpertStore(layout, function, memory, device)
    drawn = num_keys if distinct is None else min(distinct, num_keys)
    views = store.weights()
    # Drawn and packed where that is fast; what is drawn depends on the kind of device.
    place = device.place
    generator = torch.Generator(device=place).manual_seed(seed)
    for key in range(drawn):
        biases = {}
        matrices = {}
        for name, (num_rows, num_columns) in layout.shape.matrices.items():
            matrices[name] = torch.randn(num_rows, num_columns, generator=generator, device=place).mul_(
                num_columns**-0.5
            )
            if layout.shape.bias:
                biases[f"{name}_bias"] = torch.randn(num_rows, generator=generator, device=place).mul_(0.1)
        write_slot(views, key, matrices["gate_up"], matrices["down"], **biases)
    for key in range(drawn, num_keys):
        store.bytes_of(key).copy_(store.bytes_of(key % drawn))
    return store
