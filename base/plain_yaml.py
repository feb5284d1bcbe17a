"""YAML text as plain values: what JSON can hold, written the way people write YAML.

Modelled: null, true and false, whole and decimal numbers, text, lists, tables. What YAML 1.1 adds is read as the text it is: `1:30` is
no 90, `no` no false, `010` no 8, a date no date. Refused: a key twice in one table, anchors and aliases (a file of a few lines
can stand for gigabytes), numbers of hundreds of digits, nesting without end. Ignored: what the values mean.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_MAX_DEPTH = 40
_MAX_DIGITS = 40
_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))


def parse(text: str) -> Any:
    """Return the values that `text` holds; raises ValueError whose message is a few words of ours for anything else."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise ValueError("nested too deeply")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"the alias *{str(event.anchor)[:40]}: write it out")
        return yaml.load(text, Loader=_Plain)  # noqa: S506 (derived from the safe loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark is not None else ""
        raise ValueError(
            f"not YAML{line} ({str(getattr(error, 'problem', None) or 'wrong character')[:100]})"
        ) from None


class _Plain(yaml.SafeLoader):
    """The safe loader with JSON's idea of values."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (filled below, as the library does)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a table, every key once."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"a key that is no text at line {key.start_mark.line + 1}")
            if key.value in seen:
                raise ValueError(f"the key {key.value[:60]!r} stands twice, at line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: Any) -> None:
        """Leave tables as they are: `<<` is a key like any other."""

    def construct_yaml_int(self, node: Any) -> int:
        """Return a whole number in decimal digits."""
        text = self.construct_scalar(node)
        if len(text) > _MAX_DIGITS:
            raise ValueError(f"a number of {len(text)} digits at line {node.start_mark.line + 1}")
        return int(text)


def _number(loader: Any, node: Any) -> float:
    return float(loader.construct_scalar(node))


for _tag, _form, _first in (
    (_NULL, r"(?:null|Null|NULL|~|)\Z", "nN~"),
    (_BOOL, r"(?:true|True|TRUE|false|False|FALSE)\Z", "tTfF"),
    (_INT, r"[-+]?[0-9]+\Z", "-+0123456789"),
    (_FLOAT, r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z", "-+.0123456789"),
):
    _Plain.add_implicit_resolver(_tag, re.compile(_form), [*_first, *([""] if _tag == _NULL else [])])
_Plain.add_constructor(_INT, _Plain.construct_yaml_int)
_Plain.add_constructor(_FLOAT, _number)
