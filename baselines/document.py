"""The file of pinned figures: scenario → how it is asked, what was said and what was measured, as text for a line-by-line review.

Modelled: format version 2, one figure a line, everything sorted; whole numbers exact, others to 12 significant digits, so that the last
bits of a processor's arithmetic do not count; fingerprints of the data a scenario is about, and of the rules of judging. Ignored: where
figures come from (`figures`), and what a difference means (`compare`, `judge`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..base.errors import InputError
from ..base.plain_json import parse
from ..base.text_files import read_text

FORMAT_VERSION = 2
DIGITS = 12
GIVEN = "given"
"""The command of a scenario that another tool has predicted."""
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
class Measured:
    """What was really measured of a figure, and where repetitions lay."""

    value: float
    low: float | None = None
    high: float | None = None
    """Both or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """A scenario and its figures, by name."""

    scenario: Scenario
    figures: Mapping[str, Figure]
    measured: Mapping[str, Measured] = field(default_factory=dict)
    """By the name of the figure that predicts it."""
    data: str | None = None
    """Fingerprint of what the scenario is about, apart from what predicts it: recording, model, published figures."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file says of all of its scenarios."""

    rules: str = ""
    """Fingerprint of the rules that tell a regression from a drift."""
    review: Mapping[str, Any] | None = None
    """Why the file was written over figures that were better, and which those are; None where none was."""


def to_text(baseline: Baseline, header: Header | None = None) -> str:
    """Return the file's text: equal baselines give equal bytes."""
    header = header or Header()
    blocks = [_block(baseline[name]) for name in sorted(baseline)]
    top = [f'"format_version": {FORMAT_VERSION}', f'"rules": {_plain(header.rules)}']
    if header.review is not None:
        top.append(
            f'"review": {json.dumps(header.review, sort_keys=True, allow_nan=False, ensure_ascii=False, indent=1)}'
        )
    return "{\n" + ",\n".join(top) + ',\n"scenarios": {\n' + ",\n".join(blocks) + "\n}\n}\n"


def _block(pinned: Pinned) -> str:
    scenario = pinned.scenario
    lines = [
        f"{_plain(scenario.name)}: {{",
        f' "command": {_plain(scenario.command)},',
        f' "options": {_plain(scenario.options)},',
        *([] if pinned.data is None else [f' "data": {_plain(pinned.data)},']),
        f' "figures": {_lines(pinned.figures)}' + ("," if pinned.measured else ""),
        *(
            [f' "measured": {_lines({name: _numbers(one) for name, one in pinned.measured.items()})}']
            if pinned.measured
            else []
        ),
    ]
    return "\n".join(lines) + "\n}"


def _lines(values: Mapping[str, Any]) -> str:
    return "{\n" + ",\n".join(f"  {_plain(name)}: {_plain(values[name])}" for name in sorted(values)) + "\n }"


def _numbers(one: Measured) -> float | list[float]:
    return one.value if one.low is None or one.high is None else [one.value, one.low, one.high]


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False)


def read_baseline(path: str | os.PathLike[str]) -> dict[str, Pinned]:
    """Return the pinned scenarios of a file; raises InputError for anything else than such a file."""
    return open_baseline(path)[0]


def open_baseline(path: str | os.PathLike[str]) -> tuple[dict[str, Pinned], Header]:
    """Return the pinned scenarios of a file and what it says of all of them; raises InputError for anything else."""
    where = os.fspath(path)
    try:
        content = parse(read_text(path, "baseline", _MAX_BYTES))
    except ValueError as error:
        raise InputError(where, "its content", str(error), "give a file of pinned figures") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version") if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"{where}: format_version", found, f"this version reads {FORMAT_VERSION}", "write the file again"
        )
    scenarios, rules, review = content.get("scenarios"), content.get("rules", ""), content.get("review")
    if not isinstance(scenarios, dict):
        raise InputError(f"{where}: scenarios", scenarios, "no object of scenarios", "write the file again")
    if not isinstance(rules, str) or not (review is None or isinstance(review, dict)):
        raise InputError(f"{where}: rules", rules, "rules are a text, a review is an object", "write the file again")
    return {name: _pinned(where, name, entry) for name, entry in scenarios.items()}, Header(rules=rules, review=review)


_NEEDED, _MAY = {"command", "options", "figures"}, {"measured", "data"}


def _pinned(path: str, name: str, entry: Any) -> Pinned:
    where = f"{path}: {name}"
    if not isinstance(entry, dict) or not _NEEDED <= set(entry) <= _NEEDED | _MAY:
        raise InputError(where, entry, "not an object of command, options and figures", "write the file again")
    command, options, figures = entry["command"], entry["options"], entry["figures"]
    measured, data = entry.get("measured", {}), entry.get("data")
    if not isinstance(command, str) or not all(isinstance(one, dict) for one in (options, figures, measured)):
        rule = "command is a word, options, figures and measured are objects"
        raise InputError(where, command, rule, "write the file again")
    if data is not None and not isinstance(data, str):
        raise InputError(f"{where}: data", data, "a fingerprint is a text", "write the file again")
    for figure, value in figures.items():
        if isinstance(value, (list, dict)):
            raise InputError(f"{where}: {figure}", value, "a figure is one value", "write the file again")
    return Pinned(
        scenario=Scenario(name=name, command=command, options=options), figures=figures, data=data,
        measured={figure: _measured(f"{where}: measured {figure}", value) for figure, value in measured.items()},
    )  # fmt: skip


def _measured(where: str, given: Any) -> Measured:
    numbers = given if isinstance(given, list) else [given]
    plain = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in numbers)
    if not plain or len(numbers) not in (1, 3) or numbers[0] == 0:
        raise InputError(where, given, "neither a number other than 0 nor [value, low, high]", "write the file again")
    if len(numbers) == 3 and not numbers[1] <= numbers[2]:
        raise InputError(where, given, "its low end lies above its high end", "write the file again")
    return Measured(**dict(zip(("value", "low", "high"), map(float, numbers), strict=False)))
