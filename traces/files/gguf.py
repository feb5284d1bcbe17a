"""GGUF files of plain numbers, as an importance matrix is: their keys, and their tensors of 32-bit floats.

Modelled: what `base.gguf` reads of a header, and data that lies whole behind it. Ignored: quantised tensors (listed, not decoded).
The file is mapped, not read: its size is no matter.
"""

from __future__ import annotations

import os
import struct

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from ...base.gguf import read_header
from .refusal import unreadable

_FLOAT32 = 0  # ggml type of the only tensors read
_REMEDY = "give a complete GGUF file"


class GgufFile:
    """A GGUF file: `values` by key, `tensors` by name."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the header. Raises InputError when the file is missing, damaged or of another version."""
        try:
            self._header = read_header(path)
            self._data = (
                np.memmap(path, np.uint8, "r", self._header.data_start) if self._header.data_bytes else _NOTHING
            )
        except (OSError, ValueError, struct.error, MemoryError, OverflowError) as error:
            raise unreadable(path, "cannot be read as GGUF", error, _REMEDY) from None
        self.values, self.tensors = self._header.values, self._header.tensors

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor of 32-bit floats, slowest-running axis first. Raises InputError when it is not that."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.kind != _FLOAT32:
            raise InputError(
                name, "missing" if tensor is None else tensor.kind, "must be a tensor of 32-bit floats", _REMEDY
            )
        end = tensor.offset + 4 * tensor.num_weights
        if end > len(self._data):
            raise InputError(name, tensor.shape, "reaches beyond the end of the file", _REMEDY)
        return np.frombuffer(self._data[tensor.offset : end], dtype="<f4").reshape(tensor.shape[::-1])


_NOTHING = np.empty(0, np.uint8)
