"""How many examples a property draws: few, so that the tests stay quick, or many where MOEPLAN_LONG=1 asks for them."""

from __future__ import annotations

import os

LONG = os.environ.get("MOEPLAN_LONG", "") not in ("", "0")
_TIMES = 20


def examples(few: int) -> int:
    """Return the number of examples to draw: `few`, or many times as many."""
    return few * _TIMES if LONG else few
