"""Machine profiles in and out: validated at the edge.

Modelled: bundled profiles by name, profiles in files, every key, type, range and citation checked. Ignored: what the constants
mean (`profile`), machines made of parts (`load`).
"""

from __future__ import annotations

import json
import os
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from ...base.errors import InputError
from ...base.json_files import parse_json, read_text
from ..catalog import HARDWARE_FOLDER
from ..catalog.bundled import resolve
from .profile import SCHEMA_VERSION, Profile

# Curves and their arguments under the names that older versions wrote; accepted until the next version.
_OLD_NAMES = {"laps.compute": "passes.compute", "laps.copy": "passes.copy", "lap": "pass", "visits": "layer_steps"}


def list_hardware() -> list[str]:
    """Return the names of the bundled hardware profiles."""
    return sorted(path.stem for path in HARDWARE_FOLDER.glob("*.json"))


def load_hardware(name_or_path: str | os.PathLike[str]) -> Profile:
    """Return a bundled profile by name, or the one in a file.

    Raises UnknownName for a name that is neither, InputError for a file that is not a profile.
    """
    path = resolve("hardware", name_or_path, HARDWARE_FOLDER, list_hardware())
    return profile_from_json(read_text(path, "hardware"), os.fspath(path))


def profile_from_json(text: str, where: str = "profile") -> Profile:
    """Return the profile that `text` holds, every key, type, range and citation checked; raises InputError otherwise."""
    data = parse_json(text, "hardware", where)
    version = data.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        rule = f"this version reads {SCHEMA_VERSION}"
        raise InputError(f"{where}: schema_version", version, rule, "calibrate again")
    try:
        return _profile_adapter().validate_json(_with_new_names(data, text))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "(top level)"
        missing = first["type"] in ("missing", "missing_keyword_only_argument")
        unknown = first["type"] in ("unexpected_keyword_argument", "extra_forbidden")
        rule = "a field is absent" if missing else "unknown field" if unknown else first["msg"].lower()
        value = "(absent)" if missing else first.get("input")
        raise InputError(f"{where}: {field}", value, rule, "correct the file") from None
    except InputError as error:  # a rule of the profile itself
        raise InputError(f"{where}: {error.field}", error.value, error.rule, error.remedy) from None


def _with_new_names(data: dict[str, Any], text: str) -> str:
    """Return a profile's JSON with the names of today in its curves; `text` itself where it has no other."""
    curves = data.get("curves")
    if not isinstance(curves, dict) or not any(f'"{old}"' in text for old in _OLD_NAMES):
        return text
    renamed = {
        _OLD_NAMES.get(name, name): curve
        | {"arguments": {_OLD_NAMES.get(argument, argument): at for argument, at in curve["arguments"].items()}}
        if isinstance(curve, dict) and isinstance(curve.get("arguments"), dict)
        else curve
        for name, curve in curves.items()
    }
    return json.dumps(data | {"curves": renamed})


@cache
def _profile_adapter() -> TypeAdapter[Profile]:
    """Return the validator of profiles: the dataclasses themselves, strict, with no unknown keys."""
    return TypeAdapter(with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))(Profile))
