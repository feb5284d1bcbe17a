"""What the engines' checks have in common: files by name, keys exactly, types exactly, placements whole.

Modelled: absent files and flags, unknown and absent keys, types, rows of one length, groups of layers. Ignored: any one engine's
rules (`engines/`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from ...base.errors import InputError, UnknownName
from ...specs.models import ModelSpec
from .choices import Placement
from .flags import FLAGS_FILE

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def text_of(files: Mapping[str, str], name: str) -> str:
    """Return the text of a file; raises InputError where it is not among `files`."""
    if name not in files:
        raise InputError("files", sorted(files), f"{name} is absent", "emit again")
    return files[name]


def needed(flags: Mapping[str, Any], name: str, where: str) -> Any:
    """Return a flag's value; raises InputError where it was not given."""
    if name not in flags:
        raise InputError(f"{where}: {name}", "(absent)", "the flag is needed", "add it")
    return flags[name]


def exact_keys(table: object, where: str, required: set[str], optional: Sequence[str] | set[str] = ()) -> None:
    """Return nothing; raises for something that is no table, for an absent key and for one outside both sets."""
    if not isinstance(table, Mapping):
        raise InputError(where, table, "not a table", "write the file anew")
    for key in table:
        if key not in required and key not in optional:
            raise UnknownName(f"{where}: key", key, required | set(optional))
    for key in sorted(required):
        if key not in table:
            raise InputError(f"{where}: {key}", "(absent)", "a key is absent", "add it")


def typed(table: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """Return a value of exactly the type `kind` (a truth value is no number); raises InputError otherwise."""
    if type(table.get(key)) is not kind:
        raise InputError(f"{where}: {key}", table.get(key), f"not of type {kind.__name__}", "write the file anew")
    return table[key]


def placed(rows: list[list[int]], model: ModelSpec, num_ranks: int, num_nodes: int) -> Placement:
    """Return rows as a placement, whose own rules an engine asserts too: ids in range, none absent, slots divisible by ranks."""
    return Placement(physical_to_logical=np.array(rows, dtype=np.int32), num_logical=model.num_experts, num_ranks=num_ranks,
                     num_nodes=num_nodes)  # fmt: skip


def row_length(given: int, slots: int, where: str) -> None:
    """Return nothing; raises InputError for a row that has not one expert per slot."""
    if given != slots:
        raise InputError(where, given, f"the configuration has {slots} slots a layer", "give every slot an expert")


def read_yaml(text: str, where: str) -> dict[Any, Any]:
    """Return a YAML file's table; raises InputError for anything else."""
    try:
        table = yaml.load(text, Loader=_LOADER)  # noqa: S506 - a safe loader, the compiled one where there is one
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(where, "(text)", "not YAML", "write the file anew") from None
    if not isinstance(table, dict):
        raise InputError(where, table, "not a table", "write the file anew")
    return table


def check_groups(flags: Mapping[str, int]) -> None:
    """Return nothing; raises InputError unless the last layers of a group are between one and all of it."""
    if "--offload-group-size" in flags:
        group, inside = flags["--offload-group-size"], flags.get("--offload-num-in-group", 1)
        if not 1 <= inside <= group:
            raise InputError(f"{FLAGS_FILE}: --offload-num-in-group", inside, f"not from 1 to {group}", "emit again")
