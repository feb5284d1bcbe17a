"""Reader of verl rollout batches with `routed_experts` [batch, total_len, layers, top_k].

Modelled: tensors saved in one `.pt` or `.npz` file: `routed_experts`, `attention_mask` [batch, total_len], `responses`
[batch, response_len] and, where there is one, `response_mask` [batch, response_len]; prompts are padded on the left,
responses on the right. Padding is dropped, and so is a last token without routing: it was sampled and never ran.
Tokens that the mask leaves out (a tool's answer) were not generated: they are prefill, and start a further request.
Ignored: rewards, log-probabilities and everything else of a batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ....base.errors import InputError
from ...files.npy import read_npz
from ...recording import DECODE, PREFILL, RoutingTrace
from ..account import NEVER_RAN, Account
from ..assemble import RequestRows, trace_of_requests
from ..files.torch_file import load_pt, tensor_array

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
    tensors = _tensors(path, ("routed_experts", "attention_mask", "responses"), ("response_mask",))
    experts, mask, responses = (tensors[name] for name in ("routed_experts", "attention_mask", "responses"))
    if experts.dtype.kind not in "iu" or experts.ndim != 4:
        rule = "must be integers [batch, total_len, layers, top_k]"
        raise InputError("routed_experts", f"{experts.dtype} {experts.shape}", rule, _REMEDY)
    if mask.shape != experts.shape[:2]:
        raise InputError("attention_mask", mask.shape, f"must have shape {experts.shape[:2]}", _REMEDY)
    if responses.ndim != 2 or len(responses) != len(experts) or responses.shape[1] > experts.shape[1]:
        rule = f"must be [batch ({len(experts)}), response_len (at most {experts.shape[1]})]"
        raise InputError("responses", responses.shape, rule, _REMEDY)
    generated = tensors.get("response_mask", np.ones(responses.shape, bool))
    if generated.shape != responses.shape:
        raise InputError("response_mask", generated.shape, f"must have shape {responses.shape}", _REMEDY)
    account = Account()
    prompt_len = experts.shape[1] - responses.shape[1]
    phases = np.full(mask.shape, PREFILL)
    phases[:, prompt_len:] = np.where(generated != 0, DECODE, PREFILL)
    requests: list[RequestRows] = []
    rollouts = 0
    for row, present, phase in zip(experts, mask != 0, phases, strict=True):
        at = np.flatnonzero(present)
        if len(at) and _blank(row[at[-1]]):
            at = at[:-1]
            account.read += 1
            account.drop(NEVER_RAN, 1)
        turns = _turns(row[at], phase[at])
        rollouts += bool(turns)
        requests.extend(turns)
    if len(requests) > rollouts:
        account.note(
            f"{rollouts} rollouts of several turns became {len(requests)} requests, as each tool answer is a prefill of its own "
            "that goes on at the position reached"
        )
    elif "response_mask" not in tensors:
        account.note("no response_mask: every token of the responses counts as generated, those of tools too")
    return trace_of_requests(
        requests,
        source=source or f"verl rollout batch: {Path(path).name}",
        model=model,
        licence=licence,
        num_experts=num_experts,
        layer_ids=layer_ids,
        account=account,
    )


def _blank(token: npt.NDArray[Any]) -> bool:
    """Return whether a token's routing is nothing: zeros, or padding in every choice."""
    return not token.any() or bool((token == token.flat[0]).all() and token.shape[-1] > 1)


def _turns(experts: npt.NDArray[Any], phase: npt.NDArray[Any]) -> list[RequestRows]:
    """Return one rollout as requests: a new one where tokens that nobody generated follow generated ones."""
    position = np.arange(len(phase), dtype=np.int64)
    borders = np.flatnonzero((phase[:-1] == DECODE) & (phase[1:] == PREFILL)) + 1
    pieces = np.split(position, borders) if len(phase) else []
    return [RequestRows(experts=experts[at], position=at, phase=phase[at]) for at in pieces]


def _tensors(
    path: str | os.PathLike[str], names: Sequence[str], optional: Sequence[str]
) -> dict[str, npt.NDArray[Any]]:
    """Return the named tensors of a batch file as arrays. Raises InputError when one that is no option is missing."""
    if Path(path).suffix == ".npz":
        arrays: dict[Any, Any] = dict(read_npz(path))
    else:
        saved = load_pt(path)
        saved = saved.get("batch", saved) if isinstance(saved, dict) else saved
        if not isinstance(saved, dict):
            raise InputError("batch", type(saved).__name__, "must be a dictionary of tensors", _REMEDY)
        arrays = {name: tensor_array(saved[name], name) for name in (*names, *optional) if name in saved}
    for name in names:
        if name not in arrays:
            raise InputError(name, "missing", "the batch does not hold it", _REMEDY)
    return arrays
