"""Reader of request lengths: a server's log, one request a row, as CSV or JSON Lines.

Modelled: this project's columns, and those of the public logs that people replay: the two Azure inference traces
(`ContextTokens`, `GeneratedTokens`), BurstGPT (`Request tokens`, `Response tokens`), Mooncake (`input_length`, `output_length`).
Ignored: when requests came, and further columns.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

from ....base.errors import InputError
from ...lengths import MOST_TOKENS, RequestLengths
from .text_rows import Row, csv_rows, integer, json_rows

_PROMPT = ("prompt_tokens", "ContextTokens", "Request tokens", "input_length", "input_tokens")
_REPLY = ("reply_tokens", "GeneratedTokens", "Response tokens", "output_length", "output_tokens", "completion_tokens")
_CACHED = ("cached_tokens",)


def read_lengths(path: str | os.PathLike[str], count: int) -> RequestLengths:
    """Return the lengths of the first `count` requests of a file, of all where it has fewer.

    Requests without any token are left out: a log holds those that failed. Raises InputError.
    """
    where = "--lengths"
    rows = json_rows(path) if os.fspath(path).lower().endswith((".jsonl", ".json", ".ndjson")) else csv_rows(path)
    found = list(itertools.islice(_requests(rows), count))
    if not found:
        raise InputError(where, os.fspath(path), "no request in it", "give a file of one request a row")
    prompt, reply, cached = zip(*found, strict=True)
    return RequestLengths(prompt=prompt, reply=reply, cached=cached)


def _requests(rows: Iterator[tuple[str, Row]]) -> Iterator[tuple[int, int, int]]:
    for where, row in rows:
        prompt, reply = _tokens(row, _PROMPT, where), _tokens(row, _REPLY, where)
        cached = _tokens(row, _CACHED, where, default=0)
        if cached and cached >= prompt:
            rule = f"the prompt has {prompt} tokens, and at least its last is computed"
            raise InputError(f"{where}: cached_tokens", cached, rule, "give fewer")
        if prompt + reply:
            yield prompt, reply, cached


def _tokens(row: Row, names: tuple[str, ...], where: str, default: int | None = None) -> int:
    for name in names:
        if name in row:
            return _count(row[name], f"{where}: {name}")
    if default is None:
        raise InputError(where, ", ".join(map(str, row))[:80], f"no column {names[0]}", f"name one {', '.join(names)}")
    return default


def _count(value: Any, where: str) -> int:
    found = integer(value, where)
    if not 0 <= found <= MOST_TOKENS:
        raise InputError(where, found, f"must be 0 to {MOST_TOKENS} tokens", "check the columns")
    return found
