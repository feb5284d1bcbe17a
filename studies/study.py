"""A study as people write it: what all runs share, and the axes whose levels are combined.

    study: link-and-memory
    base: {model: gpt-oss-120b, hardware: rtx-4090 + ryzen-9-7950x + ddr5-5600x2:96GiB, prompt_tokens: 64, reply_tokens: 16}
    grid:
      memory: [12GB, 24GB]                                          an axis over one field
      link:                                                         an axis of one's own: each level sets several fields
        PCIe 3.0: {machine.host_to_device.pinned_bytes_per_s: 12GB/s}
        PCIe 4.0: {machine.host_to_device.pinned_bytes_per_s: 25GB/s}
    cases: [{context: 4096, concurrency: 1}, {context: 1024, concurrency: 4}]
    seeds: [0, 1]

Modelled: options by their name, settings by their key, every key and level checked before anything runs. Ignored: what a combination
of levels means; the prediction itself says so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

from ..base.errors import InputError, UnknownName
from ..base.plain_yaml import parse
from ..base.text_files import read_text
from .fields import PLAN, QUESTIONS, Fields, checked_value, is_field

_MAX_BYTES = 2**24
_TOP = ("study", "predict", "base", "grid", "cases", "seeds", "repeats")
_MOST_RUNS = 10**7
_MOST_LEVELS = 10**6
_MOST_SEED = 2**31

StudyLike: TypeAlias = "Study | str | os.PathLike[str] | Mapping[str, Any]"
"""A study, its file, or the file's content as plain values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One level of an axis: what it is called, and the fields it sets."""

    label: str | int | float | bool | None
    sets: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What is varied, and over what."""

    name: str
    levels: tuple[Level, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A question, and everything it is asked over."""

    name: str
    predict: str
    """simulate, or plan."""
    base: Mapping[str, Any]
    axes: tuple[Axis, ...]
    where: str = "study"
    """What messages call it: its file."""

    @property
    def num_runs(self) -> int:
        """How many combinations of levels there are."""
        return math.prod(len(axis.levels) for axis in self.axes)

    def asked(self) -> Iterator[dict[str, Any]]:
        """Yield the fields of every run, in the order of their numbers: the last axis changes fastest."""
        for levels in product(*(axis.levels for axis in self.axes)):
            found = dict(self.base)
            for level in levels:
                found.update(level.sets)
            yield {name: value for name, value in found.items() if value is not None}

    def labels(self) -> dict[str, list[Any]]:
        """Return the labels of every axis's levels, by the axis's name: what a run's number stands for."""
        return {axis.name: [level.label for level in axis.levels] for axis in self.axes}


def open_study(given: StudyLike) -> Study:
    """Return a study; raises InputError for a file that is none, UnknownName with the nearest name for a key that does not exist."""
    if isinstance(given, Study):
        return given
    if isinstance(given, Mapping):
        return _study(dict(given), "study", Path.cwd(), "study")
    where = os.fspath(given)
    try:
        content = parse(read_text(given, "study", _MAX_BYTES))
    except ValueError as error:
        raise InputError("study", where, str(error), "give a study's file (.yaml)") from None
    if not isinstance(content, dict):
        raise InputError("study", where, "not a table of a study's keys", f"write {', '.join(_TOP)}")
    return _study(content, where, Path(where).resolve().parent, Path(where).stem)


def _study(content: dict[str, Any], where: str, folder: Path, stem: str) -> Study:
    for key in content:
        if key not in _TOP:
            raise UnknownName(where, key, _TOP)
    name, predict = content.get("study", stem), content.get("predict", QUESTIONS[0])
    if not isinstance(name, str) or not 0 < len(name) <= 80 or not name.isprintable():
        raise InputError(f"{where}: study", name, "not a name of 1 to 80 characters", "give a short name")
    if predict not in QUESTIONS:
        raise UnknownName(f"{where}: predict", predict, QUESTIONS)
    fields = Fields(predict=predict, folder=folder)
    base = _sets(content.get("base") or {}, f"{where}: base", fields)
    axes = _grid(content.get("grid") or {}, f"{where}: grid", fields)
    axes += _cases(content.get("cases"), f"{where}: cases", fields)
    axes += _seeds(content, where, predict)
    taken: dict[str, str] = dict.fromkeys(base, "base")
    for axis in axes:
        for key in {key for level in axis.levels for key in level.sets}:
            if key in taken:
                raise InputError(f"{where}: {key}", key, f"is set by {taken[key]} and by {axis.name}", "set it once")
            taken[key] = axis.name
    for needed in ("model", "hardware"):
        if needed not in taken:
            raise InputError(
                f"{where}: base.{needed}", "(absent)", "every run needs one", "name one in base, or in grid"
            )
    found = Study(name=name, predict=predict, base=base, axes=tuple(axes), where=where)
    if found.num_runs > _MOST_RUNS:
        raise InputError(where, found.num_runs, f"more than {_MOST_RUNS:,} runs", "give fewer levels")
    fields.check_settings(where, [base, *(level.sets for axis in axes for level in axis.levels)])
    return found


def _sets(given: Any, where: str, fields: Fields) -> dict[str, Any]:
    """Return the fields that a table sets, by their full names; raises InputError for one that does not exist or another type."""
    if not isinstance(given, Mapping):
        raise InputError(where, given, "not a table of fields", "write {field: value}")
    return {
        fields.full_name(key, where): checked_value(key, value, where, fields.folder) for key, value in given.items()
    }


def _grid(given: Any, where: str, fields: Fields) -> list[Axis]:
    if not isinstance(given, Mapping):
        raise InputError(where, given, "not a table of axes", "write {field: [values]}")
    return [_axis(str(name), levels, where, fields) for name, levels in given.items()]


def _axis(name: str, given: Any, where: str, fields: Fields) -> Axis:
    place = f"{where}.{name}"
    if not isinstance(given, (list, Mapping)) or not 0 < len(given) <= _MOST_LEVELS:
        rule = f"neither 1 to {_MOST_LEVELS:,} values nor a table of named levels"
        raise InputError(place, given, rule, "write [value, value]")
    if isinstance(given, Mapping) and not is_field(name):
        levels = [Level(label=label, sets=_sets(sets, f"{place}.{label}", fields)) for label, sets in given.items()]
    else:
        full = fields.full_name(name, where)
        values = given.items() if isinstance(given, Mapping) else [(value, value) for value in given]
        levels = [
            Level(label=label, sets={full: checked_value(name, value, where, fields.folder)}) for label, value in values
        ]
    return _distinct(Axis(name=name, levels=tuple(levels)), place)


def _distinct(axis: Axis, place: str) -> Axis:
    """Return an axis; raises InputError where two of its levels have one label, so that a table could not tell them apart."""
    seen: set[str] = set()
    for level in axis.levels:
        if str(level.label) in seen:
            raise InputError(place, level.label, "stands twice", "give each level once")
        seen.add(str(level.label))
    return axis


def _cases(given: Any, where: str, fields: Fields) -> list[Axis]:
    """Return the axis of single combinations that belong together."""
    if given is None:
        return []
    if not isinstance(given, list) or not 0 < len(given) <= _MOST_LEVELS:
        raise InputError(where, given, "not a list of tables", "write [{field: value}]")
    tables = [_sets(sets, f"{where}[{number}]", fields) for number, sets in enumerate(given)]
    levels = [
        Level(label=", ".join(f"{key}={value}" for key, value in written.items()), sets=sets)
        for written, sets in zip(given, tables, strict=True)
    ]
    return [_distinct(Axis(name="case", levels=tuple(levels)), where)]


def _seeds(content: Mapping[str, Any], where: str, predict: str) -> list[Axis]:
    """Return the axis of seeds of made-up routing: those listed, or as many as there are repeats."""
    seeds, repeats = content.get("seeds"), content.get("repeats")
    if seeds is None and repeats is None:
        return []
    if seeds is not None and repeats is not None:
        raise InputError(f"{where}: repeats", repeats, "seeds say already how often", "give one of the two")
    if predict == PLAN:
        raise InputError(
            f"{where}: seeds", seeds or repeats, "a plan's routing has one seed", "predict: simulate has more"
        )
    if repeats is not None:
        if not _is_count(repeats) or not 0 < repeats <= _MOST_LEVELS:
            raise InputError(f"{where}: repeats", repeats, "not a whole number above 0", "give a count")
        seeds = list(range(repeats))
    if not isinstance(seeds, list) or not seeds or not all(_is_count(one) and one < _MOST_SEED for one in seeds):
        raise InputError(f"{where}: seeds", seeds, "not a list of whole numbers", "write [0, 1, 2]")
    levels = tuple(Level(label=seed, sets={"seed": seed}) for seed in seeds)
    return [_distinct(Axis(name="seed", levels=levels), f"{where}: seeds")]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
