"""Numbers as people read them: few digits, units said, thousands apart.

Modelled: a value keeps three significant digits unless told otherwise and is never shown in exponent form; a constant of a
profile is shown in the unit that its name declares (`_bytes_per_s`, `_s`, `_bytes`, `_flops_per_s`, efficiencies and ratios
as percentages). Ignored: locales. Exact values stay in the files; these are for reading only.
"""

from __future__ import annotations

import math

from ..base.units import GIB, GIGA, KIB, KILO, MEGA, MIB, MS_PER_S, NS_PER_S, TERA, TIB, US_PER_S

_DIGITS = 3
MINUS = "−"


def significant(value: float, digits: int = _DIGITS) -> str:
    """Return `value` with so many significant digits, thousands separated by commas; whole digits are never dropped."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "unknown" if math.isnan(value) else f"{MINUS}∞"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    rounded = round(value, decimals)
    # 9.996 rounds to 10.00, which has a digit too many.
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded)))) if rounded else decimals
    return f"{rounded:,.{decimals}f}".replace("-", MINUS)


def plain(value: float) -> str:
    """Return a whole number as it is, any other with three significant digits."""
    return f"{value:,.0f}".replace("-", MINUS) if value == round(value) else significant(value)


def percent(fraction: float, digits: int = 1, *, signed: bool = False) -> str:
    """Return a fraction as a percentage with `digits` decimals."""
    text = f"{fraction * 100:{'+' if signed else ''},.{digits}f} %"
    return text.replace("-", MINUS)


def seconds(value: float) -> str:
    """Return a duration in the largest unit that keeps the number at or above one."""
    for scale, unit in ((1, "s"), (MS_PER_S, "ms"), (US_PER_S, "µs")):
        if abs(value) * scale >= 1:
            return f"{significant(value * scale)} {unit}"
    return f"{significant(value * NS_PER_S)} ns" if value else "0 s"


def size(num_bytes: float) -> str:
    """Return a size in the largest binary unit that keeps the number at or above one."""
    for scale, unit in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= scale:
            return f"{significant(num_bytes / scale)} {unit}"
    return f"{num_bytes:,.0f} B"


def rate(bytes_per_s: float) -> str:
    """Return a bandwidth in decimal units."""
    for scale, unit in ((TERA, "TB/s"), (GIGA, "GB/s"), (MEGA, "MB/s"), (KILO, "kB/s")):
        if abs(bytes_per_s) >= scale:
            return f"{significant(bytes_per_s / scale)} {unit}"
    return f"{significant(bytes_per_s)} B/s"


def flops(per_s: float) -> str:
    """Return operations a second in decimal units."""
    for scale, unit in ((TERA, "TFLOP/s"), (GIGA, "GFLOP/s"), (MEGA, "MFLOP/s")):
        if abs(per_s) >= scale:
            return f"{significant(per_s / scale)} {unit}"
    return f"{significant(per_s)} FLOP/s"


def constant(name: str, value: float) -> str:
    """Return a profile's constant in the unit that its dotted `name` declares; a bare number where it declares none."""
    # The innermost name that says a unit decides: `peak_flops_per_s.float16`, `dequantise_efficiency.4`.
    for part in reversed(name.split(".")):
        if part.endswith("flops_per_s"):
            return flops(value)
        if part.endswith("_bytes_per_s"):
            return rate(value)
        if part.endswith("_bytes"):
            return size(value)
        if part.endswith("_s"):
            return seconds(value)
        if part.endswith("_efficiency") or part == "contention":
            return percent(value)
    return plain(value)
