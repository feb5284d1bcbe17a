"""The registry of readers: what `--from KIND` means, and the one function that runs them.

Modelled: a reader is a function from a path and keyword options to a recording; its options are read from its signature,
so that a wrong one is refused by name. Ignored: guessing the kind from the file.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ..errors import InputError, UnknownName
from .read_npz import read_npz_trace
from .recording import LoadProfile, RoutingTrace

Reader = Callable[..., RoutingTrace | LoadProfile]

READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "npz": read_npz_trace,
    }
)


def import_trace(kind: str, path: str | os.PathLike[str], **options: Any) -> RoutingTrace | LoadProfile:
    """Return the recording in `path`, read as `kind`; sources that only counted give a LoadProfile.

    Raises UnknownName for a kind or an option that does not exist, InputError for a file that is not of that kind.
    """
    reader = READERS.get(kind)
    if reader is None:
        raise UnknownName("kind", kind, READERS)
    known = reader_options(kind)
    for name in options:
        if name not in known:
            raise UnknownName(f"option of {kind}", name, known)
    needed = [name for name, default in known.items() if default is inspect.Parameter.empty and name not in options]
    if needed:
        raise InputError(needed[0], "missing", f"the {kind} format does not say it", f"give {', '.join(needed)}")
    return reader(path, **options)


def reader_options(kind: str) -> Mapping[str, Any]:
    """Return option name → default (`inspect.Parameter.empty` when it must be given) of one reader."""
    reader = READERS.get(kind)
    if reader is None:
        raise UnknownName("kind", kind, READERS)
    parameters = inspect.signature(reader).parameters.values()
    return MappingProxyType({p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY})
