"""The error family: what went wrong, in one line that says field, value, rule and remedy.

    MoeplanError                 base; carries the exit status the front door returns
    ├── InputError               exit 2: something the caller gave is wrong
    │   ├── UnknownName          a name that is not in a registry; the nearest valid one is named
    │   └── MissingCalibration   a profile has no measurement for what was asked
    ├── DoesNotFit               exit 3: an honest "no schedule fits in this memory"
    └── Internal                 exit 70: two engines disagree or an invariant broke; please report

Ignored here: how errors are printed (the front door's job).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

_SHOWN_VALUE_CHARS = 80


class MoeplanError(Exception):
    """Base of every error the product raises on purpose; `exit_status` is what the command line returns."""

    exit_status = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to rebuild the error in another process: its text and fields, not its constructor's arguments."""
        return _rebuilt, (type(self), self.args, dict(self.__dict__))


def _rebuilt(kind: type[MoeplanError], args: tuple[Any, ...], fields: dict[str, Any]) -> MoeplanError:
    """Return an error of `kind` as it was before it crossed a process boundary."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(fields)
    return error


class InputError(MoeplanError):
    """A wrong input: which field, its value, the rule it breaks and what to do instead."""

    exit_status = 2

    def __init__(self, field: str, value: object, rule: str, remedy: str) -> None:
        self.field, self.value, self.rule, self.remedy = field, value, rule, remedy
        super().__init__(_one_line(f"{field} = {_shown(value)}: {rule}; {remedy}"))


class UnknownName(InputError):
    """A name outside the set of valid ones; the message names the nearest valid name and lists the rest."""

    def __init__(self, field: str, value: object, valid: Iterable[str]) -> None:
        names = sorted(valid)
        near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.4)
        remedy = f"did you mean {near[0]!r}?" if near else "use one of these"
        shown = ", ".join(names[:40]) + (", …" if len(names) > 40 else "")
        super().__init__(field, value, f"not one of: {shown}", remedy)


class MissingCalibration(InputError):
    """A measured profile has a hole where a cost was asked for; the nearest measured point is named."""


class DoesNotFit(MoeplanError):
    """No schedule fits the memory given; `missing_bytes` more would be needed (0: no memory would be enough)."""

    exit_status = 3

    def __init__(self, what: str, missing_bytes: int) -> None:
        self.missing_bytes = int(missing_bytes)
        missing = f"; {self.missing_bytes} bytes are missing" if self.missing_bytes else ""
        super().__init__(_one_line(f"does not fit: {what}{missing}"))


class Internal(MoeplanError):
    """An invariant of moeplan itself broke (for instance: the two engines disagree)."""

    exit_status = 70


def _shown(value: object) -> str:
    """`repr` of a value, shortened so that a hostile input cannot flood the terminal."""
    text = repr(value)
    return text if len(text) <= _SHOWN_VALUE_CHARS else text[: _SHOWN_VALUE_CHARS - 1] + "…"


def _one_line(text: str) -> str:
    """The text with every run of white space turned into one space."""
    return " ".join(text.split())
