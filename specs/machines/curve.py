"""A measured cost as a table of a machine's profile.

Modelled: seconds at given arguments, with source and uncertainty. Ignored: the form that fits them (`calibrate.costs.forms`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A measured cost as a table: seconds at given arguments."""

    arguments: Mapping[str, tuple[float, ...]]
    """Named axes; every axis has as many entries as `seconds`."""
    seconds: tuple[float, ...]
    relative_uncertainty: float
    source: str = "measured"
    citation: str = ""
