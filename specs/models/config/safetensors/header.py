"""The header of a safetensors file: names, types, shapes and places of its tensors. No tensor is read, whatever the file's size.

Modelled: the layout of huggingface/safetensors (a length of 8 bytes, JSON, data), with its rules: no holes, no overlaps, no bytes beyond.
A file that ends where its header does will do. Every length is checked against the file before memory is taken for it. Ignored: metadata.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .....base import plain_json
from .....base.text_files import refuse_devices

_MAX_HEADER_BYTES = 100_000_000
"""As the format's own reader has it."""
_MAX_DIMENSIONS, _MAX_NUMBERS = 8, 1 << 50
# Bits of a value by the names that headers have for types.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One entry of a header."""

    kind: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def numbers(self) -> int:
        """Values in it; of packed ones, what they are packed into."""
        product = 1
        for length in self.shape:
            product *= length
        return product


def read_header(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of the file at `path`; raises OSError or ValueError, with the reason, where it has none or a damaged one."""
    refuse_devices(path, pipes=False)
    name = Path(path).name[:80]
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"{name} is shorter than the length of a header")
        (length,) = struct.unpack("<Q", start)
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{name} announces a header of {length} bytes, more than {_MAX_HEADER_BYTES}")
        if length > size - 8:
            raise ValueError(f"{name} announces a header of {length} bytes and has {size - 8}")
        text = file.read(length)
    try:
        table = plain_json.parse(text)
    except ValueError as error:
        raise ValueError(f"the header of {name} is {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"the header of {name} is no table")
    table.pop("__metadata__", None)
    places: list[tuple[int, int, str]] = []
    tensors = {}
    for key, entry in table.items():
        tensors[key], place = _tensor(key, entry)
        places.append((*place, key))
    _check_places(name, places, size - 8 - length)
    return tensors


def _tensor(key: str, entry: Any) -> tuple[Tensor, tuple[int, int]]:
    """Return a tensor, and where its data begins and ends."""
    called = f"tensor {key[:60]!r}"
    if not isinstance(entry, dict):
        raise ValueError(f"{called} is no table")
    kind: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    place: Any = entry.get("data_offsets")
    bits = _BITS.get(kind) if isinstance(kind, str) else None
    if bits is None:
        raise ValueError(f"{called} has type {str(kind)[:20]!r}, which is not known")
    if not _counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{called} has shape {str(shape)[:60]}")
    if not _counts(place) or len(place) != 2 or place[0] > place[1]:
        raise ValueError(f"{called} lies at {str(place)[:60]}")
    found = Tensor(kind=kind, shape=tuple(shape), num_bytes=place[1] - place[0])
    if found.numbers > _MAX_NUMBERS or found.numbers * bits != 8 * found.num_bytes:
        raise ValueError(f"{called} of {kind} and shape {shape} takes {found.num_bytes} bytes, which it cannot")
    return found, (place[0], place[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one <= _MAX_NUMBERS for one in value)


def _check_places(name: str, places: list[tuple[int, int, str]], data_bytes: int) -> None:
    """Return nothing; raises ValueError where tensors overlap, leave holes, or some of their data is there and some is not."""
    end = 0
    for begin, stop, key in sorted(places):
        if begin != end:
            what = "overlaps the one before it" if begin < end else "leaves a hole before it"
            raise ValueError(f"tensor {key[:60]!r} of {name} {what} ({begin}, where {end} is due)")
        end = stop
    if 0 < data_bytes < end:
        raise ValueError(f"{name} ends {end - data_bytes} bytes before its last tensor does: it is cut short")
    if data_bytes > end:
        raise ValueError(f"{name} has {data_bytes - end} bytes after its last tensor")
