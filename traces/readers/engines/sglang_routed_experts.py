"""Reader of the routing that SGLang returns with an answer (`return_routed_experts`).

Modelled: files that hold one answer, a list of answers, or one answer per line; native answers (`meta_info`) and
OpenAI ones (`sglext` or `sgl_ext`, beside the choices or in each). The payload is base64 of raw int32 (or of a
narrower type, where the answer's tokens tell) without a header, so layers and top_k must be told; where the answer
says how many tokens it has, they are checked. Ignored: everything else in an answer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ....base.errors import InputError
from ...files.json_input import decode_base64, read_json_documents
from ...recording import RoutingTrace
from ...validate import MAX_EXPERTS, MAX_LAYERS, MAX_TOP_K
from ..account import Account
from ..assemble import trace_of_requests
from .routed_answers import AnswerReader, Choice, Usage, choices_of, listed, usage_of

_MOST_FUSED = 4  # shared experts an engine may append to a token's choices


def read_sglang_routed_experts(
    path: str | os.PathLike[str],
    *,
    num_layers: int,
    top_k: int,
    num_experts: int | None = None,
    start_len: int = 0,
    prompt_tokens: int | None = None,
    layer_ids: Sequence[int] | None = None,
    model: str = "",
    source: str = "",
    licence: str = "",
) -> RoutingTrace:
    """Return the routing of SGLang answers: `meta_info.routed_experts` (native) or `sglext.routed_experts` (OpenAI).

    `num_layers` counts every hidden layer, dense ones included; `start_len` is the request's
    `routed_experts_start_len`; `prompt_tokens` overrides what the answers say about where decoding starts. Raises
    InputError.
    """
    if not (1 <= num_layers <= MAX_LAYERS) or not (1 <= top_k <= MAX_TOP_K):
        rule = f"must be 1 to {MAX_LAYERS} layers and 1 to {MAX_TOP_K} experts per token"
        raise InputError("num_layers, top_k", [num_layers, top_k], rule, "see the model's config.json")
    account = Account()
    answers = AnswerReader(account=account, start=start_len, prompt_tokens=prompt_tokens)
    for answer in read_json_documents(path):
        for payloads, usage in _groups(answer):
            start = start_len if usage.start is None else usage.start
            choices = [
                Choice(
                    experts=_table(raw, num_layers, top_k, _row_counts(usage, prompt_tokens, start)),
                    prompt=listed(entry, "prompt_token_ids"),
                    reply=listed(entry, "token_ids"),
                )
                for raw, entry in payloads
            ]
            answers.add(choices, usage)
    answers.finish()
    trace = trace_of_requests(
        answers.requests,
        source=source or f"SGLang routed experts: {Path(path).name}",
        model=model,
        licence=licence,
        num_experts=num_experts,
        layer_ids=layer_ids,
        account=account,
    )
    if trace.top_k != top_k:
        rule = f"the answers record {trace.top_k} routed experts a token"
        raise InputError("top_k", top_k, rule, "see the model's config.json")
    return trace


def _groups(answer: dict[str, Any]) -> list[tuple[list[tuple[bytes, dict[str, Any]]], Usage]]:
    """Return [(payloads that belong together with the object each stands in, what is said about their tokens)]."""
    found: list[tuple[list[tuple[bytes, dict[str, Any]]], Usage]] = []
    together: list[tuple[bytes, dict[str, Any]]] = []
    for entry in (answer, *choices_of(answer)):
        native = entry.get("meta_info")
        if isinstance(native, dict) and native.get("routed_experts") is not None:
            found.append(([(decode_base64(native["routed_experts"], "routed_experts"), {})], usage_of(native)))
        for name in ("sglext", "sgl_ext"):
            extra = entry.get(name)
            if isinstance(extra, dict) and extra.get("routed_experts") is not None:
                together.append((decode_base64(extra["routed_experts"], "routed_experts"), entry))
    return [*found, *([(together, usage_of(answer))] if together else [])]


def _row_counts(usage: Usage, prompt_tokens: int | None, start: int) -> list[int]:
    """Return how many rows an answer of one choice may have; none when it does not say."""
    prompt = usage.prompt if prompt_tokens is None else prompt_tokens
    if prompt is None or usage.reply is None:
        return []
    tokens = prompt + usage.reply
    return [tokens - 1 - first for first in sorted({start, max(start, usage.cached or 0)}) if tokens - 1 > first]


def _table(raw: bytes, num_layers: int, top_k: int, row_counts: list[int]) -> npt.NDArray[np.integer]:
    """Return [rows, num_layers, choices]: top_k choices, or a few more where shared experts were appended.

    Raises InputError when the bytes are not whole tokens.
    """
    width = 4 * num_layers
    words = np.frombuffer(raw[: len(raw) // 4 * 4], dtype="<i4")
    narrow = bool(words.size) and (int(words.max()) >= MAX_EXPERTS or int(words.min()) < -1)  # no ids of four bytes
    for rows in row_counts:
        for compact in ("<u1", "<u2"):  # newer servers may send the narrowest type
            if narrow and len(raw) == rows * num_layers * top_k * np.dtype(compact).itemsize:
                return np.frombuffer(raw, dtype=compact).reshape(-1, num_layers, top_k)
        choices, rest = divmod(len(raw), rows * width)
        if not rest and top_k <= choices <= top_k + _MOST_FUSED:
            table = np.frombuffer(raw, dtype="<i4").reshape(-1, num_layers, choices)
            real = table[table.max(axis=2) > 0]
            if choices == top_k or (len(real) and int(real[:, top_k:].min()) > int(real[:, :top_k].max())):
                return table
    if len(raw) % (width * top_k):
        rule = f"{len(raw)} bytes are not a whole number of tokens of {num_layers} layers × {top_k} int32"
        raise InputError("routed_experts", len(raw), rule, "check num_layers and top_k")
    return np.frombuffer(raw, dtype="<i4").reshape(-1, num_layers, top_k)
