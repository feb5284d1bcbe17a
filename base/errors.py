"""The error family: what went wrong, in one line that says field, value, rule and remedy.

    MoeplanError                 base; carries the exit status the front door returns
    ├── InputError               exit 2: something the caller gave is wrong
    │   ├── UnknownName          a name that is not in a registry; the nearest valid one is named
    │   └── MissingCalibration   a profile has no measurement for what was asked
    ├── DoesNotFit               exit 3: an honest "no schedule fits in this memory"
    ├── OutOfReach               exit 3: an honest "no schedule keeps these limits"
    └── Internal                 exit 70: two engines disagree or an invariant broke; please report

Every message is one line of bounded length without control characters, whatever names, paths and libraries put into it
(`one_line`). Ignored here: how errors are printed (the front door's job).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

_FIELD_CHARS, _VALUE_CHARS, _RULE_CHARS, _REMEDY_CHARS = 160, 80, 1000, 300
_MOST_NAMES, _NEAR_NAMES = 40, 8
_MIB, _GIB = 2**20, 2**30
# Controls (but not tab and line feed), marks that turn the direction of text around, separators of lines and paragraphs, halves
# of characters.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LINE_CHARS = _FIELD_CHARS + _VALUE_CHARS + _RULE_CHARS + _REMEDY_CHARS


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
        super().__init__(
            f"{one_line(field, _FIELD_CHARS)} = {_shown(value)}: "
            f"{one_line(rule, _RULE_CHARS)}; {one_line(remedy, _REMEDY_CHARS)}"
        )


class UnknownName(InputError):
    """A name outside the set of valid ones; the message names the nearest valid name and lists the rest, or of many those that are near.

    more: what else would do, in a few words.
    """

    def __init__(self, field: str, value: object, valid: Iterable[str], *, more: str = "") -> None:
        names = sorted(valid)
        plain = {name.lower(): name for name in reversed(names)}
        written = _text(value, str)[:_RULE_CHARS].lower()
        likely = [plain[name] for name in difflib.get_close_matches(written, list(plain), n=_NEAR_NAMES, cutoff=0.4)]
        remedy = f"did you mean {likely[0]!r}?" if likely else "use one of these"
        if len(names) <= _MOST_NAMES:
            shown = ", ".join(names)
        else:
            shown = f"{', '.join(likely or names[:_MOST_NAMES])}, … ({len(names)} names)"
        super().__init__(
            field, value, f"not one of: {shown}", f"{remedy}{'' if likely else ';'} {more}" if more else remedy
        )


class MissingCalibration(InputError):
    """A measured profile has a hole where a cost was asked for; the nearest measured point is named."""


class DoesNotFit(MoeplanError):
    """No schedule fits the memory given; `missing_bytes` more would be needed (0: no memory would be enough)."""

    exit_status = 3

    def __init__(self, what: str, missing_bytes: int, *, place: str | None = None) -> None:
        self.missing_bytes, self.place = int(missing_bytes), place
        size, where = self.missing_bytes, "" if place is None else f" of {place} memory"
        readable = f" ({size / _GIB:.2f} GiB)" if size >= _GIB else f" ({size / _MIB:.2f} MiB)" if size >= _MIB else ""
        missing = f"; {size} bytes{where} are missing{readable}" if size else ""
        super().__init__(f"does not fit: {one_line(what, _RULE_CHARS)}{missing}")


class OutOfReach(MoeplanError):
    """No schedule keeps the limits given; the message says which comes nearest."""

    exit_status = 3

    def __init__(self, what: str) -> None:
        super().__init__(f"out of reach: {one_line(what, _RULE_CHARS)}")


class Internal(MoeplanError):
    """An invariant of moeplan itself broke (for instance: the two engines disagree)."""

    exit_status = 70


def one_line(text: object, most: int = _LINE_CHARS) -> str:
    """Return a text as one line of at most `most` characters; what is too long loses its middle, where paths say least."""
    # What cannot be seen anyway is cut before anything walks over it.
    line = visible(" ".join(_middle_out(str(text), 4 * most).split()))
    return _middle_out(line, most)


def visible(text: str) -> str:
    """Return a text with every character that would steer a terminal instead of being shown (but not line ends) spelt out."""
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def _middle_out(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    tail = most // 2
    return text[: most - tail - 1] + "…" + text[len(text) - tail :]


def _shown(value: object) -> str:
    """Return `repr` of a value, shortened so that a hostile input cannot flood the terminal."""
    return one_line(_text(value, repr), _VALUE_CHARS)


def _text(value: object, form: Callable[[object], str]) -> str:
    try:
        return form(value)
    except (ValueError, RecursionError):  # whole numbers of thousands of digits, lists in lists in lists
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
