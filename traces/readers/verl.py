"""Reader of verl rollout batches with `routed_experts` [batch, total_len, layers, top_k].

Modelled: tensors saved in one `.pt` or `.npz` file: `routed_experts`, `attention_mask` [batch, total_len] and
`responses` [batch, response_len]; prompts are padded on the left, responses on the right. Padding is dropped, and so
is a last token whose routing is all zero: it was sampled and never ran. Every batch row is a request. Ignored:
rewards, log-probabilities and everything else of a batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ..npy import read_npz
from ..recording import DECODE, PREFILL, RoutingTrace
from .assemble import RequestRows, trace_of_requests
from .torch_file import load_pt, tensor_array

_REMEDY = "save the batch's tensors (routed_experts, attention_mask, responses) with torch.save or numpy.savez"


def read_verl(
    path: str | os.PathLike[str],
    *,
    num_experts: int | None = None,
    layer_ids: Sequence[int] | None = None,
    model: str = "",
    source: str = "",
    licence: str = "",
) -> RoutingTrace:
    """Return the routing of a rollout batch.

    Raises InputError when a tensor is missing, misshapen or needs unpickling.
    """
    names = ("routed_experts", "attention_mask", "responses")
    experts, mask, responses = (_tensors(path, names)[name] for name in names)
    if experts.dtype.kind not in "iu" or experts.ndim != 4:
        rule = "must be integers [batch, total_len, layers, top_k]"
        raise InputError("routed_experts", f"{experts.dtype} {experts.shape}", rule, _REMEDY)
    if mask.shape != experts.shape[:2]:
        raise InputError("attention_mask", mask.shape, f"must have shape {experts.shape[:2]}", _REMEDY)
    if responses.ndim != 2 or len(responses) != len(experts) or responses.shape[1] > experts.shape[1]:
        rule = f"must be [batch ({len(experts)}), response_len (at most {experts.shape[1]})]"
        raise InputError("responses", responses.shape, rule, _REMEDY)
    prompt_len = experts.shape[1] - responses.shape[1]
    requests = []
    for row, present in zip(experts, mask != 0, strict=True):
        at = np.flatnonzero(present)
        if len(at) and not row[at[-1]].any():
            at = at[:-1]
        phase = np.where(at < prompt_len, PREFILL, DECODE)
        requests.append(RequestRows(experts=row[at], position=np.arange(len(at), dtype=np.int64), phase=phase))
    return trace_of_requests(
        requests,
        source=source or f"verl rollout batch: {Path(path).name}",
        model=model,
        licence=licence,
        num_experts=num_experts,
        layer_ids=layer_ids,
    )


def _tensors(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """Return the named tensors of a batch file as arrays. Raises InputError when one is missing."""
    if Path(path).suffix == ".npz":
        arrays: dict[Any, Any] = dict(read_npz(path))
    else:
        saved = load_pt(path)
        saved = saved.get("batch", saved) if isinstance(saved, dict) else saved
        if not isinstance(saved, dict):
            raise InputError("batch", type(saved).__name__, "must be a dictionary of tensors", _REMEDY)
        arrays = {name: tensor_array(saved[name], name) for name in names if name in saved}
    for name in names:
        if name not in arrays:
            raise InputError(name, "missing", "the batch does not hold it", _REMEDY)
    return arrays
