"""Reading `.npy` and `.npz` files that a stranger wrote, within a byte budget and without running anything.

Modelled: both containers as numpy writes them. Sizes are checked before anything is allocated: the header's shape must
account for the bytes that are there, and archives may not unpack to more than the budget. Ignored: object arrays, which
would need unpickling (refused), structured types (refused).
"""

from __future__ import annotations

import lzma
import os
import struct
import zipfile
import zlib
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format

from ..errors import InputError
from ..units import GIB, KIB, format_bytes

MAX_UNPACKED_BYTES = 16 * GIB
_MAX_HEADER_BYTES = 64 * KIB
_BROKEN = (OSError, ValueError, TypeError, EOFError, OverflowError, MemoryError, RecursionError, SyntaxError)
# What Python's zip reader and decompressors raise on damaged archives.
BROKEN_ZIP = (
    *_BROKEN,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    NotImplementedError,
    RuntimeError,
    KeyError,
    IndexError,
    AssertionError,
)


def read_npy(path: str | os.PathLike[str], max_bytes: int = MAX_UNPACKED_BYTES) -> npt.NDArray[Any]:
    """Return the array in a `.npy` file. Raises InputError when it is missing, damaged, too large or needs unpickling."""
    try:
        with open(path, "rb") as file:
            return read_npy_stream(file, os.fstat(file.fileno()).st_size, max_bytes)
    except _BROKEN as error:
        raise _refused(path, "a .npy file", error) from None


def read_npz(path: str | os.PathLike[str], max_bytes: int = MAX_UNPACKED_BYTES) -> dict[str, npt.NDArray[Any]]:
    """Return every array of a `.npz` archive by name. Raises InputError as `read_npy` does."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if total > max_bytes:
                raise ValueError(f"unpacks to {format_bytes(total)}, more than the budget of {format_bytes(max_bytes)}")
            arrays = {}
            for member in members:
                with archive.open(member) as stream:
                    arrays[member.filename.removesuffix(".npy")] = read_npy_stream(stream, member.file_size, max_bytes)
            return arrays
    except BROKEN_ZIP as error:
        raise _refused(path, "a .npz archive", error) from None


def read_npy_stream(stream: IO[bytes], num_bytes: int, max_bytes: int = MAX_UNPACKED_BYTES) -> npt.NDArray[Any]:
    """Return the array a stream of `num_bytes` holds. Raises ValueError (or OSError) when it is not a plain array."""
    if num_bytes > max_bytes:
        raise ValueError(f"{format_bytes(num_bytes)}, more than the budget of {format_bytes(max_bytes)}")
    version = npy_format.read_magic(stream)
    header_of = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}.get(version)
    if header_of is None:
        raise ValueError(f"unknown .npy version {version}")
    shape, fortran_order, dtype = header_of(stream, max_header_size=_MAX_HEADER_BYTES)
    if dtype.hasobject or dtype.names is not None or dtype.kind not in "biufU" or dtype.itemsize == 0:
        raise ValueError(f"type {dtype} is not a plain number or text")
    count = 1
    for size in shape:
        if type(size) is not int or size < 0:
            raise ValueError(f"shape {shape} is not a shape")
        count *= size
    if count * dtype.itemsize > num_bytes:
        raise ValueError(f"shape {shape} of {dtype} needs more bytes than the {num_bytes} that are there")
    values = np.empty(count, dtype=dtype)
    raw = values.view(np.uint8).data if count else memoryview(b"")
    done = 0
    while done < len(raw):
        chunk = stream.read(min(len(raw) - done, 1 << 20))
        if not chunk:
            raise ValueError(f"ends after {done} of {len(raw)} bytes of array data")
        raw[done : done + len(chunk)] = chunk
        done += len(chunk)
    if stream.read(1):
        raise ValueError("has bytes after the array")
    return values.reshape(shape, order="F" if fortran_order else "C")


def _refused(path: str | os.PathLike[str], what: str, error: BaseException) -> InputError:
    """Return the InputError for a file that is not `what`."""
    rule = f"cannot be read as {what} of plain arrays ({error or type(error).__name__})"
    return InputError("path", str(path), rule, "give a complete file without pickled objects")
