"""Copies as nvbandwidth measured them (`nvbandwidth -j`), as samples.

Modelled: copies of the copy engines between host and one device, each direction alone and with the other one running.
A sample's time is the buffer over the bandwidth reported; the tool's buffer is 512 MiB unless it was started with
`-b`. Ignored: copies by kernels, between devices, latencies, and test cases that did not pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...base import plain_json
from ...base.errors import InputError
from ...base.units import GIGA, MIB
from ..samples import Sample

DEFAULT_BUFFER_BYTES = 512 * MIB
# Test case: (direction, companion that runs meanwhile).
_CASES: Mapping[str, tuple[str, str | None]] = {
    "host_to_device_memcpy_ce": ("h2d", None),
    "device_to_host_memcpy_ce": ("d2h", None),
    "host_to_device_bidirectional_memcpy_ce": ("h2d", "d2h"),
    "device_to_host_bidirectional_memcpy_ce": ("d2h", "h2d"),
}


def read_nvbandwidth(text: str, *, device: int = 0, buffer_bytes: int = DEFAULT_BUFFER_BYTES) -> list[Sample]:
    """Return samples of host–device copies of `device` from the tool's JSON.

    Raises InputError for text of another form, or without any of these copies.
    """
    try:
        document = plain_json.parse(text, allow_nan=True)
    except ValueError:
        raise InputError("nvbandwidth", "(text)", "not JSON", "run nvbandwidth with -j") from None
    inner = document.get("nvbandwidth") if isinstance(document, dict) else None
    cases = inner.get("testcases") if isinstance(inner, dict) else None
    if not isinstance(cases, list):
        raise InputError("nvbandwidth", "(text)", "no nvbandwidth.testcases", "run nvbandwidth with -j")
    found = []
    for case in cases:
        if not isinstance(case, dict) or str(case.get("name")) not in _CASES or case.get("status") != "Passed":
            continue
        direction, companion = _CASES[str(case["name"])]
        rate = _cell(case, device)
        labels = {"direction": direction, "memory": "pinned"}
        found.append(
            Sample(
                kind="copy" if companion is None else "copy_while",
                labels=labels if companion is None else labels | {"companion": companion},
                arguments={"bytes": buffer_bytes},
                seconds=(buffer_bytes / (rate * GIGA),),
            )
        )
    if not found:
        raise InputError("nvbandwidth", "(text)", f"none of {', '.join(_CASES)} passed", "run these test cases")
    return found


def _cell(case: Mapping[str, Any], device: int) -> float:
    """Return a test case's bandwidth in GB/s; cells are strings."""
    name = case["name"]
    matrix = case.get("bandwidth_matrix")
    row = matrix[0] if isinstance(matrix, list) and matrix and isinstance(matrix[0], list) else None
    if row is None or not 0 <= device < len(row):
        raise InputError(
            f"nvbandwidth: {name}", matrix, f"no bandwidth of device {device}", "check the device's number"
        )
    try:
        rate = float(row[device])
    except (TypeError, ValueError):
        rate = math.nan
    if not math.isfinite(rate) or rate <= 0:
        raise InputError(f"nvbandwidth: {name}", row[device], "not a bandwidth above zero", "measure again")
    return rate
