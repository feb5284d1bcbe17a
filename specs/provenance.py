"""What a plan was made of: model and machine, whole and with their hashes, so that a plan can be read where neither is known.

    "model":   {"sha256": "…", "spec": {…}}        every field of `ModelSpec`
    "machine": {"sha256": "…", "profile": {…}}     every constant with source and citation, every measured table

Modelled: writing both into a plan document, and reading them back, checked: a part that was changed by hand no longer has its hash.
Ignored: recordings, of which a plan keeps the hash only (`traces.content`), and names: they are never looked up again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from ..base.errors import InputError
from .machines.profile import Profile, profile_values
from .machines.profile_file import profile_from_json
from .models import ModelSpec

_HASH = "sha256"
_AGAIN = "make it again with moeplan plan"


def made_of(model: ModelSpec, machine: Profile) -> dict[str, Any]:
    """Return the keys of a plan document that hold model and machine."""
    return {
        "model": _with_hash("spec", dataclasses.asdict(model)),
        "machine": _with_hash("profile", profile_values(machine)),
    }


def model_of(document: Mapping[str, Any]) -> ModelSpec:
    """Return the model that a plan was made for; raises InputError where the plan holds none or it was changed."""
    return model_from_values(_part(document, "model", "spec"))


def model_from_values(values: Mapping[str, Any]) -> ModelSpec:
    """Return the model of plain values, as a plan holds them; raises InputError for what is none."""
    try:
        return _model_adapter().validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(("plan: model.spec", *(str(part) for part in first["loc"])))
        raise InputError(field, first.get("input"), first["msg"].lower(), _AGAIN) from None
    except InputError as error:  # a rule of the model itself
        raise InputError(f"plan: model.spec.{error.field}", error.value, error.rule, _AGAIN) from None


def machine_of(document: Mapping[str, Any]) -> Profile:
    """Return the machine that a plan was made for; raises InputError where the plan holds none or it was changed."""
    return profile_from_json(json.dumps(_part(document, "machine", "profile")), "plan: machine.profile")


def machine_sha256(machine: Profile) -> str:
    """Return the hash of a machine, as plans carry it."""
    return content_sha256(profile_values(machine))


def content_sha256(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain values, whatever the order of their keys."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _with_hash(name: str, values: dict[str, Any]) -> dict[str, Any]:
    return {_HASH: content_sha256(values), name: values}


def _part(document: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
    """Return the embedded part called `key`, its hash checked."""
    part = document.get(key)
    if part is None:
        rule = "the plan was written before plans carried their model and machine"
        raise InputError(f"plan: {key}", "(absent)", rule, _AGAIN)
    values = part.get(name) if isinstance(part, Mapping) else None
    if not isinstance(values, Mapping):
        raise InputError(f"plan: {key}.{name}", values, "not a table", _AGAIN)
    try:
        found = content_sha256(values)
    except (ValueError, RecursionError):  # numbers that JSON does not have
        found = ""
    if part.get(_HASH) != found:
        rule = "is not the hash of what stands there: it was changed after the plan was made"
        raise InputError(f"plan: {key}.{_HASH}", part.get(_HASH), rule, _AGAIN)
    return values


@cache
def _model_adapter() -> TypeAdapter[ModelSpec]:
    """Return the validator of models: the dataclasses themselves, strict, with no unknown keys."""
    return TypeAdapter(with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))(ModelSpec))
