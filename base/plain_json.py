"""JSON text as plain values, or one short reason why not.

Modelled: what the standard parser lets through and nobody means: a key twice in one object (the last one would win in silence),
numbers that are none (NaN) or endless (1e999), whole numbers of thousands of digits, nesting without end. Files of strangers
may hold NaN in fields that nobody reads. Ignored: where the text comes from, and what the values mean.
"""

from __future__ import annotations

import json
import math
from typing import Any


def parse(text: str | bytes, *, allow_nan: bool = False) -> Any:
    """Return the values that `text` holds; raises ValueError whose message is a few words of ours for anything else."""
    constant = None if allow_nan else _no_number
    finite = None if allow_nan else _finite
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=constant, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        if not error.doc.strip():
            raise ValueError("empty") from None
        if error.pos >= len(error.doc.rstrip()):
            raise ValueError("JSON that ends too early") from None
        raise ValueError(f"not JSON (line {error.lineno}, column {error.colno}: {error.msg.lower()})") from None
    except _Refused as error:
        raise ValueError(str(error)) from None
    except ValueError:  # the parser's own limit
        raise ValueError("a whole number of thousands of digits") from None


class _Refused(ValueError):
    """Said by the checks of this module."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"the key {twice[:60]!r} stands twice in one object")
    return found


def _no_number(text: str) -> Any:
    raise _Refused(f"{text} where a finite number is expected")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"the number {text[:40]} is too large")
    return value
