"""The fields that a study may set: options of the question by name, and settings of machine, engine, model, request and schedule.

Modelled: every name checked against what there is, and the type of every value; names of files are taken from the study's folder.
Ignored: what a value does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..api.load import load_machine
from ..api.settings import machine_keys, plain_keys
from ..api.simulate import SIMULATORS
from ..api.subject import bytes_of
from ..base.errors import InputError, UnknownName
from ..base.units import parse_quantity, unit_of
from ..planner.offload.plan import OffloadRequest
from ..specs.models import weight_format
from ..specs.models.load import load_model
from ..specs.models.mixes.known import known_name
from ..specs.models.mixes.names import mix_names
from ..specs.schedules.offload import OffloadSchedule, parse_setting, setting_keys
from ..specs.schedules.presets import load_preset

SIMULATE, PLAN = "simulate", "plan"
QUESTIONS = (SIMULATE, PLAN)
_TEXT, _COUNT, _SIZE, _FILE, _WORD = "a text", "a whole number", "a size such as 6GiB", "a file", "a word"
_SHARES, _YES = "a share, shares or a file of them", "true or false"
_DRAFTS = {"draft_tokens": _COUNT, "acceptance": _SHARES, "draft": _FILE}
_SHARED = {
    "model": _FILE, "hardware": _FILE, "trace": _FILE, "engine": _TEXT, "quant": _TEXT, "prompt_tokens": _COUNT,
    "reply_tokens": _COUNT, "lengths": _FILE, "context": _COUNT, "kv_type": _TEXT, "memory": _SIZE, "reserve": _SIZE,
    "window": _COUNT, "dense_bits": _WORD, "policy": _FILE,
}  # fmt: skip
OPTIONS: Mapping[str, Mapping[str, str]] = {
    SIMULATE: _SHARED
    | {
        "schedule": _TEXT,
        "concurrency": _COUNT,
        "ubatch": _COUNT,
        "simulator": _TEXT,
        "split": _TEXT,
        **_DRAFTS,
    },
    PLAN: _SHARED | _DRAFTS | {"target": _TEXT, "speculative": _YES},
}
"""What each question takes, and what its value is: the arguments of the functions of the same names."""
_ENGINE = "engine."
_MOST = 2**40
_MOST_CHECKED = 200


def is_field(name: str) -> bool:
    """Return whether a name is an option, or has the form of a setting's key."""
    return "." in name or any(name in options for options in OPTIONS.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """What may be set where one question is asked."""

    predict: str
    folder: Path

    def full_name(self, key: object, where: str) -> str:
        """Return the name under which a field is kept: `engine.` stands for `machine.engine.`; raises UnknownName with the nearest."""
        name = str(key)
        if name in OPTIONS[self.predict]:
            return name
        if name.startswith(_ENGINE):
            return f"machine.{name}"
        if name.startswith(("machine.", "model.")):
            return name  # of which machine and model is not known yet
        if name not in self._settings():
            raise UnknownName(where, name, [*OPTIONS[self.predict], *self._settings()])
        return name

    def _settings(self) -> list[str]:
        request = OffloadSchedule().workload if self.predict == SIMULATE else OffloadRequest()
        schedule = setting_keys() if self.predict == SIMULATE else ()
        return [*schedule, *(f"request.{key}" for key in plain_keys(request))]

    def check_settings(self, where: str, tables: Iterable[Mapping[str, Any]]) -> None:
        """Return nothing; raises UnknownName for a key that neither any machine nor any model of the study has."""
        found = list(tables)
        self._check_values(where, found)
        named = {name: {table[name] for table in found if table.get(name) is not None} for name in _SHARED}
        keys = {key for table in found for key in table}
        asked = [key for key in keys if key.startswith("model.")]
        if asked:
            valid = {f"model.{key}" for name in named["model"] for key in plain_keys(load_model(name))}
            _refuse_unknown(asked, valid, where)
        asked = [key for key in keys if key.startswith("machine.")]
        if asked:
            engines = named["engine"] or {None}
            machines = [load_machine(name, engine=engine) for name in named["hardware"] for engine in engines]
            _refuse_unknown(asked, {f"machine.{key}" for machine in machines for key in machine_keys(machine)}, where)

    def _check_values(self, where: str, tables: Iterable[Mapping[str, Any]]) -> None:
        """Return nothing; raises InputError for a value that no model or machine could have; of many values the first are looked at."""
        values: dict[str, dict[Any, None]] = {}
        for table in tables:
            for name, value in table.items():
                if value is not None and len(values.setdefault(name, {})) < _MOST_CHECKED:
                    values[name][value] = None
        for name, found in values.items():
            for value in found:
                _check_value(name, value, f"{where}: {name}")


def _check_value(name: str, value: Any, place: str) -> None:
    if name == "quant":
        try:
            weight_format(known_name(value))
        except UnknownName:
            raise UnknownName(place, value, mix_names()) from None
    elif name == "schedule":
        load_preset(value)
    elif name == "simulator" and value not in SIMULATORS:
        raise UnknownName(place, value, SIMULATORS)
    elif name in ("memory", "reserve"):
        if "," not in str(value):  # of several cards each one's
            bytes_of(value, place)
    elif "." in name and name in setting_keys():
        parse_setting(f"{name}={value}")
    elif name.startswith("machine.") and unit_of(name) != "number":
        parse_quantity(value, unit_of(name), place)


def _refuse_unknown(asked: Iterable[str], valid: set[str], where: str) -> None:
    for key in sorted(asked):
        if key not in valid:
            raise UnknownName(where, key, valid)


def checked_value(key: object, value: Any, where: str, folder: Path) -> Any:
    """Return a field's value; raises InputError for one of another type than the field's."""
    name, place = str(key), f"{where}: {key}"
    if value is None:
        return None
    kind = next((options[name] for options in OPTIONS.values() if name in options), None)
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(place, value, "not a finite number", "give another value")
    if kind is None:  # a setting: read as after --set
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, (str, int, float)):
            return str(value)
        if isinstance(value, list) and all(isinstance(one, (str, int, float)) for one in value):
            return ",".join(map(str, value))
        raise InputError(place, value, "not one value", "write a number or a text")
    if kind == _YES and isinstance(value, bool):
        return value
    if kind == _SHARES and not isinstance(value, str):
        shares = value if isinstance(value, list) else [value]
        if not shares or any(isinstance(one, bool) or not isinstance(one, (int, float)) for one in shares):
            raise InputError(place, value, f"not {kind}", "give another value")
        return ",".join(map(str, shares))
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST
    if kind == _YES or not (whole if kind == _COUNT else isinstance(value, str) or (whole and kind in (_SIZE, _WORD))):
        raise InputError(place, value, f"not {kind}", "give another value")
    if kind in (_FILE, _SHARES) and (os.sep in value or Path(value).suffix) and os.path.exists(folder / value):
        return str(folder / value)
    return str(value) if kind == _WORD else value
