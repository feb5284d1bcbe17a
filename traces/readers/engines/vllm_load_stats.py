"""Reader of the loads that vLLM's balancer writes, one JSON record a line (pull request 41141, open as of September 2026).

Modelled: records of type `eplb_load_stats`: the load of every slot of every MoE layer, and the logical expert each slot held, so that
copies are added up. Records are windows; those of a model with another number of layers than the first (a draft model writes into the
same file) are left out and named. Ignored: records of other types (the header, marks of benchmark runs).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ....base.errors import InputError
from ...files.json_input import read_json_documents
from ...recording import LoadProfile
from ...validate import MAX_EXPERTS
from ..account import Account
from ..assemble import check_budget, load_of_counts, whole_numbers

_TYPE = "eplb_load_stats"
_REMEDY = "give the file as vLLM wrote it"


def read_vllm_load_stats(
    path: str | os.PathLike[str],
    *,
    layer_ids: Sequence[int] | None = None,
    model: str = "",
    source: str = "",
    licence: str = "",
) -> LoadProfile:
    """Return the loads of a file of `eplb_load_stats` records.

    layer_ids: the model layer of every MoE layer recorded; else they count from 0. Raises InputError when there is no such record,
    or one is damaged.
    """
    account = Account()
    windows: list[npt.NDArray[np.int64]] = []
    others = 0
    for number, record in enumerate(read_json_documents(path), 1):
        if record.get("record_type") != _TYPE:
            continue
        counts = _logical(record, f"{Path(path).name}: record {number}")
        if windows and len(counts) != len(windows[0]):
            others += 1
            continue
        windows.append(counts)
    if not windows:
        raise InputError("path", str(path), f"has no {_TYPE} record", "set expert_load_stats_path in --eplb-config")
    if others:
        account.note(f"{others} records of a model with another number of layers (a draft model) are left out")
    experts = max(one.shape[1] for one in windows)
    check_budget(8 * len(windows) * len(windows[0]) * experts)
    stacked = np.zeros((len(windows), len(windows[0]), experts), dtype=np.int64)
    for at, one in enumerate(windows):
        stacked[at, :, : one.shape[1]] = one
    return load_of_counts(
        stacked,
        source=source or f"vLLM's balancer: {Path(path).name}",
        model=model,
        licence=licence,
        layer_ids=layer_ids,
        window_unit="record",
        account=account,
    )


def _logical(record: dict[str, Any], where: str) -> npt.NDArray[np.int64]:
    """Return a record's counts per logical expert [layers, experts]. Raises InputError."""
    load, held = (_table(record, key, where) for key in ("expert_load", "p2l_map"))
    if load.shape != held.shape:
        raise InputError(f"{where}: p2l_map", held.shape, f"expert_load has {load.shape}", _REMEDY)
    if held.size and int(held.max()) >= MAX_EXPERTS:
        raise InputError(f"{where}: p2l_map", int(held.max()), f"at most {MAX_EXPERTS} experts", _REMEDY)
    counts = np.zeros((len(load), int(held.max()) + 1), dtype=np.int64)
    np.add.at(counts, (np.arange(len(load))[:, None], held), load)
    return counts


def _table(record: dict[str, Any], key: str, where: str) -> npt.NDArray[np.int64]:
    """Return one of a record's tables [layers, slots]. Raises InputError."""
    rows = record.get(key)
    try:
        values = np.asarray(rows)
    except (ValueError, TypeError, OverflowError, MemoryError, RecursionError):
        raise InputError(f"{where}: {key}", "ragged", "must be a regular table of numbers", _REMEDY) from None
    if values.ndim != 2 or 0 in values.shape:
        raise InputError(f"{where}: {key}", values.shape, "must be [layers][slots]", _REMEDY)
    return whole_numbers(values, f"{where}: {key}")
