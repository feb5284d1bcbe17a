"""Reader of MoE-Infinity traces: one `.npy` array of counts [num_sequences, num_layers, num_experts].

Modelled: tokens per expert for each sequence; slots of its table that were never filled are all zero and are dropped.
Windows are requests. Ignored: access order (`ExpertTraceEntry.access` is not stored).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ....base.errors import InputError
from ...files.npy import read_npy
from ...recording import LoadProfile
from ..account import Account
from ..assemble import load_of_counts


def read_moe_infinity(
    path: str | os.PathLike[str],
    *,
    layer_ids: Sequence[int] | None = None,
    top_k: int | None = None,
    model: str = "",
    source: str = "",
    licence: str = "",
) -> LoadProfile:
    """Return the loads of a trace array. Raises InputError when it is damaged, misshapen or needs unpickling."""
    counts = read_npy(path)
    if counts.ndim != 3:
        rule = "must be [num_sequences, num_layers, num_experts]"
        raise InputError("counts", counts.shape, rule, "give the array as MoE-Infinity saved it")
    account = Account()
    if layer_ids is None:
        account.note("layers are numbered from 0 as in the array, which counts MoE layers only: see layer_ids")
    return load_of_counts(
        counts,
        source=source or f"MoE-Infinity trace: {Path(path).name}",
        model=model,
        licence=licence,
        top_k=top_k,
        layer_ids=layer_ids,
        window_unit="request",
        account=account,
    )
