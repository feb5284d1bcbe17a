"""Reader of TensorRT-LLM's expert statistics: a folder with `meta_info.json` and a safetensors file of counts per rank.

Modelled: tensors named "{iteration}_{layer}" that hold the tokens per expert a rank counted; ranks are added up,
windows are iterations. Ignored: the raw selections (`rank*_raw.safetensors`) and token counts that newer versions can
add.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from ....base.errors import InputError
from ....base.text_files import refuse_devices
from ...files.json_input import read_json
from ...files.refusal import unreadable
from ...recording import LoadProfile
from ...validate import MAX_EXPERTS, MAX_LAYERS, MAX_TOP_K
from ..account import Account, layer_ranges
from ..assemble import check_budget, load_of_counts, whole_numbers

_KEY = re.compile(r"([0-9]{1,12})_([0-9]{1,6})\Z")
_RANK = re.compile(r"rank[0-9]{1,9}\.safetensors\Z")
_REMEDY = "give the folder as TensorRT-LLM wrote it"


def read_trtllm(path: str | os.PathLike[str], *, model: str = "", source: str = "", licence: str = "") -> LoadProfile:
    """Return the loads of an expert-statistics folder.

    Raises InputError when a file is missing, damaged or inconsistent.
    """
    folder = Path(path)
    meta = read_json(folder / "meta_info.json")
    num_experts, top_k = _meta(meta, "num_experts", MAX_EXPERTS), _meta(meta, "num_experts_per_token", MAX_TOP_K)
    files = sorted(file for file in folder.iterdir() if _RANK.match(file.name))
    if not files:
        raise InputError("path", str(path), "has no rank*.safetensors file", _REMEDY)
    counted: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
    account = Account()
    seen: list[dict[str, npt.NDArray[Any]]] = []
    for file in files:
        tensors = _tensors(file)
        if tensors and any(_same(tensors, other) for other in seen):
            account.note("ranks that counted the same tokens (tensor parallelism) are read once")
            continue
        seen.append(tensors)
        check_budget(sum(array.nbytes for other in seen for array in other.values()))
        for name, array in tensors.items():
            match = _KEY.match(name)
            if match is None:
                raise InputError(file.name, name, 'tensors must be named "{iteration}_{layer}"', _REMEDY)
            if array.shape != (num_experts,):
                raise InputError(f"{file.name}: {name}", array.shape, f"must hold {num_experts} counts", _REMEDY)
            key = (int(match[1]), int(match[2]))
            counted[key] = whole_numbers(array, f"{file.name}: {name}") + counted.get(key, 0)
    ranks = [int(file.name[len("rank") :].partition(".")[0]) for file in files]
    absent = sorted(set(range(max(ranks) + 1)) - set(ranks))
    if absent:
        account.note(f"no file of rank {layer_ranges(absent)}: with attention data parallelism its tokens are missing")
    iterations = sorted({iteration for iteration, _ in counted})
    layers = sorted({layer for _, layer in counted})
    if not counted or len(layers) > MAX_LAYERS:
        raise InputError("path", str(path), f"must count 1 to {MAX_LAYERS} layers", _REMEDY)
    check_budget(8 * len(iterations) * len(layers) * num_experts)
    counts = np.zeros((len(iterations), len(layers), num_experts), dtype=np.int64)
    at = {value: i for i, value in enumerate(iterations)}, {value: i for i, value in enumerate(layers)}
    for (iteration, layer), array in counted.items():
        counts[at[0][iteration], at[1][layer]] = array
    return load_of_counts(
        counts,
        source=source or f"TensorRT-LLM expert statistics: {folder.name}",
        model=model,
        licence=licence,
        top_k=top_k,
        layer_ids=layers,
        window_unit="iteration",
        account=account,
    )


def _same(tensors: dict[str, npt.NDArray[Any]], other: dict[str, npt.NDArray[Any]]) -> bool:
    """Return whether two ranks counted the same tokens."""
    return tensors.keys() == other.keys() and all(np.array_equal(array, other[name]) for name, array in tensors.items())


def _tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the tensors of one rank's file. Raises InputError."""
    try:
        refuse_devices(path, pipes=False)
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise unreadable(path.name, "cannot be read as a safetensors file of numbers", error, _REMEDY) from None


def _meta(meta: object, name: str, most: int) -> int:
    """Return an integer of `meta_info.json`. Raises InputError."""
    value = meta.get(name) if isinstance(meta, dict) else None
    if type(value) is not int or not (1 <= value <= most):
        raise InputError(f"meta_info.json: {name}", value, f"must be 1 to {most}", _REMEDY)
    return value
