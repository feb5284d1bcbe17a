"""Reader of Parquet: the tables that `trace convert` writes, and tables of others with named columns.

Modelled: a table with this project's metadata comes back as it was, routing or loads, batch by batch; any other needs
columns for token, layer and experts (see `token_table`). Ignored: windows of loads, which the table does not hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ....base.errors import InputError
from ....base.text_files import refuse_devices
from ....base.units import GIB, MIB
from ...files.refusal import unreadable
from ...recording import LoadProfile, RoutingTrace
from ...validate import MAX_EXPERTS, MAX_LAYERS, MAX_TOP_K, validate_load, validate_trace
from ..assemble import check_budget
from .token_table import Table, column_names, phase_number, trace_of_table

_REMEDY = "give a complete Parquet file of plain numbers"
_PREFIX = "metadata."
_BATCH_ROWS = 1 << 16
_MOST_ROW_BYTES = GIB  # of a foreign table, unpacked
_BROKEN = (
    pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError, NotImplementedError,
    RecursionError, AttributeError,
)  # fmt: skip


def read_parquet(
    path: str | os.PathLike[str],
    *,
    request_column: str = "",
    token_column: str = "",
    layer_column: str = "",
    experts_column: str = "",
    weights_column: str = "",
    phase_column: str = "",
    prompt_tokens: int | None = None,
    num_experts: int | None = None,
    layer_ids: Sequence[int] | None = None,
    model: str | None = None,
    source: str | None = None,
    licence: str | None = None,
) -> RoutingTrace | LoadProfile:
    """Return the recording in a Parquet file; the arguments complete a table of another tool.

    Raises InputError when the file is damaged, lacks a column or breaks a rule of recordings.
    """
    columns = {
        "request": request_column, "token": token_column, "layer": layer_column, "experts": experts_column,
        "weights": weights_column, "phase": phase_column,
    }  # fmt: skip
    told = {part: name for part, name in columns.items() if name}
    try:
        refuse_devices(path, pipes=False)
        with pq.ParquetFile(path, thrift_string_size_limit=64 * MIB, thrift_container_size_limit=1 << 20) as file:
            strings = {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}
            ours = strings.get("producer", "").startswith("moeplan ")
            named = {"model": model, "source": source, "licence": licence}
            if not ours:
                table = _foreign(file, told)
                return trace_of_table(
                    table, source=source or f"Parquet: {Path(path).name}", prompt_tokens=prompt_tokens, num_experts=num_experts,
                    layer_ids=layer_ids, model=model or "", licence=licence or "",
                )  # fmt: skip
            for name, value in (
                ("prompt_tokens", prompt_tokens),
                ("num_experts", num_experts),
                ("layer_ids", layer_ids),
            ):
                if value is not None or told:
                    rule = "the file says itself what its columns and numbers are"
                    raise InputError(name, value, rule, "leave out all options but model, source and licence")
            strings |= {key: value for key, value in named.items() if value is not None}
            names = set(file.schema_arrow.names)
            return _profile(file, strings) if names == {"layer", "expert", "count"} else _trace(file, strings)
    except InputError:
        raise
    except _BROKEN as error:
        raise unreadable(path, "cannot be read as Parquet", error, _REMEDY) from None


def _trace(file: pq.ParquetFile, strings: Mapping[str, str]) -> RoutingTrace:
    """Return the routing of a table this project wrote: every token once a layer, in order. Raises InputError."""
    layers = _layer_ids(strings)
    num_experts = _bounded(strings, "num_experts", MAX_EXPERTS)
    rows = int(file.metadata.num_rows)
    tokens, rest = divmod(rows, len(layers))
    schema = file.schema_arrow
    top_k = int(schema.field("experts").type.list_size)
    if rest or not tokens or not (1 <= top_k <= MAX_TOP_K):
        raise InputError("rows", rows, f"must be whole tokens of {len(layers)} layers", _REMEDY)
    shapes: dict[str, tuple[int, ...]] = {"experts": (top_k,), "weights": (top_k,)}
    types: dict[str, type[np.generic]] = {
        "experts": np.uint8 if num_experts <= 1 << 8 else np.uint16,
        "weights": np.float16, "predicted": np.int16, "predicted_prob": np.float16,
    }  # fmt: skip
    if "predicted" in schema.names:
        shape = json.loads(strings["predicted_shape"])
        if not (
            isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 1 <= n <= MAX_EXPERTS for n in shape)
        ):
            raise InputError("predicted_shape", shape, "must be two sizes", _REMEDY)
        shapes |= {"predicted": (shape[0], shape[1]), "predicted_prob": (shape[0], shape[1])}
    lists = [name for name in types if name in schema.names]
    check_budget(sum(rows * int(np.prod(shapes[name])) * np.dtype(types[name]).itemsize for name in lists) + 24 * rows)
    arrays: dict[str, npt.NDArray[Any]] = {name: np.empty((rows, *shapes[name]), types[name]) for name in lists}
    arrays |= {name: np.empty(rows, np.int64) for name in ("request", "position", "phase", "layer")}
    start = 0
    for batch in file.iter_batches(_BATCH_ROWS, columns=list(arrays)):
        stop = start + len(batch)
        for name, array in arrays.items():
            values = _numbers(batch.column(name), name)
            with np.errstate(
                over="ignore", invalid="ignore"
            ):  # what a type cannot hold is refused, here or with the rules
                narrowed = values.reshape(len(batch), *array.shape[1:]).astype(array.dtype)
            if array.dtype.kind in "iu" and not np.array_equal(narrowed, values.reshape(narrowed.shape)):
                raise InputError(name, "a number", f"is beyond {array.dtype}", _REMEDY)
            array[start:stop] = narrowed
        start = stop
    if not np.array_equal(arrays["layer"].reshape(tokens, -1), np.broadcast_to(layers, (tokens, len(layers)))):
        raise InputError("layer", "order", f"must be {list(layers)[:8]}… for each token", _REMEDY)
    scalars = {name: arrays[name].reshape(tokens, -1)[:, 0] for name in ("request", "position", "phase")}
    if any((arrays[name].reshape(tokens, -1) != scalars[name][:, None]).any() for name in scalars):
        raise InputError("request, position, phase", "differ", "must be equal in all layers of a token", _REMEDY)
    per_layer = {name: arrays[name].reshape(tokens, len(layers), *shapes[name]) for name in lists}
    limit = np.iinfo(np.int32).max
    if any(int(column.min()) < 0 or int(column.max()) > limit for column in scalars.values()):
        raise InputError("request, position, phase", "a number", "must be 0 to 2147483647", _REMEDY)
    trace = RoutingTrace(
        experts=per_layer["experts"],
        request=scalars["request"].astype(np.int32),
        position=scalars["position"].astype(np.int32),
        phase=np.minimum(scalars["phase"], 255).astype(np.uint8),
        num_experts=num_experts,
        model=strings.get("model", ""),
        layer_ids=tuple(layers),
        source=strings.get("source", ""),
        licence=strings.get("licence", ""),
        weights=per_layer.get("weights"),
        predicted=per_layer.get("predicted"),
        predicted_prob=per_layer.get("predicted_prob"),
        metadata=_metadata(strings),
    )
    validate_trace(trace)
    return trace


def _profile(file: pq.ParquetFile, strings: Mapping[str, str]) -> LoadProfile:
    """Return the loads of a table this project wrote. Raises InputError."""
    layers, num_experts = _layer_ids(strings), _bounded(strings, "num_experts", MAX_EXPERTS)
    if file.metadata.num_rows != len(layers) * num_experts:
        rule = f"must be one for each of {len(layers)} layers and {num_experts} experts"
        raise InputError("rows", file.metadata.num_rows, rule, _REMEDY)
    columns = {name: [] for name in ("layer", "expert", "count")}  # type: dict[str, list[npt.NDArray[Any]]]
    for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns)):
        for name, pieces in columns.items():
            pieces.append(_numbers(batch.column(name), name))
    layer, expert, count = (np.concatenate(pieces) for pieces in columns.values())
    whole = np.array_equal(layer, np.repeat(layers, num_experts)) and np.array_equal(
        expert, np.tile(np.arange(num_experts), len(layers))
    )
    if not whole:
        raise InputError("layer, expert", "order", "must be every expert of every layer, in order", _REMEDY)
    profile = LoadProfile(
        counts=count.astype(np.int64).reshape(len(layers), num_experts),
        model=strings.get("model", ""),
        layer_ids=tuple(layers),
        source=strings.get("source", ""),
        licence=strings.get("licence", ""),
        top_k=_bounded(strings, "top_k", MAX_TOP_K) if strings.get("top_k") else None,
        metadata=_metadata(strings),
    )
    validate_load(profile)
    return profile


def _foreign(file: pq.ParquetFile, told: Mapping[str, str]) -> Table:
    """Return the table of another tool, by the names of its columns. Raises InputError."""
    names = column_names(file.schema_arrow.names, told)
    pieces: dict[str, list[npt.NDArray[Any]]] = {part: [] for part in names}
    requests: dict[object, int] = {}
    held = 0
    for batch in file.iter_batches(_BATCH_ROWS, columns=list(dict.fromkeys(names.values()))):
        for part, name in names.items():
            column = batch.column(name)
            if part == "request" and not pa.types.is_integer(column.type):
                values = np.array([requests.setdefault(value, len(requests)) for value in column.to_pylist()], np.int64)
            elif part == "phase":
                known = {value: phase_number(value, name) for value in column.unique().to_pylist()}
                values = np.array([known[value] for value in column.to_pylist()], np.int64)
            elif part in ("experts", "weights"):
                values = _lists(column, name)
            else:
                values = _numbers(column, name).astype(np.int64)
            held += values.nbytes
            if held > _MOST_ROW_BYTES:
                raise ValueError("unpacks to more than a reader may hold")
            pieces[part].append(values)
    if not pieces["token"]:
        raise InputError("rows", 0, "has zero tokens", "record at least one token")
    if len({values.shape[1] for values in pieces["experts"]}) != 1:
        raise InputError(names["experts"], "lists", "must all be of one length", "give -1 where a choice is missing")
    whole = {part: np.concatenate(found) for part, found in pieces.items()}
    if "weights" in whole and whole["weights"].shape != whole["experts"].shape:
        raise InputError(names["weights"], whole["weights"].shape, "must be one an expert", "check the columns")
    if whole["experts"].dtype.kind not in "iu":
        raise InputError(names["experts"], str(whole["experts"].dtype), "must be integers", "check the columns")
    return Table(
        request=whole.get("request", np.zeros(len(whole["token"]), np.int64)),
        token=whole["token"],
        layer=whole["layer"],
        experts=whole["experts"],
        weights=whole.get("weights"),
        phase=whole.get("phase"),
    )


def _lists(column: pa.Array, name: str) -> npt.NDArray[Any]:
    """Return a column of lists of one length, or of single numbers, as [rows, k]. Raises InputError."""
    if not (
        pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    ):
        return _numbers(column, name)[:, None]
    flat = column.flatten()
    size, rest = divmod(len(flat), max(1, len(column)))
    lengths = set() if pa.types.is_fixed_size_list(column.type) else set(column.value_lengths().unique().to_pylist())
    if column.null_count or rest or not (1 <= size <= MAX_TOP_K) or len(lengths) > 1:
        raise InputError(
            name, "lists", f"must all be of one length, 1 to {MAX_TOP_K}", "give -1 where a choice is missing"
        )
    return _numbers(flat, name).reshape(-1, size)


def _numbers(column: pa.Array, name: str) -> npt.NDArray[Any]:
    """Return a column of numbers, or of lists of them, as one flat array. Raises InputError."""
    if pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    if column.null_count or not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise InputError(name, str(column.type), "must be numbers, none missing", _REMEDY)
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _layer_ids(strings: Mapping[str, str]) -> list[int]:
    """Return the recorded layers. Raises InputError."""
    layers = json.loads(strings["layer_ids"])
    if not (
        isinstance(layers, list)
        and 1 <= len(layers) <= MAX_LAYERS
        and all(type(n) is int and 0 <= n < 1 << 31 for n in layers)
    ):
        raise InputError("layer_ids", layers, f"must be 1 to {MAX_LAYERS} layer numbers", _REMEDY)
    return layers


def _bounded(strings: Mapping[str, str], name: str, most: int) -> int:
    """Return a positive number of the schema's metadata. Raises InputError."""
    text = strings.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
        raise InputError(name, text, f"must be 1 to {most}", _REMEDY)
    return int(text)


def _metadata(strings: Mapping[str, str]) -> dict[str, str]:
    """Return a recording's own metadata."""
    return {key.removeprefix(_PREFIX): value for key, value in sorted(strings.items()) if key.startswith(_PREFIX)}
