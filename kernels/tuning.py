"""Launch configurations as data: which tile sizes a kernel is launched with, by device, weights, shape and rows.

A file of configurations names a device and holds entries; each entry is for one kernel, one kind of weights and one matrix shape
(or any shape), and maps rows per expert to a configuration. The nearest number of rows, in ratio, is taken. Files are looked
up in this order: the cache that `search` writes, files shipped for the device, files shipped for its compute capability,
`default.json`. `origin` says whether a file's numbers were `measured` by a search or `reasoned` from the sizes of memories.

Modelled: exact shapes first, then entries for any shape. Ignored: interpolating configurations between shapes. No torch here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import InputError
from ..base.text_files import output_folder, write_atomic

SCHEMA_VERSION = 1
KERNELS = ("grouped_gate_up", "grouped_down", "dequant_gate_up", "dequant_down")
_SHIPPED = Path(__file__).parent / "tuned"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedConfig:
    """How the grouped GEMM is launched."""

    block_m: int
    """Rows of a tile: a power of two from 16."""
    block_n: int
    block_k: int
    group_m: int
    """Row tiles that share a sweep over the columns, for reuse in L2."""
    num_warps: int
    num_stages: int
    """Depth of the software pipeline."""
    descriptors: bool = False
    """Load through tensor descriptors (TMA) where the device has them and the strides allow it."""
    programs_per_sm: int | None = None
    """Persistent programs on each multiprocessor; None launches one program for each tile."""
    flatten: bool = False
    """Persistent programs only: pipeline across tiles, so that the next tile's loads start while this one is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DequantConfig:
    """How the dequantising GEMM is launched."""

    block_m: int
    """Rows of a tile: a power of two from 8."""
    block_n: int
    split_k: int
    """Programs that share one tile's inputs; the last to finish adds up."""
    num_warps: int
    num_stages: int
    scale_first: bool
    """Scale weights before they are multiplied (many rows), rather than each group's sum after (few rows)."""
    sums_inside: bool = False
    """Few rows only: sum each group's inputs in the kernel, rather than once in a kernel before."""


Config = GroupedConfig | DequantConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningKey:
    """What a configuration is chosen for."""

    kernel: str
    """One of KERNELS."""
    weights: str
    """A name of slot_layout.WEIGHT_NAMES."""
    num_outputs: int
    num_inputs: int


def device_slug(device_name: str) -> str:
    """Return the device's name as part of a file name: "NVIDIA H200" becomes "NVIDIA_H200"."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", device_name).strip("_")


def cache_folder() -> Path:
    """Return where searches leave what they found (it need not exist): MOEPLAN_CACHE_DIR, else the user's cache folder."""
    base = os.environ.get("MOEPLAN_CACHE_DIR")
    if base is None:
        base = os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "moeplan"
        )
    return Path(base) / "tuned"


def find_config(
    key: TuningKey, rows_per_expert: int, device_name: str, capability: tuple[int, int] | None = None
) -> Config:
    """Return the configuration for `rows_per_expert` rows of `key` on a device.

    `capability` is the CUDA compute capability, None for anything else. Answers are kept until this process saves something, for a
    launch asks each time. Raises InputError for an unknown kernel or a broken file.
    """
    return _look_up(key, rows_per_expert, device_name, capability, cache_folder())


@functools.lru_cache(maxsize=4096)
def _look_up(
    key: TuningKey, rows_per_expert: int, device_name: str, capability: tuple[int, int] | None, folder: Path
) -> Config:
    """What `find_config` returns while the files in `folder`, the cache, stay as they are."""
    if key.kernel not in KERNELS:
        raise InputError("kernel", key.kernel, f"one of {', '.join(KERNELS)}", "check its spelling")
    for path in _candidate_files(device_name, capability, folder):
        entries = _entries(str(path), _mtime_ns(path))
        for outputs, inputs in ((key.num_outputs, key.num_inputs), (None, None)):
            by_rows = entries.get((key.kernel, key.weights, outputs, inputs))
            if by_rows:
                return by_rows[nearest_rows(rows_per_expert, by_rows)]
    raise InputError(
        "weights", key.weights, f"no configuration of {key.kernel} for them", "add one to kernels/tuned/default.json"
    )


def nearest_rows(rows: int, known: Mapping[int, Config]) -> int:
    """Return the known number of rows nearest to `rows` in ratio; of two equally near, the smaller."""
    wanted = math.log(max(rows, 1))
    return min(sorted(known), key=lambda count: abs(math.log(max(count, 1)) - wanted))


def origin(device_name: str, capability: tuple[int, int] | None = None) -> str:
    """Return `measured` or `reasoned` for the first file that applies to a device, with the file's name."""
    for path in _candidate_files(device_name, capability, cache_folder()):
        return f"{_read(path)['origin']} ({path.name})"
    raise InputError("device", device_name, "no file of launch configurations applies", "reinstall moeplan")


def save_configs(
    found: Mapping[TuningKey, Mapping[int, Config]], device_name: str, *, note: str, folder: Path | None = None
) -> Path:
    """Return the file that now holds `found`, merged over what it held before; written whole or not at all."""
    folder = cache_folder() if folder is None else folder
    path = folder / f"{device_slug(device_name)}.json"
    merged: dict[tuple[str, str, int | None, int | None], dict[int, Config]] = {}
    if path.exists():
        merged.update(_entries(str(path), _mtime_ns(path)))
    for key, by_rows in found.items():
        where = (key.kernel, key.weights, key.num_outputs, key.num_inputs)
        merged[where] = {**merged.get(where, {}), **by_rows}
    document = {
        "schema_version": SCHEMA_VERSION,
        "device": device_name,
        "origin": "measured",
        "note": note,
        "entries": [
            {
                "kernel": kernel,
                "weights": weights,
                "num_outputs": outputs,
                "num_inputs": inputs,
                "rows": {str(rows): _as_json(config) for rows, config in sorted(by_rows.items())},
            }
            for (kernel, weights, outputs, inputs), by_rows in sorted(merged.items(), key=lambda item: str(item[0]))
        ],
    }
    _write(path, json.dumps(document, indent=1) + "\n")
    _look_up.cache_clear()
    return path


def _candidate_files(device_name: str, capability: tuple[int, int] | None, folder: Path) -> list[Path]:
    name = f"{device_slug(device_name)}.json"
    paths = [folder / name, _SHIPPED / name]
    if capability is not None:
        paths.append(_SHIPPED / f"sm_{capability[0]}{capability[1]}.json")
    paths.append(_SHIPPED / "default.json")
    return [path for path in paths if path.is_file()]


def _mtime_ns(path: Path) -> int:
    return path.stat().st_mtime_ns


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(path, f"cannot be read ({error})") from None
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        raise _broken(path, f"schema_version is not {SCHEMA_VERSION}")
    return document


@functools.lru_cache(maxsize=64)
def _entries(path: str, mtime_ns: int) -> dict[tuple[str, str, int | None, int | None], dict[int, Config]]:
    """A file's configurations by kernel, weights, outputs and inputs; read anew only when the file has changed."""
    found: dict[tuple[str, str, int | None, int | None], dict[int, Config]] = {}
    try:
        for entry in _read(Path(path))["entries"]:
            kind = GroupedConfig if entry["kernel"].startswith("grouped") else DequantConfig
            by_rows: dict[int, Config] = {int(rows): kind(**config) for rows, config in entry["rows"].items()}
            for config in by_rows.values():
                _check_config(config)
            found[entry["kernel"], entry["weights"], entry["num_outputs"], entry["num_inputs"]] = by_rows
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _broken(Path(path), f"an entry is not as expected ({type(error).__name__}: {error})") from None
    return found


def _check_config(config: Config) -> None:
    for name in ("block_m", "block_n", "num_warps"):
        size = getattr(config, name)
        if not isinstance(size, int) or size <= 0 or size & (size - 1):
            raise ValueError(f"{name} = {size!r} is not a power of two")


def _as_json(config: Config) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(config).items() if value is not None}


def _broken(path: Path, rule: str) -> InputError:
    return InputError("launch configurations", os.fspath(path), rule, "delete it; the next search writes it anew")


def _write(path: Path, text: str) -> None:
    """Write the file whole or not at all, in a folder that is made where it is absent."""
    output_folder(path.parent)
    write_atomic(path, text)
