"""A command line, held against an engine's own flags.

A table is text, one flag a line: its names, a word for each value it takes, and after a colon what the call keeps it as.

    -ngl --gpu-layers --n-gpu-layers N : gpu_layers
    --cpu-moe -cmoe : cpu_moe
    -fa --flash-attn ?on,off,auto : flash_attn        (a value that may be left out)
    -ot --override-tensor N* : overrides              (may be given again)
    --rpc N : !several machines take part             (nothing is predicted with it)
    --mlock                                           (speed does not depend on it)

Modelled: names, numbers of values, values that may be left out, flags given twice. Ignored: what a value means (`call`).
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...base.errors import InputError

FIELD = "--command"
_MOST_CHARS, _MOST_WORDS = 20_000, 2_000
# Ends of lines that go on, as shells write them.
_GOES_ON = re.compile(r"[\\^`][ \t]*\r?\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag of an engine."""

    names: tuple[str, ...]
    num_values: int
    optional: tuple[str, ...] = ()
    """Values that may follow, where the flag also stands alone."""
    repeats: bool = False
    kept_as: str | None = None
    """None: speed does not depend on it."""
    refused: str | None = None
    """Why nothing is predicted for a call that has it."""


def table(text: str) -> Mapping[str, Flag]:
    """Return the flags of a table by every one of their names."""
    found: dict[str, Flag] = {}
    for line in text.splitlines():
        words, _, role = (part.strip() for part in line.partition(" : "))
        if not words:
            continue
        names = tuple(word for word in words.split() if word.startswith("-"))
        rest = words.split()[len(names) :]
        optional = tuple(value for word in rest if word.startswith("?") for value in word[1:].split(","))
        flag = Flag(
            names=names, num_values=sum(not word.startswith("?") for word in rest), optional=optional,
            repeats=any(word.endswith("*") for word in rest), kept_as=role or None if not role.startswith("!") else None,
            refused=role[1:].strip() if role.startswith("!") else None,
        )  # fmt: skip
        found |= dict.fromkeys(names, flag)
    return found


def split_command(text: str) -> list[str]:
    """Return the words of a command line; raises InputError for one that is empty, too long or has a quote without its other half.

    Backslashes stay, as paths of Windows have them; lines that go on are one.
    """
    if len(text) > _MOST_CHARS:
        raise InputError(
            FIELD, text, f"more than {_MOST_CHARS} characters", "give one command, without what it is fed with"
        )
    lexer = shlex.shlex(_GOES_ON.sub(" ", text), posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    try:
        words = list(lexer)
    except ValueError:
        raise InputError(FIELD, text, "a quote is not closed", "quote the whole command once more") from None
    if not words or len(words) > _MOST_WORDS:
        raise InputError(
            FIELD, text, "empty" if not words else f"more than {_MOST_WORDS} words", "give the engine's command line"
        )
    return words


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What an engine was told, by what the table keeps each flag as."""

    values: Mapping[str, tuple[tuple[str, ...], ...]]
    """By role: the values of each time it was given; a flag without a value has none."""
    names: Mapping[str, str]
    """By role: the flag as it was written."""
    others: tuple[str, ...]
    """Words that are no flags."""

    def text(self, role: str) -> str | None:
        """Return the one value of a role, "" where it was given without one, None where it was not given."""
        found = self.values.get(role)
        return None if found is None else "".join(found[-1][:1])

    def given(self, role: str) -> bool:
        """Return whether a role's flag was given."""
        return role in self.values

    def whole(self, role: str, least: int, most: int) -> int | None:
        """Return a whole number, None where it was not given; raises InputError for anything else."""
        text = self.text(role)
        if text is None:
            return None
        if re.fullmatch(r"[+-]?[0-9]{1,9}", text) is None or not least <= int(text) <= most:
            rule = f"not a whole number from {least:,} to {most:,}"
            raise InputError(f"{FIELD}: {self.names[role]}", text, rule, "correct the command line")
        return int(text)


def read_flags(words: Sequence[str], known: Mapping[str, Flag], program: str, *, equals: bool = False) -> Told:
    """Return what `words` tell a program; equals: --flag=value is taken too, and names may have underscores for hyphens.

    Raises InputError for a flag that the program does not have (the nearest is named), one without its value, one given twice with
    different values, and one with which nothing can be predicted.
    """
    values: dict[str, list[tuple[str, ...]]] = {}
    names: dict[str, str] = {}
    others: list[str] = []
    seen: dict[tuple[str, ...], tuple[str, ...]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or re.fullmatch(r"-[0-9.]+", word):
            others.append(word)
            continue
        name, has_value, value = word.partition("=") if equals else (word, "", "")
        flag = known.get(name) or known.get(f"--{name[2:].replace('_', '-')}" if name.startswith("--") else name)
        if flag is None:
            raise unknown_flag(name, known, program)
        if has_value:
            rest.insert(0, value)
        if len(rest) < flag.num_values:
            raise InputError(
                f"{FIELD}: {name}", "(absent)", f"{program} takes a value here", "write it behind the flag"
            )
        given = tuple(rest.pop(0) for _ in range(flag.num_values))
        if flag.optional and rest and rest[0] in flag.optional:
            given = (rest.pop(0),)
        if flag.refused is not None:
            remedy = "leave it out to see what is predicted without it"
            raise InputError(f"{FIELD}: {name}", " ".join(given) or "(given)", flag.refused, remedy)
        if not flag.repeats and seen.get(flag.names, given) != given:
            rule = f"given twice, first with {' '.join(seen[flag.names]) or 'no value'}"
            raise InputError(f"{FIELD}: {name}", " ".join(given), rule, "keep one")
        seen[flag.names] = given
        if flag.kept_as is not None:
            values.setdefault(flag.kept_as, []).append(given)
            names[flag.kept_as] = name
    return Told(values={role: tuple(found) for role, found in values.items()}, names=names, others=tuple(others))


def unknown_flag(name: str, known: Mapping[str, Flag], program: str) -> InputError:
    """Return the error for a flag that a program does not have."""
    near = difflib.get_close_matches(name[:200], list(known), n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]}?" if near else f"see {program} --help"
    return InputError(f"{FIELD}: flag", name, f"{program} has no such flag", remedy)
