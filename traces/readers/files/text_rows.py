"""Rows of text tables, JSON Lines and CSV, one at a time.

Modelled: files of any length in constant memory; commas, semicolons or tabs between columns; every way in which a line can be no row.
Ignored: what the columns mean.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from typing import Any

from ....base.errors import InputError
from ....base.text_files import refuse_devices
from ....base.units import MIB, format_bytes
from ...files.json_input import MAX_JSON_BYTES, parse_json
from ...files.refusal import unreadable

_MAX_LINE_BYTES = 16 * MIB
Row = dict[str, Any]


def json_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, Row]]:
    """Return (where, object) of each line. Raises InputError."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"line {number}"
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise InputError(where, type(row).__name__, "must be an object", "give one JSON object a line")
        yield where, row


def csv_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, Row]]:
    """Return (where, column → text) of each line after the first. Raises InputError."""
    lines = _lines(path)
    header = next(lines, "")
    delimiter = max(",;\t", key=header.count)
    try:
        columns = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        if len(set(columns)) != len(columns):
            raise InputError("columns", columns[:20], "a name occurs twice", "name every column once")
        for number, cells in enumerate(csv.reader(lines, delimiter=delimiter), 2):
            if not cells:
                continue
            if len(cells) != len(columns):
                rule = f"has {len(cells)} cells for {len(columns)} columns"
                raise InputError(f"line {number}", ", ".join(cells)[:80], rule, "quote lists that hold the separator")
            yield f"line {number}", dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise unreadable(path, "cannot be read as CSV", error, "give a complete text file") from None


def _lines(path: str | os.PathLike[str]) -> Iterator[str]:
    """Return the lines of a text file, one at a time. Raises InputError when it is no text, or a line or it is too long."""
    try:
        refuse_devices(path)
        with open(path, "rb") as file:
            read = 0
            first = True
            while line := file.readline(_MAX_LINE_BYTES + 1):
                read += len(line)
                if len(line) > _MAX_LINE_BYTES:
                    raise ValueError(f"a line of more than {format_bytes(_MAX_LINE_BYTES)}")
                if read > MAX_JSON_BYTES:
                    raise ValueError(f"more than {format_bytes(MAX_JSON_BYTES)}")
                yield line.decode("utf-8-sig" if first else "utf-8")
                first = False
    except (OSError, ValueError, MemoryError) as error:
        raise unreadable(path, "cannot be read as text", error, "give a complete text file") from None


def integer(value: object, where: str) -> int:
    """Return a whole number, of JSON or of a text. Raises InputError."""
    if isinstance(value, str):
        text = value.strip()
        digits = text.removeprefix("-").removesuffix(".0")
        value = int(text.removesuffix(".0")) if digits.isascii() and digits.isdigit() and len(digits) < 16 else value
    if type(value) is not int or not (-(1 << 62) < value < 1 << 62):
        raise InputError(where, value, "must be a whole number", "check the columns")
    return value
