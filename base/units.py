"""Scale literals and the parsing and printing of quantities. Every power of ten or of 1024 in the package comes from here.

Modelled: decimal (kB, MB, GB, TB) and binary (KiB, MiB, GiB, TiB) byte scales, kept apart because a "GB" that means a
GiB is 7 % wrong; rates, durations, operations and shares, told apart by the names of quantities. Ignored: locale-specific formats.
"""

from __future__ import annotations

import math
import re
import unicodedata
from fractions import Fraction

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


def parse_bytes(text: str | int, field: str = "bytes", *, bare: bool = False) -> int:
    """Return the number of bytes that `text` names ("6GiB", "500 MB", "1024B"); a whole number is bytes.

    bare: text without a unit is bytes too. Raises InputError for text without a unit otherwise ("24" is 24 GiB to one and 24 bytes to
    another), for an unknown one, for a negative, non-finite or absurd (above 2**60) amount.
    """
    remedy = "write for instance 6GiB (2**30 bytes each) or 6GB (10**9 bytes each)"
    match = _QUANTITY.match(str(text))
    if match is None:
        raise InputError(field, text, "not a non-negative number with a byte suffix", remedy)
    scale = _SUFFIX.get(match[2].lower())
    if scale is None:
        raise InputError(field, text, f"unknown suffix {match[2]!r}", remedy)
    if not match[2] and isinstance(text, str) and float(match[1]) and not bare:
        raise InputError(field, text, "has no unit", f"write {match[1]}GiB or {match[1]}MiB, or {match[1]}B for bytes")
    amount = float(match[1]) * scale
    if not math.isfinite(amount) or amount > _MAX_BYTES:
        raise InputError(field, text, "more than 2**60 bytes", remedy)
    return round(amount)


def format_rate(bytes_per_s: float) -> str:
    """Return a link's speed as people write it: decimal megabytes or gigabytes a second."""
    return f"{bytes_per_s / GIGA:.4g} GB/s" if bytes_per_s >= GIGA else f"{bytes_per_s / MEGA:.4g} MB/s"


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


# What a number may be, and the suffixes it may have; without one it is in the first unit of its kind.
_KINDS: dict[str, dict[str, Fraction]] = {
    "bytes/s": {
        "B/s": Fraction(1), "kB/s": Fraction(KILO), "MB/s": Fraction(MEGA), "GB/s": Fraction(GIGA), "TB/s": Fraction(TERA),
        "KiB/s": Fraction(KIB), "MiB/s": Fraction(MIB), "GiB/s": Fraction(GIB), "TiB/s": Fraction(TIB),
        "Mbit/s": Fraction(MEGA, 8), "Gbit/s": Fraction(GIGA, 8), "Tbit/s": Fraction(TERA, 8),
    },
    "FLOP/s": {
        "FLOP/s": Fraction(1), "GFLOP/s": Fraction(GIGA), "TFLOP/s": Fraction(TERA), "PFLOP/s": Fraction(KILO * TERA),
        "GFLOPS": Fraction(GIGA), "TFLOPS": Fraction(TERA), "PFLOPS": Fraction(KILO * TERA),
    },
    "s": {
        "s": Fraction(1), "ms": Fraction(1, MS_PER_S), "us": Fraction(1, US_PER_S), "µs": Fraction(1, US_PER_S),
        "ns": Fraction(1, NS_PER_S),
    },
    "share": {"%": Fraction(1, 100)},
    "number": {},
}  # fmt: skip
_EXAMPLES = {"bytes/s": "24GB/s", "FLOP/s": "165TFLOP/s", "s": "5us", "share": "0.9 or 90%", "number": "12"}
_ENDINGS = (
    ("bytes_per_s", "bytes/s"), ("flops_per_s", "FLOP/s"), ("_per_s", "number"), ("_bytes", "bytes"), ("_s", "s"),
    ("_efficiency", "share"), ("_fraction", "share"),
)  # fmt: skip
_NUMBER = re.compile(
    r"\s*((?:[0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:[eE][+-]?[0-9]{1,3})?)\s*([^\s0-9]\S{0,11})?\s*\Z"
)


def unit_of(name: str) -> str:
    """Return what the dotted `name` of a quantity says of its unit: bytes, bytes/s, FLOP/s, s, share or number.

    The innermost part that says one decides: `peak_flops_per_s.float16`, `contention.compute/h2d`.
    """
    for part in reversed(name.split(".")):
        if part == "contention":
            return "share"
        for ending, unit in _ENDINGS:
            if part.endswith(ending):
                return unit
    return "number"


def parse_quantity(text: str, unit: str, field: str) -> float:
    """Return the number that `text` names, in the base of `unit` (see `unit_of`): "24GB/s", "5us", "90%", "1.2e9".

    Raises InputError for another unit's suffix, a negative or non-finite number.
    """
    if unit == "bytes":
        return float(parse_bytes(text, field, bare=True))
    remedy = f"write for instance {_EXAMPLES[unit]}"
    match = _NUMBER.match(text)
    if match is None:
        raise InputError(field, text, "not a number that is finite and at least zero", remedy)
    scales = _KINDS[unit]
    suffix = unicodedata.normalize("NFKC", match[2] or "").replace("μ", "µ")  # a Greek mu or the micro sign
    if suffix and suffix not in scales:
        known = f"its units are {', '.join(scales)}" if scales else "it has no unit"
        raise InputError(field, text, f"unknown unit {match[2]!r}: {known}", remedy)
    try:
        return float(Fraction(match[1]) * scales.get(suffix, 1))
    except OverflowError:
        raise InputError(field, text, "not a finite number", remedy) from None
