"""The registry of readers: what `--from KIND` means, and the one function that runs them.

Modelled: a reader is a function from a path and keyword options to a recording; its options are read from its
signature, so that a wrong one is refused by name and a text becomes what the option is. Which kinds there are
stands in `kinds`. Ignored: guessing the kind from the file.
"""

from __future__ import annotations

import importlib
import inspect
import os
import typing
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ...base.errors import InputError, UnknownName
from ..kinds import READERS
from ..recording import LoadProfile, RoutingTrace
from .draft_layers import without_draft_layers

Reader = Callable[..., RoutingTrace | LoadProfile]

_HIDDEN_LAYERS = "hidden_layers"  # an option of every kind: layers numbered beyond the model's are draft layers


def import_trace(kind: str, path: str | os.PathLike[str], **options: Any) -> RoutingTrace | LoadProfile:
    """Return the recording in `path`, read as `kind`; sources that only counted give a LoadProfile.

    Every kind takes `hidden_layers`, the layers the model has: what is numbered beyond them belongs to a draft (MTP) and
    is left out. Raises UnknownName for a kind or an option that does not exist, InputError for a file that is not of
    that kind.
    """
    reader = _reader(kind)
    known = reader_options(kind)
    for name in options:
        if name not in known:
            raise UnknownName(f"option of {kind}", name, known)
    needed = [name for name, default in known.items() if default is inspect.Parameter.empty and name not in options]
    if needed:
        raise InputError(needed[0], "missing", f"the {kind} format does not say it", f"give {', '.join(needed)}")
    hidden_layers = options.pop(_HIDDEN_LAYERS, None)
    recording = reader(path, **options)
    return recording if hidden_layers is None else without_draft_layers(recording, hidden_layers)


def reader_options(kind: str) -> Mapping[str, Any]:
    """Return option name → default (`inspect.Parameter.empty` when it must be given) of one reader."""
    parameters = inspect.signature(_reader(kind)).parameters.values()
    own = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return MappingProxyType({**own, _HIDDEN_LAYERS: None})


def option_values(kind: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """Return options given as text as the values the reader wants.

    Lists of numbers are written `1,2,5-9`, switches true or false. Raises UnknownName or InputError.
    """
    known = reader_options(kind)
    hints = typing.get_type_hints(_reader(kind))
    found: dict[str, Any] = {}
    for name, text in texts.items():
        if name not in known:
            raise UnknownName(f"option of {kind}", name, known)
        hint = str(hints.get(name, int))
        if "Sequence[int]" in hint:
            found[name] = _numbers(name, text)
        elif "bool" in hint:
            found[name] = _switch(name, text)
        else:
            found[name] = _number(name, text) if "int" in hint else text
    return found


def _reader(kind: str) -> Reader:
    """Return the function that reads a kind. Raises UnknownName."""
    where = READERS.get(kind)
    if where is None:
        raise UnknownName("kind", kind, READERS)
    module, _, function = where.rpartition(".")
    return typing.cast(Reader, getattr(importlib.import_module(f".{module}", __name__), function))


def _number(name: str, text: str) -> int:
    """Return a whole number written in digits. Raises InputError."""
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 12):
        raise InputError(name, text, "must be a whole number", f"write for instance {name}=8")
    return int(text)


def _switch(name: str, text: str) -> bool:
    """Return whether a text says yes. Raises InputError when it says neither."""
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise InputError(name, text, "must be true or false", f"write {name}=true")
    return values[text.lower()]


def _numbers(name: str, text: str) -> list[int]:
    """Return the numbers of a list like `1,2,5-9`. Raises InputError."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        low = _number(name, first)
        high = _number(name, last) if dash else low
        if not (low <= high < low + (1 << 16)):
            raise InputError(name, text, "must be numbers and ranges", f"write for instance {name}=1-26")
        found.extend(range(low, high + 1))
    return found
