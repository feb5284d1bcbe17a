"""What a machine's constants may be: ranges by the last word of a name, and what is a number.

Modelled: limits so wide that they only keep sums, quotients and nanoseconds finite. Ignored: what is plausible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ...base.errors import InputError

# What a constant's last name says about the range of its value: (ending, least, most, in words). Limits are wide: they
# keep sums, quotients and nanoseconds finite, and catch slips of many powers of ten.
_RANGES = (
    ("bytes_per_s", 1.0, 1e18, "bytes per second"),
    ("flops_per_s", 1.0, 1e21, "operations per second"),
    ("memory_bytes", 2.0**20, 1e18, "bytes"),
    ("_efficiency", 1e-3, 1.0, "a share of a peak"),
    ("_bytes", 0.0, 1e18, "bytes"),
    ("_s", 0.0, 3600.0, "seconds"),
    ("kernels_per_dense_layer", 0.0, 1e6, "a number of kernels"),
    ("kernels_per_head", 0.0, 1e6, "a number of kernels"),
    ("tile_tokens", 0.0, 1e6, "a number of tokens"),
)
# Beyond that a figure says nothing: the value may be nought, or a hundred times as large.
MOST_UNCERTAIN = 100.0
LEAST_TOGETHER = 1e-2
"""The least share of its own speed that a lane can be said to keep beside another; what is less was something else."""
_SPEED_TOGETHER = (LEAST_TOGETHER, 1.0, "a share of the speed alone")


def constant_range(name: str) -> tuple[float, float]:
    """Return the least and the most value that the constant called `name` may have."""
    return range_of(name)[:2]


def range_of(name: str) -> tuple[float, float, str]:
    """Return (least, most, in words) for the constant called `name`."""
    if name.startswith("contention."):
        return _SPEED_TOGETHER
    # Tables of constants are named after what they hold: `peak_flops_per_s.float16`.
    kinds = [part for part in name.split(".") if part.endswith(tuple(ending for ending, *_ in _RANGES))]
    return next((least, most, words) for ending, least, most, words in _RANGES if kinds[-1].endswith(ending))


def check_uncertainty(name: str, fraction: float) -> None:
    """Return nothing; raises InputError for a relative uncertainty beyond which a figure says nothing."""
    if fraction > MOST_UNCERTAIN:
        rule = f"at most {MOST_UNCERTAIN:g}, a share of the value, expected"
        raise InputError(f"{name}.relative_uncertainty", fraction, rule, "correct the profile")


def check_number(name: str, number: object) -> None:
    """Return nothing; raises InputError for what is no finite number of at least zero."""
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < math.inf:
        raise InputError(name, number, "not a finite number of at least zero", "correct the profile")


def check_points(
    name: str, arguments: Mapping[str, Sequence[float]], seconds: Sequence[float], uncertainty: float
) -> None:
    """Return nothing; raises InputError for points of a curve that are no numbers, none at all, or lack an argument."""
    lengths = {len(axis) for axis in arguments.values()} | {len(seconds)}
    if len(lengths) != 1 or not seconds:
        raise InputError(
            name, sorted(lengths), "axes and seconds of different or zero length", "give one argument per point"
        )
    for number in (*seconds, *(value for axis in arguments.values() for value in axis), uncertainty):
        check_number(name, number)
    check_uncertainty(name, uncertainty)
