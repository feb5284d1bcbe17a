"""From a table of choices, one row a token and layer, to a recording; and the names people give its columns.

Modelled: rows in any order, requests named by numbers or by texts, phases from a column or from the prompt's length.
A token that lacks a layer is dropped and counted. Ignored: what files such tables come in (the readers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ....base.errors import InputError
from ...recording import DECODE, PREFILL, RoutingTrace
from ...validate import MAX_LAYERS, MAX_TOP_K
from ..account import Account, layer_ranges
from ..assemble import RequestRows, check_budget, trace_of_requests

NAMES: Mapping[str, tuple[str, ...]] = {
    "request": ("request", "request_id", "req_id", "req", "seq", "seq_id", "sequence"),
    "token": ("token", "position", "pos", "token_index", "token_idx", "token_pos"),
    "layer": ("layer", "layer_id", "layer_idx", "layer_index"),
    "experts": ("experts", "expert_ids", "topk_ids", "topk_indices", "selected_experts", "expert", "expert_id"),
    "weights": ("weights", "topk_weights", "expert_weights", "routing_weights", "weight"),
    "phase": ("phase",),
}
NEEDED = ("token", "layer", "experts")
# A table that names so few of its layers per token is something else, and would take far more memory than it has bytes.
_SPARSEST = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One row a token and layer."""

    request: npt.NDArray[np.int64]
    token: npt.NDArray[np.int64]
    layer: npt.NDArray[np.int64]
    experts: npt.NDArray[Any]
    """integers [rows, top_k]."""
    weights: npt.NDArray[Any] | None = None
    """numbers [rows, top_k]."""
    phase: npt.NDArray[np.int64] | None = None


def column_names(columns: Sequence[str], told: Mapping[str, str]) -> dict[str, str]:
    """Return part → column of a file with these columns: as told, else by the usual names.

    Raises InputError when a told or a needed column is not there.
    """
    shown = ", ".join(columns[:20]) or "none"
    found: dict[str, str] = {}
    for part, usual in NAMES.items():
        name = told.get(part, "")
        if name and name not in columns:
            raise InputError(f"{part}_column", name, f"the columns are {shown}", "name a column of the file")
        match = name or next((candidate for candidate in usual if candidate in columns), "")
        if match:
            found[part] = match
    for part in NEEDED:
        if part not in found:
            rule = f"no column for the {part}; the columns are {shown}"
            raise InputError("columns", "missing", rule, f"name it: --option {part}_column=…")
    return found


def phase_number(value: object, where: str) -> int:
    """Return the phase a cell names: 0 or prefill, 1 or decode. Raises InputError."""
    known = {"0": PREFILL, "prefill": PREFILL, "prompt": PREFILL, "1": DECODE, "decode": DECODE, "generation": DECODE}
    text = str(value).strip().lower()
    if text not in known:
        raise InputError(f"{where}: phase", value, "must be 0 or prefill, 1 or decode", "check the file")
    return known[text]


def trace_of_table(
    table: Table,
    *,
    source: str,
    prompt_tokens: int | None = None,
    num_experts: int | None = None,
    layer_ids: Sequence[int] | None = None,
    model: str = "",
    licence: str = "",
    metadata: Mapping[str, str] | None = None,
) -> RoutingTrace:
    """Return the recording a table holds, requests in the order of their numbers.

    `layer_ids` names the model layer of each layer that occurs, ascending. Raises InputError when rows repeat, or most
    are missing.
    """
    if not len(table.token):
        raise InputError("rows", 0, "has zero tokens", "record at least one token")
    for name, column in (("token", table.token), ("layer", table.layer)):
        if int(column.min()) < 0 or int(column.max()) > np.iinfo(np.int32).max:
            outside = int(column.min()) if int(column.min()) < 0 else int(column.max())
            raise InputError(name, outside, "must be 0 to 2147483647", "check the file")
    order = np.lexsort((table.layer, table.token, table.request))
    request, token, layer = table.request[order], table.token[order], table.layer[order]
    layers, column_of = np.unique(layer, return_inverse=True)
    starts = np.r_[True, (np.diff(request) != 0) | (np.diff(token) != 0)]
    row_of = np.cumsum(starts) - 1
    rows, top_k = int(row_of[-1]) + 1, table.experts.shape[1]
    if len(layers) > MAX_LAYERS or not (1 <= top_k <= MAX_TOP_K):
        rule = f"must have 1 to {MAX_LAYERS} layers and 1 to {MAX_TOP_K} experts per token"
        raise InputError("layers, experts", [len(layers), top_k], rule, "check the columns")
    if rows * len(layers) > _SPARSEST * len(order):
        rule = f"{rows} tokens × {len(layers)} layers have only {len(order)} rows"
        raise InputError("rows", len(order), rule, "give every layer of every token, and check which column is which")
    same = ~starts[1:] & (layer[1:] == layer[:-1])
    if same.any():
        at = int(same.argmax())
        rule = f"token {int(token[at])} of request {int(request[at])} has layer {int(layer[at])} twice"
        raise InputError("rows", "repeated", rule, "give one row a token and layer, or number the requests")
    check_budget(8 * rows * len(layers) * top_k)
    experts = np.full((rows, len(layers), top_k), -1, np.int32)
    experts[row_of, column_of] = _ids(table.experts)[order]
    weights = None
    if table.weights is not None:
        weights = np.zeros(experts.shape, np.float32)
        weights[row_of, column_of] = table.weights[order]
    account = Account()
    first = np.flatnonzero(starts)
    position = token[first]
    phase = _phases(table, order[first], position, prompt_tokens, account)
    if layer_ids is not None and len(layer_ids) != len(layers):
        rule = f"must have one entry per recorded layer ({len(layers)}: {layer_ranges(layers.tolist())})"
        raise InputError("layer_ids", len(layer_ids), rule, "name the model layer of every recorded layer")
    pieces = np.split(np.arange(rows), np.flatnonzero(np.diff(request[first])) + 1)
    return trace_of_requests(
        [
            RequestRows(
                experts=experts[at],
                position=position[at],
                phase=phase[at],
                weights=None if weights is None else weights[at],
            )
            for at in pieces
        ],
        source=source,
        model=model,
        licence=licence,
        num_experts=num_experts,
        layer_ids=layers.tolist() if layer_ids is None else layer_ids,
        metadata=metadata,
        account=account,
    )


def told_phases(position: npt.NDArray[np.int64], prompt_tokens: int | None, account: Account) -> npt.NDArray[np.int64]:
    """Return the phase of each position: prefill below `prompt_tokens`; all decode, and said so, where it is not told.

    Raises InputError.
    """
    if prompt_tokens is None:
        account.note("nothing says where decoding starts: every token counts as decoded; give prompt_tokens")
        return np.full(len(position), DECODE)
    if not (0 <= prompt_tokens < 1 << 31):
        raise InputError("prompt_tokens", prompt_tokens, "must be 0 to 2147483647", "give the length of the prompt")
    return np.where(position < prompt_tokens, PREFILL, DECODE)


def _phases(
    table: Table, at: npt.NDArray[np.intp], position: npt.NDArray[np.int64], prompt_tokens: int | None, account: Account
) -> npt.NDArray[np.int64]:
    """Return the phase of each token. Raises InputError when it is told twice."""
    if table.phase is None:
        return told_phases(position, prompt_tokens, account)
    if prompt_tokens is not None:
        rule = "the file has a column of phases"
        raise InputError("prompt_tokens", prompt_tokens, rule, "leave it out")
    return table.phase[at]


def _ids(experts: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Return expert ids as int32. Raises InputError when one is beyond it."""
    if experts.size and (int(experts.min()) < -1 or int(experts.max()) > np.iinfo(np.int32).max):
        outside = int(experts.min()) if int(experts.min()) < -1 else int(experts.max())
        raise InputError("expert id", outside, "must be -1 (none) or an expert", "check the columns")
    return experts.astype(np.int32)
