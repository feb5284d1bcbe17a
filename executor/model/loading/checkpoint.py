"""A checkpoint's experts, one at a time, straight from its safetensors files; nothing else of it is read here.

    files of the folder ── headers, checked ──► where each matrix of each expert lies ── `expert(layer, number)` ──► gate-up, down

Modelled: experts as published (one tensor for each matrix of each expert, under the names of a dozen families) and fused
([experts, rows, columns] for a layer), plain numbers of 16 or 32 bits; matrices stored transposed, gates and ups that alternate.
Ignored: quantised checkpoints, which are refused, and everything that is no routed expert (transformers loads that).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ....base.errors import InputError, one_line
from ....base.json_files import read_json
from ....base.units import MIB
from ....specs.models.config import safetensors as files
from ....specs.models.config.safetensors.header import Tensor, read_header

_MAX_INDEX_BYTES = 64 * MIB
_REMEDY = "give the folder of a complete checkpoint"
# Names of one expert's matrices in published checkpoints: which half or matrix each is.
_ROLES = {
    "w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down", "gate_up_proj": "gate_up",
    "gate_proj.weight": "gate",
}  # fmt: skip
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|h)\.(\d+)\.")
_ONE = re.compile(r"\.experts\.(\d+)\.(\w+?)(?:\.(weight|bias))?$")
_FUSED = re.compile(r"\.experts\.(\w+?)(_bias)?(?:\.(?:weight))?$")
_PLAIN = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BYTES = {"F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a model's experts modules hold their weights, as transformers says it of them."""

    gated: bool
    transposed: bool
    """Matrices are [in, out], not [out, in]."""
    alternating: bool
    """Gates and ups alternate, row by row."""
    bias: bool


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor, or one line of it, lies."""

    file: Path
    name: str
    line: int | None


class Checkpoint:
    """The experts of the checkpoint in a folder; close it."""

    def __init__(self, folder: Path, tensors: Mapping[Path, Mapping[str, Tensor]]) -> None:
        self.folder = folder
        self.tensors = tensors
        self._places: dict[tuple[int, int], dict[str, _Place]] = {}
        self._kinds: dict[str, str] = {}
        self._open: dict[Path, Any] = {}
        for path, held in tensors.items():
            for name, tensor in held.items():
                if is_expert(name):
                    self._add(path, name, tensor)

    @property
    def kinds(self) -> set[str]:
        """Types that experts are stored in, as headers name them."""
        return set(self._kinds.values())

    def num_bytes_of_the_rest(self, itemsize: int) -> int:
        """Return the bytes of everything but experts where every number takes `itemsize`."""
        return itemsize * sum(
            tensor.numbers for held in self.tensors.values() for name, tensor in held.items() if not is_expert(name)
        )

    def check(self, layers: Sequence[int], num_experts: int, layout: Layout) -> None:
        """Return nothing; raises InputError where an expert of `layers` is absent, in part or as a whole, or quantised."""
        where = os.fspath(self.folder)
        strange = {name: kind for name, kind in self._kinds.items() if kind not in _PLAIN}
        if strange:
            name, kind = next(iter(strange.items()))
            rule = f"its experts are quantised ({name[-60:]} is {kind}); plain numbers of 16 or 32 bits are read"
            raise InputError(
                "--model", where, rule, "give the unquantised checkpoint; experts are quantised as the plan says"
            )
        wanted = ["down", *(["bias.down"] if layout.bias else [])]
        for layer in layers:
            for expert in range(num_experts):
                held = self._places.get((layer, expert), {})
                lost = [role for role in wanted if role not in held]
                if not held or lost or not _has_first(held, layout):
                    what = f"{'a matrix of ' if held else ''}expert {expert} of layer {layer}"
                    raise InputError("--model", where, f"its files do not hold {what}", _REMEDY)

    def expert(self, layer: int, number: int, layout: Layout) -> dict[str, torch.Tensor]:
        """Return `gate_up` [2·I or I, H] with gates before ups, `down` [H, I], and their biases where there are any."""
        held = self._places[layer, number]
        found = {"gate_up": self._first(held, layout), "down": self._matrix(held["down"], layout)}
        if layout.bias:
            first = self._read(held["bias.gate_up"])
            found["gate_up_bias"] = _parted(first.unsqueeze(-1), layout).squeeze(-1)
            found["down_bias"] = self._read(held["bias.down"])
        return found

    def close(self) -> None:
        """Let go of the files."""
        self._open.clear()

    def _first(self, held: Mapping[str, _Place], layout: Layout) -> torch.Tensor:
        if "gate_up" in held:
            return _parted(self._matrix(held["gate_up"], layout), layout)
        names = ("gate", "up") if layout.gated else ("up",)
        return torch.cat([self._matrix(held[name], layout) for name in names])

    def _matrix(self, place: _Place, layout: Layout) -> torch.Tensor:
        """Return [out, in]; published tensors of single experts are stored so in any family, fused ones as the module has them."""
        found = self._read(place)
        return found.T if layout.transposed and place.line is not None else found

    def _read(self, place: _Place) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            if place.file not in self._open:
                self._open[place.file] = safe_open(place.file, framework="pt")
            file = self._open[place.file]
            found: torch.Tensor = (
                file.get_tensor(place.name) if place.line is None else file.get_slice(place.name)[place.line]
            )
        except (OSError, SafetensorError, RuntimeError) as error:
            rule = f"cannot be read as safetensors ({one_line(str(error), 200)})"
            raise InputError("--model", os.fspath(place.file), rule, _REMEDY) from None
        return found

    def _add(self, path: Path, name: str, tensor: Tensor) -> None:
        layer = _LAYER.search(name)
        if layer is None:
            return
        self._kinds[name] = tensor.kind
        one = _ONE.search(name)
        if one is not None:
            role = _ROLES.get(one[2], one[2])
            key = f"bias.{role}" if one[3] == "bias" else role
            self._places.setdefault((int(layer[1]), int(one[1])), {})[key] = _Place(path, name, None)
            return
        fused = _FUSED.search(name)
        if fused is not None and tensor.shape:
            role = _ROLES.get(fused[1], fused[1])
            key = f"bias.{role}" if fused[2] else role
            for expert in range(tensor.shape[0]):
                self._places.setdefault((int(layer[1]), expert), {})[key] = _Place(path, name, expert)


def is_expert(name: str) -> bool:
    """Return whether a tensor of a checkpoint is of a routed expert."""
    return ".experts." in name


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint in `folder`, its headers checked.

    Raises InputError where there is none, where files are absent, cut short or damaged, or where the index says otherwise.
    """
    index_path = folder / files.INDEX
    index = read_json(index_path, "--model", _MAX_INDEX_BYTES) if index_path.is_file() else None
    paths = files.files_of(folder, index)
    if not paths:
        raise InputError("--model", os.fspath(folder), "holds no safetensors files", _REMEDY)
    files.tensors_of(paths, index)  # every rule of the format and of the index
    tensors = {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # it was read a moment ago
            tensors[path] = read_header(path)
    for path, held in tensors.items():
        if held and path.stat().st_size < sum(tensor.num_bytes for tensor in held.values()):
            raise InputError("--model", os.fspath(path), "holds a header and no weights", _REMEDY)
    return Checkpoint(folder, tensors)


def _has_first(held: Mapping[str, Any], layout: Layout) -> bool:
    parts = {"gate", "up"} if layout.gated else {"up"}
    biased = not layout.bias or "bias.gate_up" in held
    return biased and ("gate_up" in held or parts <= held.keys())


def _parted(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return rows [2·I, …] with all gates before all ups."""
    return torch.cat([rows[0::2], rows[1::2]]) if layout.gated and layout.alternating else rows
