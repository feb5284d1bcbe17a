"""A small, bounds-checked reader of GGUF files: key–value strings and 32-bit float tensors, nothing else.

Modelled: GGUF versions 2 and 3, little-endian: header, key–value pairs, tensor table, aligned data. Every length is
checked against what is left of the file before it is believed. Ignored: quantised tensors (listed, not decoded),
big-endian files, version 1.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from ...base.text_files import refuse_devices
from ...base.units import GIB, MIB, format_bytes
from .refusal import unreadable

_MAX_FILE_BYTES = 4 * GIB
_MAX_STRING_BYTES = 16 * MIB
_MAX_DEPTH = 4
_MAX_ENTRIES = 4_000_000  # of all arrays together; a tokenizer has a few hundred thousand
_MAX_DIMENSIONS = 4
_FLOAT32 = 0  # ggml type of the only tensors read
# struct formats of GGUF's scalar value types 0 to 7 and 10 to 12; 8 is a string, 9 an array.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_REMEDY = "give a complete GGUF file"


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One entry of the tensor table."""

    shape: tuple[int, ...]
    """Sizes, fastest-running axis first, as GGUF stores them."""
    kind: int
    """ggml type number; 0 is 32-bit float."""
    start: int
    """First byte in the file."""


class GgufFile:
    """A GGUF file held in memory: `values` by key, `tensors` by name."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read header and tables. Raises InputError when the file is missing, damaged or of another version."""
        try:
            size = os.path.getsize(path)
            if size > _MAX_FILE_BYTES:
                raise ValueError(f"{format_bytes(size)} is more than {format_bytes(_MAX_FILE_BYTES)}")
            refuse_devices(path, pipes=False)
            with open(path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._at = self._entries = 0
            self.values: dict[str, Any] = {}
            self.tensors: dict[str, GgufTensor] = {}
            self._read_tables()
        except (OSError, ValueError, struct.error, MemoryError, OverflowError) as error:
            raise unreadable(path, "cannot be read as GGUF", error, _REMEDY) from None

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor of 32-bit floats, slowest-running axis first. Raises InputError when it is not that."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.kind != _FLOAT32:
            raise InputError(
                name, "missing" if tensor is None else tensor.kind, "must be a tensor of 32-bit floats", _REMEDY
            )
        count = int(np.prod(tensor.shape, dtype=np.int64))
        if tensor.start + 4 * count > len(self._data):
            raise InputError(name, tensor.shape, "reaches beyond the end of the file", _REMEDY)
        flat = np.frombuffer(self._data, dtype="<f4", count=count, offset=tensor.start)
        return flat.reshape(tensor.shape[::-1])

    def _read_tables(self) -> None:
        """Read everything before the tensor data."""
        if self._bytes(4) != b"GGUF":
            raise ValueError("does not start with GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not 2 or 3")
        num_tensors, num_values = self._count(24), self._count(13)
        for _ in range(num_values):
            key = self._string()
            self.values[key] = self._value(self._number("<I"), 0)
        table = []
        for _ in range(num_tensors):
            name = self._string()
            dimensions = self._number("<I")
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
            shape = tuple(self._number("<Q") for _ in range(dimensions))
            product = 1
            for length in shape:
                product *= length
            if product > len(self._data) * 8:  # no type packs more than eight numbers into a byte
                raise ValueError(f"tensor {name!r} of shape {shape} is larger than the file")
            table.append((name, shape, self._number("<I"), self._number("<Q")))
        alignment = self.values.get("general.alignment", 32)
        if type(alignment) is not int or not (1 <= alignment <= MIB):
            raise ValueError(f"alignment {alignment!r} is not 1 to {MIB}")
        start = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in table:
            if name in self.tensors:
                raise ValueError(f"tensor {name!r} occurs twice")
            self.tensors[name] = GgufTensor(shape=shape, kind=kind, start=start + offset)

    def _value(self, kind: int, depth: int) -> Any:
        """Return one key's value."""
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            if depth >= _MAX_DEPTH:
                raise ValueError("arrays nested too deeply")
            inner = self._number("<I")
            count = self._count(1)
            self._entries += count
            if self._entries > _MAX_ENTRIES:
                raise ValueError(f"announces {self._entries} values in arrays, more than {_MAX_ENTRIES}")
            return [self._value(inner, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        return self._number(_SCALARS[kind])

    def _count(self, least_bytes: int) -> int:
        """Return a length; each of so many entries takes at least `least_bytes` of the rest of the file."""
        count: int = self._number("<Q")
        if count > (len(self._data) - self._at) // least_bytes:
            raise ValueError(f"announces {count} entries, more than the file can hold")
        return count

    def _string(self) -> str:
        """Return a string."""
        length: int = self._number("<Q")
        if length > _MAX_STRING_BYTES:
            raise ValueError(f"announces a string of {length} bytes")
        return self._bytes(length).decode("utf-8")

    def _number(self, form: str) -> Any:
        """Return one packed number."""
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _bytes(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        if count > len(self._data) - self._at:
            raise ValueError(f"ends {count - len(self._data) + self._at} bytes early")
        self._at += count
        return self._data[self._at - count : self._at]
