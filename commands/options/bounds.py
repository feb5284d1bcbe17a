"""What a number on the command line may be: checked where it is read, so that every command refuses alike, before anything else.

Modelled: whole numbers and numbers with units in words, between a least and a most that keep sums finite and memory bounded.
Ignored: what a number must be because of another option or of a file (the command says so).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import typer

from ...base.errors import InputError
from ...base.units import parse_quantity

_Number = TypeVar("_Number", int, float)

PASSES = 2**31
"""Most forward passes, or tokens of one."""
REQUESTS_TOGETHER = 65_536
RANKS = 4096
CONTEXT_TOKENS = 2**30
TOKENS_PER_RANK = 2**20
SLOTS, MOVES = 2**20, 10**9
WEEK_S = 7 * 24 * 3600.0
TOKENS_PER_S = 1e9


def between(
    least: _Number, most: _Number, what: str
) -> Callable[[typer.CallbackParam, _Number | None], _Number | None]:
    """Return a check of one option, for `typer.Option(callback=…)`: its number lies from `least` to `most`, counted in `what`.

    The check returns the number, or None where the option is not given; it raises InputError for any other, NaN included.
    """

    def check(param: typer.CallbackParam, value: _Number | None) -> _Number | None:
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            kind = "a whole number" if isinstance(least, int) else "a number"
            rule = f"not {kind} from {_plain(least)} to {_plain(most)} ({what})"
            name = next((one for one in param.opts if one.startswith("--")), param.opts[0])
            raise InputError(name, value, rule, "give one in between")
        return value

    return check


def share(text: str, option: str) -> float:
    """Return a share from 0 to 1 of a text such as "10%" or "0.1"; raises InputError for any other."""
    value = parse_quantity(text, "share", option)
    if value > 1:
        raise InputError(option, text, "more than 1, the whole", "write a share, for instance 10% or 0.1")
    return value


def _plain(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:,.15g}"
