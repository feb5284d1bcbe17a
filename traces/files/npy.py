"""Reading `.npy` and `.npz` files that a stranger wrote, within a byte budget and without running anything.

Modelled: both containers as numpy writes them. Sizes are checked before anything is allocated: the header's shape must
account for the bytes that are there, and archives may not unpack to more than the budget. Ignored: object arrays, which
would need unpickling (refused), structured types (refused).
"""

from __future__ import annotations

import ast
import lzma
import os
import re
import struct
import sys
import warnings
import zipfile
import zlib
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ...base.text_files import refuse_devices
from ...base.units import GIB, KIB, format_bytes
from .refusal import unreadable

MAX_UNPACKED_BYTES = GIB
_MAX_HEADER_BYTES = 64 * KIB
_MAX_AXES = 8
_REMEDY = "give a complete file without pickled objects"
_PLAIN = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|U[1-9][0-9]{0,5})\Z")  # booleans, integers, floats, short texts
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
    """Return the array in a `.npy` file.

    Raises InputError when it is missing, damaged, too large or needs unpickling.
    """
    try:
        refuse_devices(path, pipes=False)
        with open(path, "rb") as file:
            return read_npy_stream(file, os.fstat(file.fileno()).st_size, max_bytes)
    except _BROKEN as error:
        raise unreadable(path, "cannot be read as a .npy file of plain numbers", error, _REMEDY) from None


def read_npz(path: str | os.PathLike[str], max_bytes: int = MAX_UNPACKED_BYTES) -> dict[str, npt.NDArray[Any]]:
    """Return every array of a `.npz` archive by name. Raises InputError as `read_npy` does."""
    try:
        refuse_devices(path, pipes=False)
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
        raise unreadable(path, "cannot be read as a .npz archive of plain arrays", error, _REMEDY) from None


def read_npy_stream(stream: IO[bytes], num_bytes: int, max_bytes: int = MAX_UNPACKED_BYTES) -> npt.NDArray[Any]:
    """Return the array a stream of `num_bytes` holds. Raises ValueError (or OSError) when it is not a plain array."""
    if num_bytes > max_bytes:
        raise ValueError(f"{format_bytes(num_bytes)}, more than the budget of {format_bytes(max_bytes)}")
    shape, fortran_order, dtype = _header(stream)
    count = 1
    for size in shape:
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
    if dtype.kind == "U" and count and int(values.view(f"{dtype.byteorder}u4").max()) > sys.maxunicode:
        raise ValueError("holds text with a character that does not exist")  # Python would fail when it is looked at
    return values.reshape(shape, order="F" if fortran_order else "C")


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return (shape, whether the first axis runs fastest, type) of an array. Raises ValueError when it is not plain.

    numpy's own header reader repairs headers of Python 2 with a tokenizer that fails in many ways; this one does not.
    """
    lead = stream.read(8)
    width = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4, b"\x93NUMPY\x03\x00": 4}.get(lead)
    if width is None:
        raise ValueError("does not start like a .npy array")
    length = int.from_bytes(stream.read(width), "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"announces a header of {length} bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("error", SyntaxWarning)  # an odd escape in a damaged header is a refusal, not a remark
        header = ast.literal_eval(stream.read(length).decode("utf-8").strip())
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise ValueError("has no proper header")
    descr, shape = header["descr"], header["shape"]
    if not isinstance(descr, str) or not _PLAIN.match(descr):
        raise ValueError(f"type {descr!r} is not a plain number or text")
    if not isinstance(shape, tuple) or len(shape) > _MAX_AXES or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"shape {shape} is not a shape")
    return shape, bool(header["fortran_order"]), np.dtype(descr)
