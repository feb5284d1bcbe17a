"""Reader of the routing that vLLM returns with an answer (`--enable-return-routed-experts`).

Modelled: files that hold one answer, a list of answers, or one answer per line, with base64 of a `.npy` array of the
whole sequence and all hidden layers, or (0.21) nested lists for prompt and reply apart, MoE layers only; and the array
of an offline `CompletionOutput` as `.npy` with its token counts told, or as `.npz` with the counts beside it. Ignored:
everything else in an answer.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ....base.errors import InputError
from ...files.json_input import decode_base64, read_json_documents
from ...files.npy import read_npy, read_npy_stream, read_npz
from ...files.refusal import unreadable
from ...recording import RoutingTrace
from ..account import Account
from ..assemble import integer_array, trace_of_requests
from .routed_answers import AnswerReader, Choice, Usage, choices_of, listed, usage_of

_REMEDY = "give the answers as the server sent them"


def read_vllm_routed_experts(
    path: str | os.PathLike[str],
    *,
    num_experts: int | None = None,
    prompt_start: int = 0,
    prompt_tokens: int | None = None,
    completion_tokens: int | None = None,
    layer_ids: Sequence[int] | None = None,
    model: str = "",
    source: str = "",
    licence: str = "",
) -> RoutingTrace:
    """Return the routing of vLLM answers (JSON), or of one `CompletionOutput.routed_experts` (`.npy`, `.npz`).

    `prompt_start` is the request's `routed_experts_prompt_start`; `prompt_tokens` overrides what the answers say about
    where decoding starts; a bare `.npy` needs `prompt_tokens`, and `completion_tokens` (its `token_ids`) to be checked.
    Raises InputError.
    """
    account = Account()
    answers = AnswerReader(
        account=account, start=prompt_start, start_option="prompt_start", prompt_tokens=prompt_tokens
    )
    if Path(path).suffix == ".npy":
        if prompt_tokens is None:
            rule = "a bare array does not say where decoding starts"
            raise InputError("prompt_tokens", None, rule, "give prompt_tokens, the length of prompt_token_ids")
        usage = Usage(prompt=prompt_tokens, reply=completion_tokens)
        answers.add([Choice(experts=_table(read_npy(path), "routed_experts"))], usage)
    elif Path(path).suffix == ".npz":
        _add_archive(answers, read_npz(path), completion_tokens)
    else:
        if completion_tokens is not None:
            rule = "belongs to a .npy file; answers say it themselves"
            raise InputError("completion_tokens", completion_tokens, rule, "leave it out")
        for answer in read_json_documents(path):
            _add_answer(answers, answer)
            if layer_ids is None and answer.get("prompt_routed_experts") is not None:
                account.note("columns number the MoE layers from 0, as this version records no others: see layer_ids")
    answers.finish()
    return trace_of_requests(
        answers.requests,
        source=source or f"vLLM routed experts: {Path(path).name}",
        model=model,
        licence=licence,
        num_experts=num_experts,
        layer_ids=layer_ids,
        account=account,
    )


def _add_archive(answers: AnswerReader, arrays: dict[str, npt.NDArray[Any]], completion_tokens: int | None) -> None:
    """Add an archive with `routed_experts` and, as numbers or as lists of ids, the tokens of prompt and reply."""
    if "routed_experts" not in arrays:
        shown = ", ".join(sorted(arrays)) or "nothing"
        raise InputError("routed_experts", "missing", f"the archive has only {shown}", "save it as documented")
    prompt, reply = (
        _tokens(arrays, "prompt_tokens", "prompt_token_ids"),
        _tokens(arrays, "completion_tokens", "token_ids"),
    )
    usage = Usage(prompt=prompt, reply=reply if completion_tokens is None else completion_tokens)
    answers.add([Choice(experts=_table(arrays["routed_experts"], "routed_experts"))], usage)


def _tokens(arrays: dict[str, npt.NDArray[Any]], count: str, ids: str) -> int | None:
    """Return a number of tokens of an archive, stated or counted. Raises InputError."""
    if count in arrays:
        value = arrays[count]
        if value.dtype.kind not in "iu" or value.size != 1 or not (0 <= int(value.ravel()[0]) < 1 << 31):
            raise InputError(count, f"{value.dtype} {value.shape}", "must be one count of tokens", "save len(…)")
        return int(value.ravel()[0])
    return int(arrays[ids].size) if ids in arrays else None


def _add_answer(answers: AnswerReader, answer: dict[str, Any]) -> None:
    """Add the choices of one answer in either shape. Raises InputError."""
    usage = usage_of(answer)
    prompt = answer.get("prompt_routed_experts")
    entries = [entry for entry in choices_of(answer) if entry.get("routed_experts") is not None]
    tables = [_vllm_table(entry["routed_experts"]) for entry in entries]
    if prompt is not None:  # version 0.21: the prompt apart, once for all choices
        head = _vllm_table(prompt)
        tables = [table if len(table) else head[:0] for table in tables]
        if len({table.shape[1:] for table in (head, *tables)}) > 1:
            shapes = [table.shape for table in (head, *tables)]
            raise InputError(
                "prompt_routed_experts", shapes, "must have the layers and top_k of routed_experts", _REMEDY
            )
        if not tables:
            entries, tables = [{}], [head[:0]]
        tables = [np.concatenate([head, table]) for table in tables]
    choices = [
        Choice(experts=table, prompt=listed(entry, "prompt_token_ids"), reply=listed(entry, "token_ids"))
        for entry, table in zip(entries, tables, strict=True)
    ]
    answers.add(choices, usage)


def _vllm_table(value: object) -> npt.NDArray[Any]:
    """Return vLLM's experts [tokens, layers, top_k] from base64 of a `.npy` array or from nested lists.

    Raises InputError.
    """
    if not isinstance(value, str):
        if value == []:
            return np.zeros((0, 0, 0), np.int64)
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
