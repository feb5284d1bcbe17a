"""Opening `.pt` files: the only reader that touches torch, and nothing in such a file is ever run.

Modelled: archives written by `torch.save`, opened with `torch.load(weights_only=True)`, which builds tensors and
plain containers only. Before torch sees a file, its checksums, its unpacked size and the names its pickle mentions
are checked, so that only plain tensors are built. Ignored: the format of torch before 1.6, quantised and sparse
tensors (refused).
"""

from __future__ import annotations

import os
import pickletools
import warnings
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt

from ....base.errors import InputError
from ....base.text_files import refuse_devices
from ....base.units import GIB, format_bytes
from ...files.npy import BROKEN_ZIP, MAX_UNPACKED_BYTES
from ...files.refusal import unreadable

_MAX_PICKLE_BYTES = GIB
_REMEDY = "give the file as the engine saved it"
_ALLOWED = frozenset({"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "collections OrderedDict"})
# Opcodes that import a name in a way other than GLOBAL, or call something other than what GLOBAL named.
_REFUSED_OPCODES = frozenset({"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "BUILD"})


def load_pt(path: str | os.PathLike[str]) -> Any:
    """Return what a `.pt` file holds: containers, numbers, strings and torch tensors in host memory.

    Raises InputError when torch is not installed, when the file is damaged, or when it holds anything but plain data.
    """
    _check_archive(path)
    try:
        import torch
    except ImportError:
        rule = "reading .pt files needs torch, which is not installed"
        raise InputError("path", str(path), rule, "install moeplan[run], or convert the file elsewhere") from None
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (torch documents no list of what a damaged file raises)
        raise unreadable(path, "cannot be read as plain tensors", error, _REMEDY) from None


def tensor_array(value: object, name: str) -> npt.NDArray[Any]:
    """Return a tensor that `load_pt` gave as a numpy array (bfloat16 as float32).

    Raises InputError for anything else.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise InputError(name, type(value).__name__, "must be a tensor", _REMEDY)
    tensor = value.detach()
    if tensor.numel() * tensor.element_size() > max(1, tensor.untyped_storage().nbytes()):
        raise InputError(name, tuple(tensor.shape), "claims more numbers than it stores", _REMEDY)
    try:
        array: npt.NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    except (TypeError, RuntimeError) as error:
        raise InputError(name, str(tensor.dtype), f"cannot be read as numbers ({error})", _REMEDY) from None
    if array.dtype.kind not in "biuf":
        raise InputError(name, str(array.dtype), "must hold numbers", _REMEDY)
    return np.ascontiguousarray(array)


def _check_archive(path: str | os.PathLike[str]) -> None:
    """Raise InputError unless `path` is an intact archive of `torch.save` that mentions nothing but plain tensors."""
    try:
        refuse_devices(path, pipes=False)
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if total > MAX_UNPACKED_BYTES:
                raise ValueError(f"unpacks to {format_bytes(total)}")
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} is damaged")
            pickles = [member for member in members if member.filename.endswith("data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE_BYTES:
                raise ValueError("not an archive of torch.save")
            for member in members:
                if member.filename.endswith("/byteorder") and archive.read(member) != b"little":
                    raise ValueError("not in little-endian byte order")
            _check_pickle(archive.read(pickles[0]))
    except BROKEN_ZIP as error:
        raise unreadable(path, "cannot be read as plain tensors", error, _REMEDY) from None


def _check_pickle(data: bytes) -> None:
    """Raise ValueError when a pickle names anything that plain tensors do not need. Parses only; runs nothing."""
    with warnings.catch_warnings(action="ignore"):  # the parser warns about odd escapes in damaged strings
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in _REFUSED_OPCODES:
                raise ValueError(f"holds {opcode.name}, so more than plain tensors")
            if opcode.name == "GLOBAL" and not _plain(str(argument)):
                raise ValueError(f"mentions {argument}, so more than plain tensors")


def _plain(name: str) -> bool:
    """Return whether a pickle of plain tensors may mention `name` ("module attribute")."""
    module, _, attribute = name.partition(" ")
    storage = module in ("torch", "torch.storage") and attribute.endswith("Storage") and attribute.isidentifier()
    dtype = module == "torch" and attribute in ("uint16", "uint32", "uint64")
    return name in _ALLOWED or storage or dtype
