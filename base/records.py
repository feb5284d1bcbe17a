"""Records: arrays whose lines have fields with names, read as `items[at].expert` by compiled code and by plain Python alike.

Modelled: a record is declared once, with the type and the meaning of each field; an array of records is an ordinary numpy array
of a structured type, and `items["expert"]` is one field of all lines, as a view. Ignored: fields that are no numbers.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import Internal

Array: TypeAlias = npt.NDArray[Any]
RecordType: TypeAlias = np.dtype[Any]

_INT = "int64"


def record_type(**fields: str) -> RecordType:
    """Return the type of a record with these fields, each given the name of its number type.

    Fields lie as a C compiler would put them, so that compiled code reads each at its natural place.
    """
    taken = [name for name in fields if hasattr(np.record, name)]
    if taken:  # numpy's own attribute would be read in its stead
        raise Internal(f"a record's field cannot be called {taken[0]}: every record of numpy has that name already")
    plain = np.dtype(list(fields.items()), align=True)
    return np.dtype((np.record, plain))


def whole_numbers(*names: str) -> RecordType:
    """Return the type of a record whose fields are all whole numbers of 64 bits."""
    return record_type(**dict.fromkeys(names, _INT))


def records(kind: RecordType, count: int = 1, *, fill: int = 0) -> Array:
    """Return `count` lines with every field `fill`; one line is how code shares a few named numbers."""
    found = np.zeros(count, kind)
    if fill:
        for name in kind.names or ():
            found[name] = fill
    return found


def lines_of(array: Array) -> list[Any]:
    """Return the lines of an array of records as named tuples of Python's own numbers, which are quicker to read one by one."""
    make = _line_type(array.dtype)._make
    return [make(line) for line in array.tolist()]


@functools.cache
def _line_type(kind: RecordType) -> Any:
    return namedtuple("Line", kind.names or ())
