"""The files of one checkpoint: those that its index names, or those that lie in its folder, and their tensors together.

Modelled: `model.safetensors.index.json`, one `model.safetensors`, numbered parts without an index. Ignored: a second copy of the weights
under other names (`consolidated…`), files of adapters.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .....base.errors import InputError, one_line
from .header import Tensor, read_header

INDEX = "model.safetensors.index.json"
_PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_MOST_FILES = 2048
_REMEDY = "give the folder of a complete checkpoint, or its config.json alone"


def files_of(path: Path, index: dict[str, Any] | None) -> list[Path]:
    """Return the weight files of the checkpoint in the folder `path`; none where only its configuration is there.

    index: what the folder's index file holds. Raises InputError where it names files that are not there, or that cannot be.
    """
    if index is not None:
        names = index.get("weight_map")
        where = os.fspath(path / INDEX)
        if not isinstance(names, dict) or not all(isinstance(one, str) for one in names.values()) or not names:
            raise InputError("model", where, "weight_map is no table of files", _REMEDY)
        wanted = sorted(set(names.values()))
        for one in wanted:
            if Path(one).name != one or not one.endswith(".safetensors"):
                raise InputError("model", where, f"names the file {one[:60]!r}, which is none beside it", _REMEDY)
        if len(wanted) > _MOST_FILES:
            raise InputError("model", where, f"names {len(wanted)} files, more than {_MOST_FILES}", _REMEDY)
        missing = [one for one in wanted if not (path / one).is_file()]
        if len(missing) == len(wanted):
            return []
        if missing:
            rule = f"{len(missing)} of the {len(wanted)} files it names are not beside it ({missing[0][:60]} …)"
            raise InputError("model", where, rule, _REMEDY)
        return [path / one for one in wanted]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    parts = sorted(one for one in path.glob("model-*.safetensors") if _PART.fullmatch(one.name))
    if not parts:
        return []
    announced = int(parts[0].name.split("-")[3].split(".")[0])
    if len(parts) != announced:
        raise InputError("model", os.fspath(path), f"{len(parts)} of {announced} parts are there", _REMEDY)
    return parts


def tensors_of(files: list[Path], index: dict[str, Any] | None) -> dict[str, Tensor]:
    """Return the tensors of all files; raises InputError with one line for what is damaged, or for what the index says otherwise."""
    found: dict[str, Tensor] = {}
    for path in files:
        try:
            tensors = read_header(path)
            if twice := found.keys() & tensors.keys():
                raise ValueError(f"two files hold tensor {min(twice)[:60]!r}")
        except (OSError, ValueError, OverflowError, MemoryError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            rule = f"cannot be read as safetensors ({one_line(reason, 240)})"
            raise InputError("model", os.fspath(path), rule, _REMEDY) from None
        found |= tensors
    if index is not None and (lost := index["weight_map"].keys() - found.keys()):
        rule = f"the index names {len(lost)} tensors that no file has ({min(lost)[:60]} …)"
        raise InputError("model", os.fspath(files[0].parent), rule, _REMEDY)
    return found
