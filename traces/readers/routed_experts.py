"""Readers of the routing that serving engines return with an answer: SGLang's and vLLM's `routed_experts`.

Modelled: files that hold one answer, a list of answers, or one answer per line. SGLang sends base64 of raw int32
without any header, so layers and top_k must be told; vLLM sends base64 of a `.npy` array of the whole sequence, or
(before 0.22) separate nested lists for prompt and completion. The last sampled token never ran through the model and
has no routing. Dense layers, where an engine sends rows of zeros, are dropped. Ignored: everything else in an answer.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ..json_input import decode_base64, read_json_documents
from ..npy import read_npy, read_npy_stream
from ..recording import DECODE, PREFILL, RoutingTrace
from ..refusal import unreadable
from ..validate import MAX_LAYERS, MAX_TOP_K
from .assemble import RequestRows, integer_array, trace_of_requests

_REMEDY = "give the answers as the server sent them"


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
    _not_negative("start_len", start_len)
    requests = []
    for answer in read_json_documents(path):
        for payload, info in _sglang_payloads(answer):
            raw = decode_base64(payload, "routed_experts")
            if len(raw) % (4 * num_layers * top_k):
                rule = f"{len(raw)} bytes are not a whole number of tokens of {num_layers} layers × {top_k} int32"
                raise InputError("routed_experts", len(raw), rule, "check num_layers and top_k")
            experts = np.frombuffer(raw, dtype="<i4").reshape(-1, num_layers, top_k)
            requests.append(_rows(experts, start_len, _prompt_length(info, prompt_tokens)))
    return _trace(requests, "SGLang routed experts", path, num_experts, layer_ids, model, source, licence)


def read_vllm_routed_experts(
    path: str | os.PathLike[str],
    *,
    num_experts: int | None = None,
    prompt_start: int = 0,
    prompt_tokens: int | None = None,
    layer_ids: Sequence[int] | None = None,
    model: str = "",
    source: str = "",
    licence: str = "",
) -> RoutingTrace:
    """Return the routing of vLLM answers (JSON), or of one `CompletionOutput.routed_experts` saved as `.npy`.

    Both shapes are read: one array of the whole sequence, all hidden layers, or `prompt_routed_experts` beside
    `routed_experts`, MoE layers only. `prompt_start` is the request's `routed_experts_prompt_start`; `prompt_tokens`
    overrides what the answers say about where decoding starts. Raises InputError.
    """
    _not_negative("prompt_start", prompt_start)
    requests = []
    if Path(path).suffix == ".npy":
        requests.append(_rows(_table(read_npy(path), "routed_experts"), prompt_start, prompt_tokens or 0))
    else:
        for answer in read_json_documents(path):
            prompt = answer.get("prompt_routed_experts")
            parts = [] if prompt is None else [_rows(_vllm_table(prompt), prompt_start, 1 << 31)]
            for choice in _choices(answer):
                routed = choice.get("routed_experts")
                if routed is None:
                    requests.extend(_joined(parts))
                    continue
                start = prompt_start + sum(len(part.experts) for part in parts)
                length = start if parts else _prompt_length(answer, prompt_tokens)
                requests.extend(_joined([*parts, _rows(_vllm_table(routed), start, length)]))
    return _trace(requests, "vLLM routed experts", path, num_experts, layer_ids, model, source, licence)


def _sglang_payloads(answer: dict[str, Any]) -> Iterator[tuple[object, dict[str, Any]]]:
    """Return (payload, what tells the prompt length) of every routed request in one answer."""
    for entry in [answer, *_choices(answer)]:
        for holder in ("meta_info", "sglext"):
            info = entry.get(holder)
            if isinstance(info, dict) and info.get("routed_experts") is not None:
                yield info["routed_experts"], info if holder == "meta_info" else answer


def _choices(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the choices of an answer; vLLM calls them `outputs` in its own objects. Raises InputError."""
    choices = answer.get("choices", answer.get("outputs", []))
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise InputError("choices", type(choices).__name__, "must be a list of objects", _REMEDY)
    return choices


def _prompt_length(info: dict[str, Any], told: int | None) -> int:
    """Return how many tokens the prompt has: as told, or as the answer says. Raises InputError when neither does."""
    if told is not None:
        return told
    usage = info.get("usage")
    ids = info.get("prompt_token_ids")
    said = [info.get("prompt_tokens"), usage.get("prompt_tokens") if isinstance(usage, dict) else None]
    said.append(len(ids) if isinstance(ids, list) else None)
    for length in said:
        if type(length) is int and length >= 0:
            return length
    rule = "the answer does not say how long the prompt was"
    raise InputError("prompt_tokens", None, rule, "give prompt_tokens, or keep usage in the answer")


def _vllm_table(value: object) -> npt.NDArray[Any]:
    """Return vLLM's experts [tokens, layers, top_k] from base64 of a `.npy` array or from nested lists.

    Raises InputError.
    """
    if not isinstance(value, str):
        return _table(integer_array(value, "routed_experts", 3), "routed_experts")
    raw = decode_base64(value, "routed_experts")
    try:
        return _table(read_npy_stream(io.BytesIO(raw), len(raw)), "routed_experts")
    except (ValueError, TypeError, OSError, EOFError, MemoryError, OverflowError, SyntaxError, RecursionError) as error:
        raise unreadable("routed_experts", "is not base64 of a .npy array", error, _REMEDY) from None


def _table(array: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """Return `array` when it holds integers with three axes. Raises InputError."""
    if array.dtype.kind not in "iu" or array.ndim != 3:
        rule = "must be integers [tokens, layers, top_k]"
        raise InputError(name, f"{array.dtype} {array.shape}", rule, _REMEDY)
    return array


def _rows(experts: npt.NDArray[Any], start: int, prompt_length: int) -> RequestRows:
    """Return rows whose positions count from `start`, prefill below `prompt_length`."""
    position = np.arange(len(experts), dtype=np.int64) + start
    return RequestRows(experts=experts, position=position, phase=np.where(position < prompt_length, PREFILL, DECODE))


def _joined(parts: list[RequestRows]) -> list[RequestRows]:
    """Return the parts of one request as one, or nothing when there are none.

    Raises InputError when they do not match.
    """
    parts = [part for part in parts if len(part.experts)]
    if not parts:
        return []
    if len({part.experts.shape[1:] for part in parts}) != 1:
        shapes = [part.experts.shape for part in parts]
        raise InputError("prompt_routed_experts", shapes, "must have the layers and top_k of routed_experts", _REMEDY)
    return [
        RequestRows(
            experts=np.concatenate([part.experts for part in parts]),
            position=np.concatenate([part.position for part in parts]),
            phase=np.concatenate([part.phase for part in parts]),
        )
    ]


def _trace(
    requests: list[RequestRows],
    what: str,
    path: str | os.PathLike[str],
    num_experts: int | None,
    layer_ids: Sequence[int] | None,
    model: str,
    source: str,
    licence: str,
) -> RoutingTrace:
    """Return the trace of all answers. Raises InputError when none carries routing."""
    if not requests:
        rule = "no answer carries routed experts"
        raise InputError("routed_experts", str(path), rule, "ask the server to return them with each request")
    return trace_of_requests(
        requests,
        source=source or f"{what}: {Path(path).name}",
        model=model,
        licence=licence,
        num_experts=num_experts,
        layer_ids=layer_ids,
    )


def _not_negative(name: str, value: int) -> None:
    """Raise InputError when an option is negative or absurdly large."""
    if not (0 <= value < 1 << 31):
        raise InputError(name, value, "must be 0 to 2147483647", "give the number the request was sent with")
