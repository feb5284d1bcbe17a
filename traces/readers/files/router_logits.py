"""Reader of router logits that transformers returns (`output_router_logits=True`), saved with torch.

Modelled: a tuple of one tensor a MoE layer, [tokens, experts] or [batch, tokens, experts], alone or as `router_logits`
of a dictionary, with an `attention_mask` beside it where sequences were padded; or one such tuple a forward pass, of
which the first is the prompt's. The `top_k` largest logits of a row are taken for the selection; transformers numbers
nothing, so columns count the MoE layers. Ignored: routers that add a bias, or choose groups first, to select.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ....base.errors import InputError
from ...recording import DECODE, PREFILL, RoutingTrace
from ...validate import MAX_EXPERTS, MAX_LAYERS, MAX_TOP_K, row_chunks
from ..account import PADDING, Account
from ..assemble import RequestRows, check_budget, trace_of_requests
from .token_table import told_phases
from .torch_file import load_pt, tensor_array

_REMEDY = "save outputs.router_logits, or a dictionary with it, with torch.save"


def read_router_logits(
    path: str | os.PathLike[str],
    *,
    top_k: int,
    prompt_tokens: int | None = None,
    batch: int | None = None,
    layer_ids: Sequence[int] | None = None,
    model: str = "",
    source: str = "",
    licence: str = "",
) -> RoutingTrace:
    """Return the routing of saved router logits.

    `batch`: sequences in the rows of a tensor, where neither its shape nor an attention mask says; `prompt_tokens`:
    where decoding starts, for one forward pass over prompt and reply. Raises InputError.
    """
    saved = load_pt(path)
    mask = None
    if isinstance(saved, dict):
        if "router_logits" not in saved:
            shown = ", ".join(str(key) for key in list(saved)[:10]) or "nothing"
            raise InputError("router_logits", "missing", f"the dictionary has only {shown}", _REMEDY)
        mask = None if saved.get("attention_mask") is None else tensor_array(saved["attention_mask"], "attention_mask")
        saved = saved["router_logits"]
    account = Account()
    account.note(
        "the top-k of logits is the selection where a router has no bias and no groups (not DeepSeek-V3, GLM-4, Kimi)"
    )
    if layer_ids is None:
        account.note("columns number the MoE layers from 0, as transformers does not number them: see layer_ids")
    passes = _passes(saved)
    if len(passes) > 1 and (prompt_tokens is not None or mask is not None):
        rule = "several forward passes say themselves where decoding starts, and carry no mask"
        raise InputError("prompt_tokens, attention_mask", len(passes), rule, "leave them out")
    requests = _requests(passes, top_k, batch, mask, account)
    if len(passes) == 1 and prompt_tokens is None:
        account.note("one forward pass: every token counts as prefill; give prompt_tokens where a reply was part of it")
    elif prompt_tokens is not None:
        requests = [
            RequestRows(
                experts=one.experts, position=one.position, phase=told_phases(one.position, prompt_tokens, account)
            )
            for one in requests
        ]
    return trace_of_requests(
        requests,
        source=source or f"transformers router logits: {Path(path).name}",
        model=model,
        licence=licence,
        num_experts=passes[0][0].shape[-1],
        layer_ids=layer_ids,
        account=account,
        zeros_may_be_blank=False,
    )


def _passes(saved: Any) -> list[list[npt.NDArray[Any]]]:
    """Return forward pass → layer → logits. Raises InputError when the content is anything else."""
    if not isinstance(saved, (list, tuple)):
        saved = [saved[layer] for layer in range(len(saved))] if getattr(saved, "ndim", 0) >= 3 else [saved]
    nested = bool(saved) and all(isinstance(one, (list, tuple)) for one in saved)
    found = [_layers(one) for one in (saved if nested else [saved])]
    if not found or not found[0]:
        raise InputError("router_logits", 0, "holds no layer", "run the model with output_router_logits=True")
    shapes = {(len(one), one[0].shape[-1]) for one in found if one}
    if len(shapes) != 1 or not all(found):
        raise InputError(
            "router_logits", sorted(shapes)[:5], "every pass must have the same layers and experts", _REMEDY
        )
    return found


def _layers(layers: Sequence[object]) -> list[npt.NDArray[Any]]:
    """Return the logits of each MoE layer; dense layers, for which some models give None, are left out.

    Raises InputError.
    """
    arrays: list[npt.NDArray[Any]] = []
    for number, tensor in enumerate(layers):
        if tensor is None:
            continue
        array = tensor_array(tensor, f"router_logits[{number}]")
        if array.dtype.kind != "f" or array.ndim not in (2, 3) or 0 in array.shape or array.shape[-1] > MAX_EXPERTS:
            rule = "must be numbers [tokens, experts] or [batch, tokens, experts]"
            raise InputError(f"router_logits[{number}]", f"{array.dtype} {array.shape}", rule, _REMEDY)
        arrays.append(array)
        if array.shape != arrays[0].shape:
            rule = f"must have the shape of the first, {arrays[0].shape}"
            raise InputError(f"router_logits[{number}]", array.shape, rule, _REMEDY)
    if len(arrays) > MAX_LAYERS:
        raise InputError("router_logits", len(arrays), f"must be at most {MAX_LAYERS} layers", _REMEDY)
    return arrays


def _requests(
    passes: list[list[npt.NDArray[Any]]], top_k: int, batch: int | None, mask: npt.NDArray[Any] | None, account: Account
) -> list[RequestRows]:
    """Return the rows of each sequence of the batch, over all passes. Raises InputError."""
    pieces: list[list[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]] = []
    for layers in passes:
        ids = _selected(layers, top_k)
        size = (
            layers[0].shape[0]
            if layers[0].ndim == 3
            else (len(mask) if mask is not None and mask.ndim == 2 else batch or 1)
        )
        if not (1 <= size <= len(ids)) or len(ids) % size or (batch is not None and size != batch):
            raise InputError(
                "batch", batch, f"{len(ids)} rows are not so many sequences of one length", "give the batch size"
            )
        if pieces and len(pieces) != size:
            raise InputError("router_logits", size, f"the passes before had {len(pieces)} sequences", _REMEDY)
        length = len(ids) // size
        if mask is not None and mask.shape != (size, length):
            raise InputError("attention_mask", mask.shape, f"must have shape {(size, length)}", _REMEDY)
        pieces = pieces or [[] for _ in range(size)]
        for number, rows in enumerate(ids.reshape(size, length, *ids.shape[1:])):
            held = rows if mask is None else rows[mask[number] != 0]
            account.read += length - len(held)
            account.drop(PADDING, length - len(held))
            start = sum(len(before) for before, _ in pieces[number])
            pieces[number].append((held, start + np.arange(len(held), dtype=np.int64)))
    return [
        RequestRows(
            experts=np.concatenate([ids for ids, _ in one]),
            position=np.concatenate([position for _, position in one]),
            phase=np.concatenate([np.full(len(ids), PREFILL if i == 0 else DECODE) for i, (ids, _) in enumerate(one)]),
        )
        for one in pieces
    ]


def _selected(layers: list[npt.NDArray[Any]], top_k: int) -> npt.NDArray[np.uint16]:
    """Return [tokens, layers, top_k]: the experts with the largest logits, largest first, equal ones by number.

    Raises InputError when a logit is no number.
    """
    experts = layers[0].shape[-1]
    if not (1 <= top_k <= min(MAX_TOP_K, experts)):
        raise InputError("top_k", top_k, f"must be 1 to {min(MAX_TOP_K, experts)}", "see the model's config.json")
    tokens = layers[0].size // experts
    check_budget(2 * tokens * len(layers) * top_k)
    found = np.empty((tokens, len(layers), top_k), np.uint16)
    for number, layer in enumerate(layers):
        rows = layer.reshape(tokens, experts)
        for start, stop in row_chunks(tokens, 16 * experts):
            part = rows[start:stop]
            if np.isnan(part).any():
                raise InputError(f"router_logits[{number}]", "NaN", "must be numbers", "record in float32 or bfloat16")
            found[start:stop, number] = np.argsort(-part, axis=1, kind="stable")[:, :top_k]
    return found
