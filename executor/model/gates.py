"""Lookahead gates as a file: for each column and distance a map from what an earlier router reads to the column's experts.

    gate.<column>.<distance>.weight float32 [num_experts, hidden] and .bias [num_experts]; where there is a hidden layer, too,
    .inner [units, hidden], .inner_bias [units] and .outer [num_experts, units]; the header names the model's shape

Modelled: reading them whole and checked against the model, writing them aside and putting them in place. Ignored: how they are
trained (`align`) and used (`guesses`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ...base.errors import InputError, one_line
from ...base.text_files import write_atomic
from ...specs.models import ModelSpec
from .guesses import Gate, Gates

KIND, VERSION = "lookahead-gates", "1"
_KEY = re.compile(r"gate\.(\d+)\.(\d+)\.(weight|bias|inner|inner_bias|outer)")
_REMEDY = "train them for this model (moeplan gates train)"


def shape_of(spec: ModelSpec) -> dict[str, str]:
    """Return what gates say of the model they belong to."""
    columns = ",".join(map(str, spec.moe_layers))
    return {
        "family": spec.family, "hidden_size": str(spec.hidden_size), "num_experts": str(spec.num_experts),
        "top_k": str(spec.top_k), "moe_layers": columns,
    }  # fmt: skip


def save_gates(path: str | os.PathLike[str], gates: Gates, spec: ModelSpec, facts: Mapping[str, str]) -> None:
    """Write gates, with the model's shape and further strings in the header; what stands at `path` is replaced at the end."""
    from safetensors.torch import save

    tensors = {
        f"gate.{column}.{distance}.{name}": tensor.float().contiguous()
        for (column, distance), gate in sorted(gates.items())
        for name, tensor in gate._asdict().items()
        if tensor is not None
    }
    header = {"kind": KIND, "schema_version": VERSION, **shape_of(spec), **facts}
    write_atomic(path, save(tensors, header))


def load_gates(path: str | os.PathLike[str], spec: ModelSpec) -> Gates:
    """Return the gates in the file at `path`; raises InputError for a damaged file, or for another model's gates."""
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    found: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    try:
        if not Path(path).is_file():
            raise InputError("--gates", name, "no such file", "check the path")
        with safe_open(name, framework="pt") as file:
            header = file.metadata() or {}
            keys = list(file.keys())
            _check_header(header, spec, name)
            for key in keys:
                match = _KEY.fullmatch(key)
                if match is None:
                    raise InputError("--gates", name, f"holds a tensor {key[:60]!r}", _REMEDY)
                found.setdefault((int(match[1]), int(match[2])), {})[match[3]] = file.get_tensor(key)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(
            "--gates", name, f"cannot be read as safetensors ({one_line(str(error), 200)})", _REMEDY
        ) from None
    gates = {}
    for (column, distance), parts in found.items():
        if not (_fits(parts, spec) and 0 < distance <= column < spec.num_moe_layers):
            rule = f"the gate of column {column}, {distance} early, is absent in part, or of another shape"
            raise InputError("--gates", name, rule, _REMEDY)
        gates[column, distance] = Gate(**{part: tensor.float() for part, tensor in parts.items()})
    return gates


def _fits(parts: Mapping[str, torch.Tensor], spec: ModelSpec) -> bool:
    """Return whether the tensors of one gate are finite, all there, and of the model's shape."""
    units = len(parts["inner"]) if "inner" in parts and parts["inner"].ndim else 0
    wanted: dict[str, tuple[int, ...]] = {"weight": (spec.num_experts, spec.hidden_size), "bias": (spec.num_experts,)}
    if len(parts) > len(wanted):
        wanted |= {"inner": (units, spec.hidden_size), "inner_bias": (units,), "outer": (spec.num_experts, units)}
    shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    return shapes == wanted and all(bool(tensor.isfinite().all()) for tensor in parts.values())


def _check_header(header: Mapping[str, str], spec: ModelSpec, name: str) -> None:
    if header.get("kind") != KIND or header.get("schema_version") != VERSION:
        raise InputError("--gates", name, "holds no lookahead gates that this version reads", _REMEDY)
    for key, value in shape_of(spec).items():
        if header.get(key) != value:
            rule = f"belongs to another model: {key} is {one_line(header.get(key, '(absent)'), 60)}, here {one_line(value, 60)}"
            raise InputError("--gates", name, rule, _REMEDY)
