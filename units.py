"""Scale literals and the parsing and printing of quantities. Every power of ten or of 1024 in the package comes from here.

Modelled: decimal (kB, MB, GB, TB) and binary (KiB, MiB, GiB, TiB) byte scales, kept apart because a "GB" that means a
GiB is 7 % wrong. Ignored: bits per second, locale-specific formats.
"""

from __future__ import annotations

import math
import re

from .errors import InputError

KILO, MEGA, GIGA, TERA = 10**3, 10**6, 10**9, 10**12
KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
NS_PER_S, US_PER_S, MS_PER_S = 10**9, 10**6, 10**3
NS_PER_US = 10**3

_SUFFIX = {
    "": 1, "b": 1,
    "kb": KILO, "mb": MEGA, "gb": GIGA, "tb": TERA,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB,
}  # fmt: skip
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*\Z")
_MAX_BYTES = 2**60


def parse_bytes(text: str | int, field: str = "bytes") -> int:
    """Return the number of bytes that `text` names ("6GiB", "500 MB", "1024").

    Raises InputError for an unknown suffix, a negative, non-finite or absurd (above 2**60) amount.
    """
    remedy = "write for instance 6GiB (2**30 bytes each) or 6GB (10**9 bytes each)"
    match = _QUANTITY.match(str(text))
    if match is None:
        raise InputError(field, text, "not a non-negative number with a byte suffix", remedy)
    scale = _SUFFIX.get(match[2].lower())
    if scale is None:
        raise InputError(field, text, f"unknown suffix {match[2]!r}", remedy)
    amount = float(match[1]) * scale
    if not math.isfinite(amount) or amount > _MAX_BYTES:
        raise InputError(field, text, "more than 2**60 bytes", remedy)
    return round(amount)


def format_bytes(num_bytes: int) -> str:
    """Return `num_bytes` in the largest binary unit that keeps the number at or above one, e.g. "5.94 GiB"."""
    for scale, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= scale:
            return f"{num_bytes / scale:.2f} {name}"
    return f"{num_bytes} B"


def seconds_to_ns(seconds: float) -> int:
    """Return `seconds` rounded up to whole nanoseconds (rounding up keeps every activity's cost above zero).

    Raises InputError when the value is negative or not finite.
    """
    if not math.isfinite(seconds) or seconds < 0:
        raise InputError("seconds", seconds, "a duration is finite and not negative", "check the profile's constants")
    return math.ceil(seconds * NS_PER_S)
