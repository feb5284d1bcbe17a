"""Reading JSON that a stranger wrote: whole documents or one document per line, within a size limit.

Modelled: the three ways people keep API answers: one object, a list of objects, one object per line. Ignored: streaming
of single documents larger than memory.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator
from typing import Any

from ...base import plain_json, text_files
from ...base.errors import InputError
from ...base.units import MIB
from .refusal import unreadable

MAX_JSON_BYTES = 512 * MIB


def read_text(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> str:
    """Return the text of a file. Raises InputError when it is missing, not text or larger than `max_bytes`."""
    return text_files.read_text(path, "path", max_bytes)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the one JSON document in a file. Raises InputError."""
    return parse_json(read_text(path), str(path))


def read_json_documents(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the JSON objects of a file that holds one, a list of them, or one per line. Raises InputError."""
    text = read_text(path)
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].lstrip().startswith("{") and lines[0].rstrip().endswith("}"):
        documents = [parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    else:
        document = parse_json(text, str(path))
        documents = document if isinstance(document, list) else [document]
    for document in documents:
        if not isinstance(document, dict):
            rule = "must hold JSON objects"
            raise InputError(
                "path", str(path), rule, "give the answer of the server, a list of answers, or one per line"
            )
    return documents


def parse_json(text: str, where: str) -> Any:
    """Return the JSON document in `text`. Raises InputError that names `where`."""
    try:
        return plain_json.parse(text, allow_nan=True)
    except (ValueError, MemoryError) as error:
        rule, remedy = "is not a complete JSON document", "give the file as the source wrote it"
        raise unreadable(where, rule, error, remedy) from None


def decode_base64(text: object, name: str) -> bytes:
    """Return the bytes that a base64 string holds. Raises InputError."""
    try:
        return base64.b64decode(str(text).encode("ascii"), validate=True)
    except (ValueError, binascii.Error):
        raise InputError(name, text, "is not base64", "give the answer of the server unchanged") from None


def items(value: object, name: str) -> Iterator[dict[str, Any]]:
    """Return the objects of a JSON list. Raises InputError when it is not a list of objects."""
    if not isinstance(value, list):
        raise InputError(name, type(value).__name__, "must be a list", "check the recording")
    for entry in value:
        if not isinstance(entry, dict):
            raise InputError(name, type(entry).__name__, "must hold objects", "check the recording")
        yield entry
