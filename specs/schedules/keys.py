"""Options of a schedule by dotted keys: which there are, read from `key=value`, and from nested values as a schedule is written.

Modelled: both kinds of schedule, whose options are dataclasses in sections; names and values of the version before, read with a line that
says today's. Ignored: which values belong together; each schedule checks itself.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...base.errors import InputError, UnknownName

_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The dotted keys of one kind of schedule."""

    sections: Mapping[str, type]
    """Section → the dataclass of its options, in the schedule's order."""
    example: str
    """What a remedy shows."""
    old_names: Mapping[str, str] = field(default_factory=dict)
    old_values: Mapping[tuple[str, Any], Any] = field(default_factory=dict)

    def kinds(self) -> dict[str, str]:
        """Return every dotted key with its declared type, in declaration order."""
        return dict(_kinds(tuple(self.sections.items())))

    def parse(self, text: str) -> tuple[str, Any]:
        """Return (key, value) of a `key=value` argument, with the value converted to the key's type.

        Raises InputError for a missing `=`, an unknown key (naming the nearest valid one) or a value of the wrong type.
        """
        key, equals, raw = text.partition("=")
        if not equals:
            raise InputError("--set", text, "not of the form key=value", f"write for instance --set {self.example}")
        key, kinds = self._current(key.strip()), self.kinds()
        if key not in kinds:
            raise UnknownName("--set", key, kinds)
        return key, _converted(key, kinds[key], raw.strip())

    def by_section(self, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return section → option → value of dotted keys, `name` left out; raises UnknownName for a key that does not exist."""
        kinds = _kinds(tuple(self.sections.items()))
        changes: dict[str, dict[str, Any]] = {}
        for given, value in settings.items():
            if given == "name":
                continue
            key = self._current(given)
            if key not in kinds:
                raise UnknownName("schedule key", key, kinds)
            if (key, value) in self.old_values:
                _log.warning("schedule: %s=%s is now called %s=%s", key, value, key, self.old_values[key, value])
                value = self.old_values[key, value]
            section, _, option = key.partition(".")
            changes.setdefault(section, {})[option] = value
        return changes

    def dotted(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return dotted keys, and `name`, of nested plain values as a schedule writes itself; raises InputError or UnknownName."""
        flat: dict[str, Any] = {}
        for section, options in data.items():
            if section == "name":
                flat["name"] = options
            elif self.old_names.get(section, section) not in self.sections:
                raise UnknownName("schedule key", section, self.sections)
            elif not isinstance(options, Mapping):
                raise InputError(f"schedule {section}", options, "not a table of options", "give option: value pairs")
            else:
                flat |= {f"{section}.{option}": value for option, value in options.items()}
        return flat

    def _current(self, key: str) -> str:
        """Return today's name of a key, and say so where it was given by the name of the version before."""
        if key in self.old_names:
            _log.warning("schedule: %r is now called %r", key, self.old_names[key])
        return self.old_names.get(key, key)


def replaced(schedule: Any, settings: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return `schedule` with the options of `changes` (section → option → value) and the name of `settings`, if it has one."""
    parts = {name: _section(getattr(schedule, name), tuple(options.items())) for name, options in changes.items()}
    return dataclasses.replace(schedule, name=settings.get("name", schedule.name), **parts)


@functools.lru_cache(maxsize=4096)
def _section(section: Any, options: tuple[tuple[str, Any], ...]) -> Any:
    """Return a section with options replaced; a search makes thousands of schedules from a few dozen sections."""
    return dataclasses.replace(section, **dict(options))


@functools.cache
def _kinds(sections: tuple[tuple[str, type], ...]) -> dict[str, str]:
    return {
        f"{section}.{option.name}": str(option.type)
        for section, options in sections
        for option in dataclasses.fields(options)
    }


def _converted(key: str, kind: str, raw: str) -> Any:
    if "None" in kind and raw.lower() in ("none", ""):
        return None
    try:
        if kind.startswith("int"):
            return int(raw)
        if kind.startswith("float"):
            return float(raw)
        if kind.startswith("bool"):
            return _TRUTH[raw.lower()]
    except (ValueError, KeyError):
        raise InputError(key, raw, f"not a value of type {kind}", f"give {kind}") from None
    return raw
