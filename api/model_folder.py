"""A checkpoint's folder and files of text, as every function that computes with a real model takes them.

Modelled: what must be installed and there before anything is loaded. Ignored: loading (`executor/model/`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.errors import InputError
from ..specs.models import ModelSpec
from ..specs.models.load import load_model
from .validate import check_device, check_torch

if TYPE_CHECKING:
    from ..executor.model.loading.text import Text


def check_can_run(device: str = "cpu") -> None:
    """Return nothing; raises InputError where torch, transformers or the device is not there."""
    check_torch()
    if importlib.util.find_spec("transformers") is None:
        raise InputError("transformers", "(absent)", "running a model needs it", "pip install 'moeplan[run,hf]'")
    check_device(device)


def model_in(folder: str | os.PathLike[str]) -> ModelSpec:
    """Return the model of the checkpoint in `folder`; raises InputError for what is no folder of one."""
    if not os.path.isdir(folder):
        rule = "no folder of a checkpoint" if os.path.exists(folder) else "no such folder"
        raise InputError(
            "--model", os.fspath(folder), rule, "give the folder that holds config.json and safetensors files"
        )
    return load_model(folder)


def read_bytes(path: str | os.PathLike[str], option: str) -> bytes:
    """Return what the file at `path` holds; raises InputError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = (error.strerror or "failed").lower()
        raise InputError(option, os.fspath(path), f"cannot be read ({reason})", "check the path") from None


def read_texts(paths: Sequence[str | os.PathLike[str]], text: Text) -> list[tuple[str, list[int]]]:
    """Return (name, ids) of each file of text."""
    return [(os.fspath(path), text.ids(read_bytes(path, "--text"), "--text")) for path in paths]


def gates_in(path: str | os.PathLike[str] | None, spec: ModelSpec) -> Any:
    """Return the trained gates in a file, None where there is none; raises InputError for another model's."""
    if path is None:
        return None
    from ..executor.model.gates import load_gates

    return load_gates(path, spec)
