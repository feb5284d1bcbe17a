"""Predictions of any cost model beside measurements, from a table: what other people's tools write to be guarded by `moeplan check`.

    scenario,predicted,measured,low,high,measured_low,measured_high
    llama-70b at batch 8,41.2,39.8,,,,

Modelled: CSV with these columns, JSON (a list of objects with these keys, or an object whose `pairs` is one); `predicted` is left empty
(null, nan) where the tool has no answer; `low` and `high` are the ends of its interval, `measured_low` and `measured_high` of repeated
measurements. Further columns are ignored. Ignored: what the figures are and in which units; a scenario is one figure.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ..base.errors import InputError
from ..base.plain_json import parse
from ..base.text_files import read_text
from ..base.units import MIB
from .document import GIVEN, Figure, Measured, Pinned, Scenario, rounded

_MAX_BYTES = 64 * MIB
_MAX_ROWS = 1_000_000
_NEEDED = ("scenario", "predicted", "measured")
_ENDS = (("low", "high"), ("measured_low", "measured_high"))
_REMEDY = "write the columns scenario, predicted, measured"
_NONE = ("", "none", "null", "nan", "na", "n/a", "inf", "-inf")


def read_pairs(path: str | os.PathLike[str], option: str) -> dict[str, Pinned]:
    """Return the scenarios of a table of (scenario, predicted, measured); raises InputError with the line that is wrong."""
    text, name = read_text(path, option, _MAX_BYTES), os.fspath(path)
    rows = _from_json(text, option, name) if text.lstrip()[:1] in ("[", "{") else _from_csv(text, option, name)
    found: dict[str, Pinned] = {}
    for where, row in rows:
        pinned = _pinned(f"{option}: {where}", row)
        if pinned.scenario.name in found:
            raise InputError(f"{option}: {where}", pinned.scenario.name, "is there twice", "give every scenario once")
        if len(found) == _MAX_ROWS:
            raise InputError(option, name, f"more than {_MAX_ROWS:,} rows", "give fewer")
        found[pinned.scenario.name] = pinned
    if not found:
        raise InputError(option, name, "no row in it", _REMEDY)
    return found


def _from_csv(text: str, option: str, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    try:
        columns = [column.strip() for column in reader.fieldnames or ()]
        reader.fieldnames = columns
        absent = [column for column in _NEEDED if column not in columns]
        if absent:
            raise InputError(option, name, f"has no column {absent[0]!r}", _REMEDY)
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{option}: line {reader.line_num}", name, "more or fewer cells than columns", _REMEDY)
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise InputError(f"{option}: line {reader.line_num}", name, f"not CSV ({error})", _REMEDY) from None


def _from_json(text: str, option: str, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        content = parse(text, allow_nan=True)
    except ValueError as error:
        raise InputError(option, name, str(error), _REMEDY) from None
    rows = content.get("pairs") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise InputError(option, name, "neither a list of pairs nor an object with one", 'write {"pairs": [{…}]}')
    for number, row in enumerate(rows):
        where = f"pairs[{number}]"
        if not isinstance(row, dict) or not set(_NEEDED) <= set(row):
            raise InputError(f"{option}: {where}", row, f"no object with {', '.join(_NEEDED)}", _REMEDY)
        yield where, row


def _pinned(where: str, row: Mapping[str, Any]) -> Pinned:
    scenario = str(row["scenario"]).strip()
    if not scenario:
        raise InputError(f"{where}: scenario", row["scenario"], "a scenario without a name", "name every scenario")
    measured = _number(f"{where}: measured", row["measured"])
    if not measured:
        raise InputError(f"{where}: measured", row["measured"], "not a number other than 0", "leave the row out")
    numbers = {name: _number(f"{where}: {name}", row.get(name)) for pair in _ENDS for name in pair}
    for low, high in _ENDS:
        if (numbers[low] is None) != (numbers[high] is None):
            raise InputError(
                f"{where}: {low}", row.get(low), "one end of an interval without the other", "give both or none"
            )
        if numbers[low] is not None and numbers[high] is not None and numbers[low] > numbers[high]:  # type: ignore[operator]
            raise InputError(f"{where}: {low}", row.get(low), "lies above the high end", "turn them around")
    figures: dict[str, Figure] = {"predicted": rounded(_number(f"{where}: predicted", row["predicted"]))}
    if numbers["low"] is not None:
        figures |= {name: rounded(numbers[name]) for name in ("low", "high")}
    return Pinned(
        scenario=Scenario(name=scenario, command=GIVEN, options={}), figures=figures,
        measured={"predicted": Measured(value=measured, low=numbers["measured_low"], high=numbers["measured_high"])},
    )  # fmt: skip


def _number(where: str, given: Any) -> float | None:
    """Return a finite number, None where there is none; raises InputError for anything else."""
    if given is None or (isinstance(given, str) and given.strip().lower() in _NONE):
        return None
    if isinstance(given, (int, float, str)) and not isinstance(given, bool):
        try:
            value = float(given)
        except (ValueError, OverflowError):
            raise InputError(where, given, "not a number", "write plain decimals") from None
        return value if math.isfinite(value) else None
    raise InputError(where, given, "not a number", "write plain decimals")
