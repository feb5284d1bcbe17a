"""The header of a GGUF file: keys, and the table of tensors. No tensor is read, whatever the file's size.

Modelled: versions 2 and 3, little-endian, as ggml's docs/gguf.md lays them out; long arrays (a tokenizer's words) are counted and
passed over. Every length is checked against what is left of the file and against what a header can sensibly hold, before memory is
taken for it. Ignored: big-endian files, version 1, tensor data.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from .text_files import refuse_devices
from .units import MIB

_MAX_HEADER_BYTES = 256 * MIB
_MAX_STRING_BYTES = 16 * MIB
_MAX_KEYS, _MAX_TENSORS = 1 << 16, 1 << 17
_MAX_DEPTH, _MAX_DIMENSIONS = 4, 4
_KEPT_ENTRIES = 8192
"""An array of more is only counted: no list of layers is that long."""
_MAX_WEIGHTS = 1 << 50
# struct formats of GGUF's scalar value types 0 to 7 and 10 to 12; 8 is a string, 9 an array.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One entry of the tensor table."""

    shape: tuple[int, ...]
    """Sizes, fastest-running axis first, as GGUF stores them."""
    kind: int
    """Number of the ggml type."""
    offset: int
    """First byte, from the start of the tensor data."""

    @property
    def num_weights(self) -> int:
        """Numbers in the tensor."""
        product = 1
        for length in self.shape:
            product *= length
        return product


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What stands before the tensor data."""

    values: dict[str, Any]
    """By key; arrays too long to be about layers are left out."""
    tensors: dict[str, Tensor]
    data_start: int
    """First byte of the tensor data in the file."""
    data_bytes: int
    """Bytes of the file after the header."""


def read_header(path: str | os.PathLike[str]) -> Header:
    """Return the header of the file at `path`; raises OSError or ValueError, with the reason, where it has none or a damaged one."""
    refuse_devices(path, pipes=False)
    with open(path, "rb") as file:
        return _Reader(file, os.fstat(file.fileno()).st_size).header()


class _Reader:
    """A file, how far it was read, and how much of it may be."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._at = file, size, 0

    def header(self) -> Header:
        if self._bytes(4) != b"GGUF":
            raise ValueError("does not start with GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not 2 or 3")
        num_tensors, num_values = self._count(24, _MAX_TENSORS, "tensors"), self._count(13, _MAX_KEYS, "keys")
        values: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._string()
            value = self._value(self._number("<I"), 0)
            if value is not None:
                values[key] = value
        tensors: dict[str, Tensor] = {}
        for _ in range(num_tensors):
            name, dimensions = self._string(), self._number("<I")
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
            shape = tuple(self._number("<Q") for _ in range(dimensions))
            tensor = Tensor(shape=shape, kind=self._number("<I"), offset=self._number("<Q"))
            if name in tensors:
                raise ValueError(f"tensor {name!r} occurs twice")
            if not 0 < tensor.num_weights <= _MAX_WEIGHTS:
                raise ValueError(f"tensor {name!r} of shape {shape} cannot be")
            tensors[name] = tensor
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= MIB:
            raise ValueError(f"alignment {alignment!r} is not 1 to {MIB}")
        start = -(-self._at // alignment) * alignment
        return Header(values=values, tensors=tensors, data_start=start, data_bytes=max(0, self._size - start))

    def _value(self, kind: int, depth: int) -> Any:
        """Return one key's value, None for an array that is only counted."""
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"unknown value type {kind}")
        if depth >= _MAX_DEPTH:
            raise ValueError("arrays nested too deeply")
        inner = self._number("<I")
        each = struct.calcsize(_SCALARS[inner]) if inner in _SCALARS else 8 if inner == _STRING else 12
        count = self._count(each, _MAX_HEADER_BYTES // each, "values in an array")
        if count <= _KEPT_ENTRIES:
            return [self._value(inner, depth + 1) for _ in range(count)]
        if inner in _SCALARS:
            self._skip(each * count)
        else:
            for _ in range(count):
                self._pass(inner, depth + 1)
        return None

    def _pass(self, kind: int, depth: int) -> None:
        """Read past one entry of a long array."""
        if kind == _STRING:
            self._skip(self._length())
        else:
            self._value(kind, depth)

    def _count(self, least_bytes: int, most: int, what: str) -> int:
        """Return a length; each of so many entries takes at least `least_bytes` of the rest of the file."""
        count: int = self._number("<Q")
        if count > (self._size - self._at) // least_bytes:
            raise ValueError(f"announces {count} {what}, more than the file can hold")
        if count > most:
            raise ValueError(f"announces {count} {what}, more than {most}")
        return count

    def _length(self) -> int:
        length: int = self._number("<Q")
        if length > _MAX_STRING_BYTES:
            raise ValueError(f"announces a string of {length} bytes")
        return length

    def _string(self) -> str:
        return self._bytes(self._length()).decode("utf-8")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _bytes(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        self._go(count)
        found = self._file.read(count)
        if len(found) < count:
            raise ValueError("ends early")
        return found

    def _skip(self, count: int) -> None:
        self._go(count)
        self._file.seek(count, os.SEEK_CUR)

    def _go(self, count: int) -> None:
        if count > self._size - self._at:
            raise ValueError(f"ends {count - self._size + self._at} bytes early")
        self._at += count
        if self._at > _MAX_HEADER_BYTES:
            raise ValueError(f"its header is longer than {_MAX_HEADER_BYTES // MIB} MiB")
