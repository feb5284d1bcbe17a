"""Files of models and machines, in and out: validated at the edge, written whole or not at all.

Modelled: reading JSON with one clear complaint for whatever is wrong with it (absent, unreadable, too large, not text, not
JSON, wrong keys, wrong types, wrong sizes), bundled files by name, writing beside the target and renaming. Ignored: what the
values mean (`specs`, `hardware`), which keys a model family uses (`model_config`).
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from . import plain_json, text_files
from .catalog import HARDWARE_FOLDER, MODELS_FOLDER
from .errors import InputError, UnknownName
from .hardware import SCHEMA_VERSION, Profile
from .model_config import is_gguf, read_config, read_gguf, safetensors
from .specs import ModelSpec
from .text_files import write_atomic as write_atomic
from .units import MIB

MAX_CONFIG_BYTES = 4 * MIB
"""Largest model or hardware file that is read; real ones are a few kilobytes."""
_MAX_INDEX_BYTES = 64 * MIB
"""Largest index of a checkpoint's files: a line for each tensor, a hundred thousand of them in the largest models."""


# --- any JSON file -----------------------------------------------------------------------------------------------------


def read_text(path: str | os.PathLike[str], what: str, max_bytes: int = MAX_CONFIG_BYTES) -> str:
    """Return the text of the file at `path`, of a configuration's size at most; raises InputError (see `text_files`)."""
    return text_files.read_text(path, what, max_bytes)


def parse_json(text: str, what: str, where: str, *, allow_nan: bool = False) -> dict[str, Any]:
    """Return the JSON object that `text` holds; raises InputError for anything else, truncation named as such."""
    try:
        data = plain_json.parse(text, allow_nan=allow_nan)
    except ValueError as error:
        raise InputError(what, where, str(error), "write the file anew") from None
    if not isinstance(data, dict):
        rule = f"a JSON {type(data).__name__} where an object is expected"
        raise InputError(what, where, rule, "check that it is the right file")
    return data


def read_json(path: str | os.PathLike[str], what: str, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Return the JSON object in the file at `path`; raises InputError with one line for whatever is wrong with it."""
    return parse_json(read_text(path, what, max_bytes), what, os.fspath(path))


# --- models ------------------------------------------------------------------------------------------------------------


def list_models() -> list[str]:
    """Return the names of the bundled models."""
    return sorted(path.stem for path in MODELS_FOLDER.glob("*.json"))


def load_model(name_or_path: str | os.PathLike[str]) -> ModelSpec:
    """Return a bundled model by name, or that of a Hugging Face `config.json`, of a folder that holds one, or of a GGUF file.

    A folder, or an index of safetensors files in it, stands for the checkpoint there: where its files lie beside, their headers say how
    much everything takes. Raises UnknownName for a name that is neither, InputError for a file that is not such a configuration.
    """
    path = _resolve("model", name_or_path, MODELS_FOLDER, list_models())
    if is_gguf(path):
        return read_gguf(path)
    folder = path if os.path.isdir(path) else path.parent if path.name == safetensors.INDEX else None
    if folder is not None:  # no error for a path that is too long or may not be looked at: reading says that
        path = folder / "config.json"
    # Published configurations hold Infinity (`time_step_limit` of Mamba); where a size is meant, its reader refuses it.
    data = parse_json(read_text(path, "model"), "model", os.fspath(path), allow_nan=True)
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    where = f"model {path.name}" if path.parent == MODELS_FOLDER else f"model {path}"
    spec = read_config(data, name, where, _quantiser_beside(path, data))
    return spec if folder is None else _with_files(spec, folder)


def _with_files(spec: ModelSpec, folder: Path) -> ModelSpec:
    """Return the model with the bytes of the checkpoint in `folder`; as its configuration says, where no weights are there."""
    index_path = folder / safetensors.INDEX
    index = read_json(index_path, "model", _MAX_INDEX_BYTES) if index_path.is_file() else None
    files = safetensors.files_of(folder, index)
    return safetensors.as_stored(spec, safetensors.tensors_of(files, index), folder) if files else spec


def _quantiser_beside(path: Path, data: dict[str, Any]) -> dict[str, Any] | None:
    """Return the `hf_quant_config.json` that ModelOpt writes beside a `config.json`; None where there is none to read."""
    beside = path.with_name("hf_quant_config.json")
    if path.name != "config.json" or "quantization_config" in data or not beside.is_file():
        return None
    return read_json(beside, "model")


# --- machines ----------------------------------------------------------------------------------------------------------


def list_hardware() -> list[str]:
    """Return the names of the bundled hardware profiles."""
    return sorted(path.stem for path in HARDWARE_FOLDER.glob("*.json"))


def load_hardware(name_or_path: str | os.PathLike[str]) -> Profile:
    """Return a bundled profile by name, or the one in a file.

    Raises UnknownName for a name that is neither, InputError for a file that is not a profile.
    """
    path = _resolve("hardware", name_or_path, HARDWARE_FOLDER, list_hardware())
    return profile_from_json(read_text(path, "hardware"), os.fspath(path))


def profile_from_json(text: str, where: str = "profile") -> Profile:
    """Return the profile that `text` holds, every key, type, range and citation checked; raises InputError otherwise."""
    data = parse_json(text, "hardware", where)
    version = data.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        rule = f"this version reads {SCHEMA_VERSION}"
        raise InputError(f"{where}: schema_version", version, rule, "calibrate again")
    try:
        return _profile_adapter().validate_json(text)
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


@cache
def _profile_adapter() -> TypeAdapter[Profile]:
    """Return the validator of profiles: the dataclasses themselves, strict, with no unknown keys."""
    return TypeAdapter(with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))(Profile))


def _resolve(what: str, name_or_path: str | os.PathLike[str], folder: Path, names: list[str]) -> Path:
    """Return the file that a bundled name or a path stands for; raises UnknownName for a bare word that is neither."""
    text = os.fspath(name_or_path)
    if text in names:
        return folder / f"{text}.json"
    path = Path(text)
    if not os.path.exists(path) and path.suffix not in (".json", ".gguf") and os.sep not in text:
        raise UnknownName(what, text, names)
    return path
