"""The file of pinned figures: scenario → how it is asked and what was said, as text that can be reviewed line by line.

Modelled: format version 1, one figure a line, everything sorted; whole numbers exact, others to 12 significant digits, so that the last
bits of a processor's arithmetic do not count. Ignored: where figures come from (`figures`), and what a difference means (`compare`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..base.errors import InputError
from ..base.plain_json import parse
from ..base.text_files import read_text

FORMAT_VERSION = 1
DIGITS = 12
_MAX_BYTES = 64 * 2**20

Figure: TypeAlias = int | float | str | bool | None
"""A pinned value. Text is a choice or a refusal (`bound`, `refused`), null a figure that there is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One question: a command, and its options by name, as plain values."""

    name: str
    command: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """A scenario and its figures, by name."""

    scenario: Scenario
    figures: Mapping[str, Figure]


Baseline: TypeAlias = Mapping[str, Pinned]
"""Pinned scenarios, by name."""


def rounded(value: Any) -> Figure:
    """Return a value as the file keeps it: whole numbers exact, others to 12 significant digits, endless ones as words."""
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, float):
        return float(f"{plain:.{DIGITS}g}") if math.isfinite(plain) else str(plain)
    if plain is None or isinstance(plain, (bool, int, str)):
        return plain
    raise TypeError(f"no figure: {plain!r}")


def to_text(baseline: Baseline) -> str:
    """Return the file's text: equal baselines give equal bytes."""
    blocks = [_block(baseline[name]) for name in sorted(baseline)]
    return f'{{\n"format_version": {FORMAT_VERSION},\n"scenarios": {{\n' + ",\n".join(blocks) + "\n}\n}\n"


def _block(pinned: Pinned) -> str:
    scenario = pinned.scenario
    figures = [f"  {_plain(name)}: {_plain(pinned.figures[name])}" for name in sorted(pinned.figures)]
    lines = [
        f"{_plain(scenario.name)}: {{",
        f' "command": {_plain(scenario.command)},',
        f' "options": {_plain(scenario.options)},',
        ' "figures": {\n' + ",\n".join(figures) + "\n }",
    ]
    return "\n".join(lines) + "\n}"


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False)


def read_baseline(path: str | os.PathLike[str]) -> dict[str, Pinned]:
    """Return the pinned scenarios of a file; raises InputError for anything else than such a file."""
    field = os.fspath(path)
    try:
        content = parse(read_text(path, "baseline", _MAX_BYTES))
    except ValueError as error:
        raise InputError(field, "its content", str(error), "give a file of pinned figures") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version") if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"{field}: format_version", found, f"this version reads {FORMAT_VERSION}", "write the file again"
        )
    scenarios = content.get("scenarios")
    if not isinstance(scenarios, dict):
        raise InputError(f"{field}: scenarios", scenarios, "no object of scenarios", "write the file again")
    return {name: _pinned(field, name, entry) for name, entry in scenarios.items()}


def _pinned(field: str, name: str, entry: Any) -> Pinned:
    where = f"{field}: {name}"
    if not isinstance(entry, dict) or set(entry) != {"command", "options", "figures"}:
        raise InputError(where, entry, "not an object of command, options and figures", "write the file again")
    command, options, figures = entry["command"], entry["options"], entry["figures"]
    if not isinstance(command, str) or not isinstance(options, dict) or not isinstance(figures, dict):
        raise InputError(where, command, "command is a word, options and figures are objects", "write the file again")
    for figure, value in figures.items():
        if isinstance(value, (list, dict)):
            raise InputError(f"{where}: {figure}", value, "a figure is one value", "write the file again")
    return Pinned(scenario=Scenario(name=name, command=command, options=options), figures=figures)
