"""Command-line flags as files: one flag a line, quoted for a shell, and read back against a table of kinds.

Modelled: switches, whole numbers, fractions, names from a list, JSON, free text. Ignored: which flags an engine knows (its table,
`engines/`) and short forms of flags.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...base.errors import InputError, UnknownName

FLAGS_FILE = "flags.txt"
USE_FLAGS = f"append the lines of {FLAGS_FILE} to the command: xargs -a {FLAGS_FILE} COMMAND"
SWITCH, WHOLE, NUMBER, TEXT, JSON = "switch", "whole", "number", "text", "json"
# Of keys in files only, where a truth value is no number; LIST and TABLE are looked into by the engine's own check.
BOOLEAN, LIST, TABLE = "boolean", "list", "table"


@dataclass(frozen=True, slots=True, kw_only=True)
class OneOf:
    """A flag that takes one of these names."""

    names: tuple[str, ...]


Kind = str | OneOf
FlagValue = bool | int | float | str | Mapping[str, Any]


def one_of(*names: str) -> OneOf:
    """Return the kind of a flag that takes one of `names`."""
    return OneOf(names=names)


def flag_lines(flags: Mapping[str, FlagValue]) -> str:
    """Return one line for each flag in order: True stands alone, False is left out, tables become JSON."""
    lines = []
    for name, value in flags.items():
        if value is False:
            continue
        if value is True:
            lines.append(name)
        else:
            text = json.dumps(value) if isinstance(value, Mapping) else str(value)
            lines.append(f"{name} {shlex.quote(text)}")
    return "".join(f"{line}\n" for line in lines)


def command(program: str, flags: Mapping[str, FlagValue]) -> str:
    """Return a program's call as a line of a shell, one flag a line."""
    lines = [program, *(f"  {line}" for line in flag_lines(flags).splitlines())]
    return " \\\n".join(lines) + "\n"


def one_line(text: str) -> str:
    """Return a call as one line."""
    return " ".join(_told(text))


def program_and_flags(text: str) -> tuple[str, str]:
    """Return what `command` was made of: the program, and its flags, one a line."""
    program, *lines = _told(text)
    return program, "\n".join(lines)


def _told(text: str) -> list[str]:
    return [line.removesuffix("\\").strip() for line in text.splitlines()]


def read_flags(text: str, kinds: Mapping[str, Kind], where: str) -> dict[str, Any]:
    """Return the value of every flag in `text`, converted; a switch is True.

    where: the file's name, for messages. Raises UnknownName for a flag outside `kinds`, InputError for a value that is absent,
    not of the flag's kind, or given twice.
    """
    found: dict[str, Any] = {}
    for line in text.splitlines():
        try:
            words = shlex.split(line)
        except ValueError:
            raise InputError(where, line, "unbalanced quotes", "write the flag anew") from None
        if not words:
            continue
        name, values = words[0], words[1:]
        if name not in kinds:
            raise UnknownName(f"{where}: flag", name, kinds)
        if name in found:
            raise InputError(f"{where}: {name}", line, "given twice", "keep one")
        kind = kinds[name]
        if len(values) != (0 if kind == SWITCH else 1):
            raise InputError(
                f"{where}: {name}", line, f"takes {0 if kind == SWITCH else 1} values", "write the flag anew"
            )
        found[name] = True if kind == SWITCH else _converted(f"{where}: {name}", values[0], kind)
    return found


def _converted(field: str, value: str, kind: Kind) -> Any:
    if isinstance(kind, OneOf):
        if value not in kind.names:
            raise UnknownName(field, value, kind.names)
        return value
    try:
        if kind == WHOLE:
            return int(value)
        if kind == NUMBER:
            return float(value)
        if kind == JSON:
            table = json.loads(value)
            if isinstance(table, dict):
                return table
            raise ValueError
    except ValueError:
        raise InputError(field, value, f"not of kind {kind}", "write the flag anew") from None
    return value
