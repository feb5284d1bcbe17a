"""What a command prints of the settings it was given.

Modelled: one line for each, with what stood there before. Ignored: what settings change (`api.settings`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from ...reports import numbers


def print_settings(document: Mapping[str, Any]) -> None:
    """Print what a document says was set, and what it was."""
    for one in document.get("set_by_user", ()):
        was = one["was"]
        known = isinstance(was, (int, float)) and not isinstance(was, bool)
        shown = "absent" if was is None else numbers.constant(one["key"], was) if known else str(was).lower()
        typer.echo(f"  set       {one['setting']} (was {shown})")
