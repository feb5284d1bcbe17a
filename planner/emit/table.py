"""What an engine accepts, as data: each flag and each key of a file with its meaning, allowed values, age, standing and source.

Modelled: one table for each engine, with the version and the date it was checked and how; flags read back against it, so that a flag
that is not in it, a value outside its set, and a flag that the engine has replaced are refused. Ignored: flags that are never
written, rules between flags (the engine's own check), short forms.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...base.errors import InputError, UnknownName
from .flags import BOOLEAN, NUMBER, TEXT, WHOLE, Kind, OneOf, one_of, read_flags

RELEASED, PENDING, FORK, DEPRECATED = "released", "pending", "fork", "deprecated"
STANDINGS = (RELEASED, PENDING, FORK, DEPRECATED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One flag, or one key of a configuration file."""

    kind: Kind
    meaning: str
    standing: str = RELEASED
    """released: the version named by the table has it; pending: a proposal that is not merged; fork: a fork has it;
    deprecated: still taken, `instead` says what to write."""
    since: str = ""
    """First version known to have it, or the proposal; empty: older than the version checked."""
    least: float | None = None
    most: float | None = None
    instead: str = ""
    source: str = ""
    """Where it was read, if not where the table was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTable:
    """An engine's flags and keys."""

    engine: str
    """Name and version."""
    checked: str
    """The day, year-month-day."""
    how: str
    """What the rows were compared with."""
    source: str
    flags: Mapping[str, Row] = field(default_factory=dict)
    keys: Mapping[str, Row] = field(default_factory=dict)
    """Keys of files and of JSON flags, dotted: `FILE-OR-FLAG.key`."""
    places: frozenset[str] | None = None
    """Families of models whose placement the engine honours; None: where that does not depend on the model."""


def row(kind: Kind, meaning: str, **more: Any) -> Row:
    """Return one line of a table."""
    return Row(kind=kind, meaning=meaning, **more)


def names(*values: str) -> OneOf:
    """Return the kind of a flag that takes one of `values`."""
    return one_of(*values)


def flags_of(
    text: str, table: EngineTable, where: str, standings: Collection[str] = (RELEASED, FORK)
) -> dict[str, Any]:
    """Return the value of every flag in `text`.

    standings: those a flag may have; a flag of another is refused. Raises UnknownName for a flag outside the table, InputError for
    a value that is not of the flag's kind or outside its range, and for a flag that was replaced.
    """
    found = read_flags(text, {name: one.kind for name, one in table.flags.items()}, where)
    for name, value in found.items():
        one = table.flags[name]
        if one.standing == DEPRECATED:
            raise InputError(f"{where}: {name}", value, f"deprecated in {table.engine}", f"write {one.instead}")
        if one.standing not in standings:
            raise InputError(
                f"{where}: {name}", value, f"{one.standing} ({one.since}), not in {table.engine}", "drop it"
            )
        _in_range(value, one, f"{where}: {name}")
    return found


def check_keys(values: object, table: EngineTable, part: str, required: Collection[str] = (), *,
               standings: Collection[str] = (RELEASED, FORK)) -> None:  # fmt: skip
    """Return nothing; raises unless `values` holds only the table's keys of `part`, of their kinds, the `required` among them."""
    if not isinstance(values, Mapping):
        raise InputError(part, values, "not a table", "write the file anew")
    known = {name.removeprefix(f"{part}."): one for name, one in table.keys.items() if name.startswith(f"{part}.")}
    for key, value in values.items():
        if key not in known:
            raise UnknownName(f"{part}: key", key, known)
        one, where = known[key], f"{part}: {key}"
        if one.standing not in standings:
            raise InputError(where, value, f"{one.standing} ({one.since}), not in {table.engine}", "drop it")
        _of_kind(value, one, where)
        _in_range(value, one, where)
    for key in sorted(required):
        if key not in values:
            raise InputError(f"{part}: {key}", "(absent)", "a key is absent", "add it")


_TYPES: Mapping[str, tuple[type, ...]] = {WHOLE: (int,), NUMBER: (int, float), TEXT: (str,), BOOLEAN: (bool,)}


def _of_kind(value: object, one: Row, where: str) -> None:
    if isinstance(one.kind, OneOf):
        if value not in one.kind.names:
            raise UnknownName(where, value, one.kind.names)
    elif one.kind in _TYPES and type(value) not in _TYPES[one.kind]:
        raise InputError(where, value, f"not of type {_TYPES[one.kind][-1].__name__}", "write the file anew")


def _in_range(value: object, one: Row, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if one.least is not None and value < one.least:
        raise InputError(where, value, f"below {one.least:g}", "emit again")
    if one.most is not None and value > one.most:
        raise InputError(where, value, f"above {one.most:g}", "emit again")
