"""JSON files read with one clear complaint for whatever is wrong with them.

Modelled: files that are absent, unreadable, too large, not text, not JSON, or JSON of another kind than an object. Ignored: what
the values mean.
"""

from __future__ import annotations

import os
from typing import Any

from . import plain_json, text_files
from .errors import InputError
from .units import MIB

MAX_CONFIG_BYTES = 4 * MIB
"""Largest model or hardware file that is read; real ones are a few kilobytes."""


def read_text(path: str | os.PathLike[str], what: str, max_bytes: int = MAX_CONFIG_BYTES) -> str:
    """Return the text of the file at `path`, of a configuration's size at most; raises InputError (see `text_files`)."""
    return text_files.read_text(path, what, max_bytes)


def parse_json(text: str, what: str, where: str, *, allow_nan: bool = False) -> dict[str, Any]:
    """Return the JSON object that `text` holds; raises InputError for anything else, truncation named as such."""
    try:
        data = plain_json.parse(text, allow_nan=allow_nan)
    except ValueError as error:
        raise InputError(what, where, str(error), "write the file anew") from None
    if not isinstance(data, dict):
        rule = f"a JSON {type(data).__name__} where an object is expected"
        raise InputError(what, where, rule, "check that it is the right file")
    return data


def read_json(path: str | os.PathLike[str], what: str, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Return the JSON object in the file at `path`; raises InputError with one line for whatever is wrong with it."""
    return parse_json(read_text(path, what, max_bytes), what, os.fspath(path))
