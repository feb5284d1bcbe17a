"""Reading and writing safetensors files without holding them in memory.

Modelled: the container format (eight bytes of header length, a JSON header, tensors back to back), arrays that map
the file, tensors appended chunk by chunk, and files that appear under their name only when complete. The safetensors
library judges every header, read or written; only what it cannot do is done here: map tensors for numpy without a
copy, write what is larger than memory, and put header strings in a fixed order so that equal recordings are equal
files. Ignored: data types a recording never holds.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from ...base.text_files import part_folder, refuse_devices, written_aside
from ...base.units import MEGA, MIB
from .refusal import unreadable

# safetensors names of the types a recording holds, in the order their tensors are laid out: widest first, so that
# every tensor starts at a multiple of its own item size whatever the number of rows.
_TYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "U8": np.dtype("u1"),
}
_MAX_HEADER_BYTES = 100 * MEGA  # the library's own limit
_COPY_BYTES = 4 * MIB


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, npt.NDArray[Any]]]:
    """Return (header strings, tensors by name); the tensors are read-only arrays over the mapped file.

    Raises InputError when the file is missing, is not a complete safetensors file, or holds types no recording has.
    """
    try:
        refuse_devices(path, pipes=False)
        _ask_library(path)
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(mapped[:8], "little")
        if length > min(_MAX_HEADER_BYTES, len(mapped) - 8):
            raise ValueError(f"announces a header of {length} bytes")
        header = json.loads(mapped[8 : 8 + length])
        strings = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in strings.values()):
            raise ValueError("header strings must be strings")
        return dict(strings), _views(mapped, 8 + length, header)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        rule, remedy = "cannot be read as a safetensors file", "give a complete recording, or import it first"
        raise unreadable(path, rule, error, remedy) from None


def _ask_library(path: str | os.PathLike[str]) -> None:
    """Raise ValueError when the safetensors library refuses a file; without the library, return."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:  # a machine that only measures may lack it; the checks of `_views` suffice to be safe
        return
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def _views(mapped: mmap.mmap, start: int, header: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """Return tensors by name as arrays over the mapped file; raises ValueError unless they fill it without gap or overlap."""
    tensors = {}
    expected = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (first, last) = _TYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if dtype is None:
            raise ValueError(f"tensor {name!r} has type {entry['dtype']}; recordings hold {', '.join(_TYPES)}")
        if any(type(size) is not int or size < 0 for size in (*shape, first, last)):
            raise ValueError(f"tensor {name!r} has a shape or offsets that are no sizes")
        if first != expected or last - first != math.prod(shape) * dtype.itemsize or start + last > len(mapped):
            raise ValueError(f"tensor {name!r} does not lie where its shape and the tensor before say")
        if (start + first) % dtype.itemsize:
            raise ValueError(f"tensor {name!r} is not aligned to its item size")
        flat = np.frombuffer(mapped, dtype=dtype, count=(last - first) // dtype.itemsize, offset=start + first)
        tensors[name] = flat.reshape(shape)
        expected = last
    if start + expected != len(mapped):
        raise ValueError("has bytes after the last tensor")
    return tensors


class TensorAppender:
    """Writes one safetensors file whose tensors grow along their first axis, holding only what is being appended.

    Each tensor collects in a file beside the target; `finish` joins them. Use it as a context: leaving without `finish`
    leaves nothing behind.
    """

    def __init__(
        self, path: str | os.PathLike[str], columns: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
    ) -> None:
        """Open the columns, given as name → (dtype, shape of one row).

        Raises InputError when the folder is no place to write.
        """
        self._path = Path(path)
        code = {dtype: name for name, dtype in _TYPES.items()}
        self._columns = {name: (code[np.dtype(dtype).newbyteorder("<")], row) for name, (dtype, row) in columns.items()}
        self._order = sorted(self._columns, key=lambda name: (list(_TYPES).index(self._columns[name][0]), name))
        self._rows = dict.fromkeys(self._columns, 0)
        self._held = ExitStack()
        folder = self._held.enter_context(part_folder(self._path, "path"))
        self._files = {
            name: self._held.enter_context((folder / str(i)).open("w+b")) for i, name in enumerate(self._order)
        }

    def append(self, name: str, rows: npt.NDArray[Any]) -> None:
        """Append `rows` [num_rows, *row shape] to tensor `name`; raises InputError when the disk refuses."""
        code, shape = self._columns[name]
        if rows.shape[1:] != shape:
            raise InputError(name, rows.shape, f"rows must have shape {shape}", "append rows like the first ones")
        try:
            np.ascontiguousarray(rows, dtype=_TYPES[code]).tofile(self._files[name])
        except OSError as error:
            raise InputError("path", str(self._path), f"cannot be written ({error})", "free space") from None
        self._rows[name] += rows.shape[0]

    def finish(self, strings: Mapping[str, str], check: Callable[[str], object] | None = None) -> None:
        """Return when the file stands under its name, with `strings` in its header and every byte in place.

        `check` sees the complete file (by its temporary path) first: when it raises, nothing appears.
        """
        header: dict[str, Any] = {"__metadata__": dict(sorted(strings.items()))}
        offset = 0
        for name in self._order:
            code, shape = self._columns[name]
            size = self._rows[name] * int(np.prod(shape, dtype=np.int64)) * _TYPES[code].itemsize
            header[name] = {
                "dtype": code,
                "shape": [self._rows[name], *shape],
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % 8)
        with written_aside(self._path, "path") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in self._order:
                self._files[name].seek(0)
                shutil.copyfileobj(self._files[name], out, _COPY_BYTES)
            out.flush()
            (check or read_tensors)(out.name)
        self.discard()

    def discard(self) -> None:
        """Drop everything that was appended and not finished."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def write_tensors(
    path: str | os.PathLike[str], strings: Mapping[str, str], tensors: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Write whole tensors as one safetensors file, atomically and always with the same bytes."""
    columns = {name: (tensor.dtype, tensor.shape[1:]) for name, tensor in tensors.items()}
    with TensorAppender(path, columns) as out:
        for name, tensor in tensors.items():
            out.append(name, tensor)
        out.finish(strings)
