"""All-to-alls as nccl-tests measured them (`alltoall_perf`), as text or JSON (`-J`), as samples.

Modelled: the out-of-place time of each size. The tool's size is what a rank holds, its own part included; what it
sends to others is that times (n − 1)/n. Rows with wrong results are refused. Ignored: in-place times (the exchange has
none), other collectives.
"""

from __future__ import annotations

import math
import re
from typing import Any

from ...base import plain_json
from ...base.errors import InputError
from ...base.units import US_PER_S
from ..samples import Sample

_RANK = re.compile(r"^#\s+Rank\s+(\d+)\b", re.MULTILINE)
_ROW = re.compile(r"^\s*\d+\s+\d+\s+\w+", re.MULTILINE)
# time, algbw, busbw, #wrong: out of place, then in place.
_MEASURED_COLUMNS = 8


def read_nccl_tests(text: str, *, ranks: int | None = None, pattern: str = "balanced") -> list[Sample]:
    """Return samples of all-to-alls from nccl-tests' output, text or JSON.

    ranks: how many took part, where the output does not list them. Raises InputError for output of another form, with wrong
    results, or of another collective.
    """
    rows, counted = _rows_of_json(text) if text.lstrip().startswith("{") else _rows_of_text(text)
    number = ranks or counted
    if not number or number < 2:
        raise InputError("ranks", number, "the output does not say how many took part", "give ranks")
    if not rows:
        raise InputError("nccl-tests", "(text)", "no measured rows", "give the output of alltoall_perf")
    return [
        Sample(
            kind="all_to_all",
            labels={"backend": "nccl", "pattern": pattern, "companion": "none"},
            arguments={"ranks": number, "bytes": size * (number - 1) // number},
            seconds=(time_us / US_PER_S,),
        )
        for size, time_us in rows
        if size >= number
    ]


def _rows_of_text(text: str) -> tuple[list[tuple[int, float]], int]:
    """Return (size in bytes, microseconds) of each row, and the number of ranks listed."""
    names = re.search(r"nccl-tests.*|Collective test starting:\s*(\w+)", text)
    if names is not None and names.group(1) and "alltoall" not in names.group(1).lower():
        raise InputError("nccl-tests", names.group(1), "not an all-to-all", "give the output of alltoall_perf")
    rows = []
    for line in text.splitlines():
        if line.lstrip().startswith("#") or not _ROW.match(line):
            continue
        parts = line.split()
        if len(parts) < 3 + _MEASURED_COLUMNS:
            raise InputError("nccl-tests", line.strip(), "a row with columns missing", "give the whole output")
        time_us, wrong = parts[-_MEASURED_COLUMNS], parts[-_MEASURED_COLUMNS + 3]
        rows.append((int(parts[0]), _time(time_us, wrong, line.strip())))
    return rows, len(set(_RANK.findall(text)))


def _rows_of_json(text: str) -> tuple[list[tuple[int, float]], int]:
    """Return (size in bytes, microseconds) of each result, and the number of devices listed."""
    try:
        document = plain_json.parse(text, allow_nan=True)
    except ValueError:
        raise InputError(
            "nccl-tests", "(text)", "not JSON", "give the file that -J wrote, or the text output"
        ) from None
    results = document.get("results") if isinstance(document, dict) else None
    if not isinstance(results, list):
        raise InputError("nccl-tests", "(text)", "no results", "give the file that -J wrote")
    rows = []
    for at, result in enumerate(results):
        place: Any = result.get("out_of_place") if isinstance(result, dict) else None
        if not isinstance(place, dict) or not isinstance(result.get("size"), int):
            raise InputError(f"nccl-tests: results[{at}]", result, "no size or no out_of_place", "measure again")
        rows.append((result["size"], _time(place.get("time"), place.get("nwrong"), f"results[{at}]")))
    config = document.get("config")
    devices = config.get("devices") if isinstance(config, dict) else None
    return rows, len(devices) if isinstance(devices, list) else 0


def _time(value: Any, wrong: Any, where: str) -> float:
    """Return microseconds; raises InputError for a time that is none, or a result that was wrong."""
    try:
        time_us = float(value)
        errors = 0.0 if wrong in (None, "N/A") else float(wrong)
    except (TypeError, ValueError):
        raise InputError("nccl-tests", where, "not a time", "measure again") from None
    if not math.isfinite(time_us) or time_us <= 0:
        raise InputError("nccl-tests", where, "not a time above zero", "measure again")
    if errors:
        raise InputError("nccl-tests", where, f"{errors:g} wrong values", "find out why before trusting its times")
    return time_us
