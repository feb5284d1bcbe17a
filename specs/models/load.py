"""Models by name or from a file: a Hugging Face `config.json`, a folder that holds one, a GGUF file.

Modelled: which file is meant and who reads it. Ignored: which keys a family of models uses (`config`).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from ...base.errors import InputError
from ...base.json_files import parse_json, read_json, read_text
from ...base.units import MIB
from ..catalog import MODELS_FOLDER
from ..catalog.bundled import resolve
from .config import is_gguf, read_config, read_gguf, safetensors
from .model import ModelSpec
from .names import SAME_SHAPE, bundled_name, model_in

_QUANTISERS = ("quantization_config", "quantization", "expert_dtype")
_ELSE = "models with experts are predicted; a config.json or .gguf file of any works too, and moeplan model list has all names"
_MAX_INDEX_BYTES = 64 * MIB
"""Largest index of a checkpoint's files: a line for each tensor, a hundred thousand of them in the largest models."""


def list_models() -> list[str]:
    """Return the names of the bundled models."""
    return sorted(path.stem for path in MODELS_FOLDER.glob("*.json"))


def is_bundled(name: str) -> bool:
    """Return whether `name` is a bundled model's, or that of a model with the configuration of one."""
    return bundled_name(name, list_models()) is not None


def named_in(text: str) -> str | None:
    """Return the bundled model that a file or repository is of by its name, as it stands in a command; None where that is not certain."""
    return model_in(text, list_models())


def load_model(name_or_path: str | os.PathLike[str]) -> ModelSpec:
    """Return a bundled model by its name (or another's of its shape), or that of a `config.json`, of a folder with one, or of a GGUF file.

    A folder, or an index of safetensors files in it, stands for the checkpoint there: where its files lie beside, their headers say how
    much everything takes. Raises UnknownName for a name that is neither, InputError for a file that is not such a configuration.
    """
    text = os.fspath(name_or_path)
    named = SAME_SHAPE.get(text)
    if named is None and not os.path.exists(text):
        named = bundled_name(text, list_models())
        if named is None and Path(text).suffix not in (".json", ".gguf") and (of := named_in(text)) is not None:
            raise InputError(
                "model", text, f"a checkpoint or file of {of}", f"write --model {of} and its format as --quant"
            )
    path = resolve("model", named or text, MODELS_FOLDER, list_models(), _ELSE)
    if is_gguf(path):
        return read_gguf(path)
    folder = path if os.path.isdir(path) else path.parent if path.name == safetensors.INDEX else None
    if folder is not None:  # no error for a path that is too long or may not be looked at: reading says that
        path = folder / "config.json"
    # Published configurations hold Infinity (`time_step_limit` of Mamba); where a size is meant, its reader refuses it.
    data = parse_json(read_text(path, "model"), "model", os.fspath(path), allow_nan=True)
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    where = f"model {path.name}" if path.parent == MODELS_FOLDER else f"model {path}"
    beside = _quantiser_beside(path, data)
    if folder is None:
        return read_config(data, name, where, beside)
    index_path = folder / safetensors.INDEX
    index = read_json(index_path, "model", _MAX_INDEX_BYTES) if index_path.is_file() else None
    files = safetensors.files_of(folder, index)
    if not files:  # as the configuration says
        return read_config(data, name, where, beside)
    return safetensors.as_stored(
        _whatever_the_quantiser(data, name, where, beside), safetensors.tensors_of(files, index), folder
    )


def _whatever_the_quantiser(data: dict[str, Any], name: str, where: str, beside: dict[str, Any] | None) -> ModelSpec:
    """Return the model of a configuration; one whose quantiser is not known, or not said, as if nothing were quantised: files say it."""
    try:
        return read_config(data, name, where, beside)
    except InputError as error:
        if "quantization" not in error.field:
            raise
    plain = _without_quantiser(data)
    return dataclasses.replace(read_config(plain, "checkpoint", where), name=name)


def _without_quantiser(data: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without what it says of its quantiser, in nested tables either."""
    tables = {key: _without_quantiser(value) for key, value in data.items() if isinstance(value, dict)}
    return {key: value for key, value in (data | tables).items() if key not in _QUANTISERS}


def _quantiser_beside(path: Path, data: dict[str, Any]) -> dict[str, Any] | None:
    """Return the `hf_quant_config.json` that ModelOpt writes beside a `config.json`; None where there is none to read."""
    beside = path.with_name("hf_quant_config.json")
    if path.name != "config.json" or "quantization_config" in data or not beside.is_file():
        return None
    return read_json(beside, "model")
