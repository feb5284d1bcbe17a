"""Reader of bare numpy arrays of expert ids: one `.npy` of all layers, one of a layer, or a folder of one a layer.

Modelled: arrays [tokens, layers, k], or [tokens, k] for a layer whose number is the last one in the file's name; all
tokens are one request from position 0. Ignored: what such an array cannot say (requests, phases: see the options).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ....base.errors import InputError
from ...files.npy import read_npy
from ...recording import RoutingTrace
from ...validate import MAX_LAYERS
from ..account import Account
from ..assemble import RequestRows, check_budget, trace_of_requests
from .token_table import told_phases

_NUMBER = re.compile(r".*?([0-9]{1,6})[^0-9]*\.npy\Z")


def read_npy_layers(
    path: str | os.PathLike[str],
    *,
    prompt_tokens: int | None = None,
    layers_first: bool = False,
    num_experts: int | None = None,
    layer_ids: Sequence[int] | None = None,
    model: str = "",
    source: str = "",
    licence: str = "",
) -> RoutingTrace:
    """Return the routing in `.npy` arrays; `layers_first` says that an array of all layers is [layers, tokens, k].

    Raises InputError.
    """
    target = Path(path)
    account = Account()
    if target.is_dir():
        numbered = {int(match[1]): file for file in sorted(target.glob("*.npy")) if (match := _NUMBER.match(file.name))}
        if not numbered or len(numbered) > MAX_LAYERS:
            rule = f"must hold 1 to {MAX_LAYERS} files with a layer's number in their names"
            raise InputError("path", str(path), rule, "name them for instance layer_3.npy")
        others = len(list(target.glob("*.npy"))) - len(numbered)
        if others:
            account.note(f"{others} .npy files without a layer's number, or with one that occurs twice, are not read")
        experts, layers = _stacked(numbered), sorted(numbered)
    else:
        array = read_npy(target)
        if array.ndim == 2:
            match = _NUMBER.match(target.name)
            experts, layers = _ids(array, target, 2)[:, None], [int(match[1]) if match else 0]
        else:
            experts = _ids(array, target, 3)
            experts = experts.transpose(1, 0, 2) if layers_first else experts
            layers = list(range(experts.shape[1]))
    position = np.arange(len(experts), dtype=np.int64)
    phase = told_phases(position, prompt_tokens, account)
    return trace_of_requests(
        [RequestRows(experts=experts, position=position, phase=phase)],
        source=source or f"numpy arrays of expert ids: {target.name}",
        model=model,
        licence=licence,
        num_experts=num_experts,
        layer_ids=layers if layer_ids is None else layer_ids,
        account=account,
    )


def _stacked(files: dict[int, Path]) -> npt.NDArray[Any]:
    """Return [tokens, layers, k] from one array a layer. Raises InputError when they do not match."""
    arrays: list[npt.NDArray[Any]] = []
    for number in sorted(files):
        arrays.append(_ids(read_npy(files[number]), files[number], 2))
        if arrays[-1].shape != arrays[0].shape:
            rule = f"must have the tokens and choices of the first, {arrays[0].shape}"
            raise InputError(files[number].name, arrays[-1].shape, rule, "give all layers of the same tokens")
        check_budget(2 * sum(array.nbytes for array in arrays))
    return np.stack(arrays, axis=1)


def _ids(array: npt.NDArray[Any], path: Path, axes: int) -> npt.NDArray[Any]:
    """Return an array of integers with so many axes. Raises InputError."""
    if array.dtype.kind not in "iu" or array.ndim != axes or 0 in array.shape:
        shape = "[tokens, layers, k]" if axes == 3 else "[tokens, k]"
        rule = f"must be integers {shape}, none empty"
        raise InputError(path.name, f"{array.dtype} {array.shape}", rule, "save the ids of the chosen experts")
    return array
