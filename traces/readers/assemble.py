"""What every reader ends in: raw ids or counts of a source become a checked recording.

Modelled: layers in which nothing is routed (rows of zeros in sources that count every hidden layer) are dropped and
named in the metadata; so are windows without any token. Tokens are cleaned and counted. Counts-only sources become a
LoadProfile whose metadata says what is not known. Ignored: the formats themselves (see the readers).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from ...base.units import format_bytes
from ..files.npy import MAX_UNPACKED_BYTES
from ..recording import LoadProfile, RoutingTrace
from ..validate import MAX_EXPERTS, MAX_LAYERS, MAX_TOP_K, validate_load, validate_trace
from .account import Account, layer_ranges
from .cleaning import Cleaned, clean

COUNTS_ONLY = "counts only: order of tokens, requests and which experts went together are not known"
_RARELY_ABSENT = 4  # more gaps than one in so many layers are the model's pattern
_MAX_EXACT_FLOAT = float(1 << 53)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRows:
    """Consecutive rows of one request, as a reader found them."""

    experts: npt.NDArray[Any]
    """integers [num_rows, num_columns, top_k], dense layers included if the source has them."""
    position: npt.NDArray[Any]
    """integers [num_rows], strictly increasing."""
    phase: npt.NDArray[Any]
    """integers [num_rows]: 0 prefill, 1 decode."""
    weights: npt.NDArray[Any] | None = None
    """numbers shaped like `experts`, where the source has them."""


def trace_of_requests(
    requests: Sequence[RequestRows],
    *,
    source: str,
    model: str = "",
    licence: str = "",
    num_experts: int | None = None,
    layer_ids: Sequence[int] | None = None,
    metadata: Mapping[str, str] | None = None,
    account: Account | None = None,
    zeros_may_be_blank: bool = True,
) -> RoutingTrace:
    """Return one checked trace of several requests, numbered in the order given; requests without rows are left out.

    Padding, rows of nothing and dense layers are told from routing and left out (see `cleaning`), and what was is
    counted. Without `num_experts` the largest id decides; without `layer_ids` columns count from 0. Where every id was
    computed here, `zeros_may_be_blank` is false. Raises InputError.
    """
    account = Account() if account is None else account
    given = [rows for rows in requests if len(rows.experts)]
    if not given:
        raise InputError("routed experts", 0, "has zero tokens", "record at least one token")
    columns = given[0].experts.shape[1:]
    for rows in given:
        if rows.experts.shape[1:] != columns:
            rule = f"every request must have the same layers and top_k as the first, {columns}"
            raise InputError("routed experts", rows.experts.shape[1:], rule, "give recordings of one model")
    check_budget(sum(rows.experts.nbytes for rows in given))
    layers = _layer_numbers(columns, layer_ids)
    account.read += sum(len(rows.experts) for rows in given)
    dtype = np.result_type(*{rows.experts.dtype for rows in given})
    if num_experts is not None and not (1 <= num_experts <= MAX_EXPERTS):
        raise InputError("num_experts", num_experts, f"must be 1 to {MAX_EXPERTS}", "see the model's config.json")
    ids = [rows.experts.astype(dtype, copy=False) for rows in given]
    cleaned = clean(ids, num_experts, account) if zeros_may_be_blank else _as_they_are(ids, num_experts)
    weights = _weights_left(given, cleaned)
    pieces = [
        (ids, rows.position[keep], rows.phase[keep])
        for rows, ids, keep in zip(given, cleaned.experts, cleaned.kept, strict=True)
        if len(ids)
    ]
    experts = np.concatenate([ids for ids, _, _ in pieces])
    largest = int(experts.max())
    wanted = cleaned.num_experts or largest + 1
    if cleaned.num_experts is None:
        account.note(f"{wanted} experts, from the largest id seen: give num_experts where the model has more")
    if not (1 <= wanted <= MAX_EXPERTS) or largest >= wanted:
        rule = f"expert ids must be 0 to num_experts − 1, with num_experts ({wanted}) at most {MAX_EXPERTS}"
        raise InputError("expert id", largest, rule, "check num_experts, the number of layers and top_k")
    position = np.concatenate([position for _, position, _ in pieces])
    if int(position.max()) > np.iinfo(np.int32).max or int(position.min()) < 0:
        raise InputError("position", int(position.max()), "must be 0 to 2147483647", "check the recording")
    dense = [layers[column] for column in cleaned.dense]
    if dense:
        account.note(f"layer {layer_ranges(dense)} routes nothing (dense), left out")
    absent = absent_layers(layers)
    if absent:
        account.note(f"layer {layer_ranges(absent)} is not in the recording, though layers around it are")
    trace = RoutingTrace(
        experts=experts.astype(np.uint8 if wanted <= 1 << 8 else np.uint16),
        request=np.repeat(np.arange(len(pieces), dtype=np.int32), [len(ids) for ids, _, _ in pieces]),
        position=position.astype(np.int32),
        phase=np.concatenate([phase for _, _, phase in pieces]).astype(np.uint8),
        num_experts=wanted,
        model=model,
        layer_ids=tuple(layers[column] for column in cleaned.columns),
        source=source,
        licence=licence,
        weights=weights,
        metadata={**_dense(dense), **account.metadata(), **(metadata or {})},
    )
    validate_trace(trace)
    return trace


def _as_they_are(requests: list[npt.NDArray[Any]], num_experts: int | None) -> Cleaned:
    """Return ids that were computed here, every one a choice."""
    _, columns, choices = requests[0].shape
    return Cleaned(
        experts=requests, kept=[np.ones(len(ids), bool) for ids in requests], columns=list(range(columns)), dense=[],
        choices=list(range(choices)), num_experts=num_experts,
    )  # fmt: skip


def _weights_left(given: Sequence[RequestRows], cleaned: Cleaned) -> npt.NDArray[np.float16] | None:
    """Return the weights of the choices that are left, None where a source has none.

    What float16 cannot hold becomes infinite and is refused later.
    """
    pieces: list[npt.NDArray[np.float16]] = []
    for rows, keep in zip(given, cleaned.kept, strict=True):
        if rows.weights is None:
            return None
        left = rows.weights[keep][:, cleaned.columns][:, :, cleaned.choices]
        with np.errstate(over="ignore", invalid="ignore"):
            pieces.append(left.astype(np.float16))
    return np.concatenate(pieces)


def _layer_numbers(columns: tuple[int, ...], layer_ids: Sequence[int] | None) -> list[int]:
    """Return the model layer of each recorded column. Raises InputError."""
    num_columns, top_k = columns
    if not (1 <= num_columns <= MAX_LAYERS) or not (1 <= top_k <= MAX_TOP_K):
        rule = f"must have 1 to {MAX_LAYERS} layers and 1 to {MAX_TOP_K} experts per token"
        raise InputError("routed experts", columns, rule, "check the recording")
    if layer_ids is None:
        return list(range(num_columns))
    if len(layer_ids) != num_columns:
        rule = f"must have one entry per recorded layer ({num_columns})"
        raise InputError("layer_ids", len(layer_ids), rule, "name the model layer of every recorded layer")
    return [int(layer) for layer in layer_ids]


def load_of_counts(
    counts: npt.NDArray[Any],
    *,
    source: str,
    model: str = "",
    licence: str = "",
    top_k: int | None = None,
    layer_ids: Sequence[int] | None = None,
    window_unit: str = "",
    metadata: Mapping[str, str] | None = None,
    account: Account | None = None,
) -> LoadProfile:
    """Return a checked load profile from counts [num_layers, num_experts] or [num_windows, num_layers, num_experts].

    Layers and windows without any token are dropped (a buffer that never filled, a dense layer). Raises InputError when
    the counts are not whole non-negative numbers or when none is left.
    """
    if counts.ndim not in (2, 3) or 0 in counts.shape:
        rule = "must be [layers][experts] or [steps][layers][experts], none empty"
        raise InputError("counts", counts.shape, rule, "check the recording")
    check_budget(counts.size * 8)
    whole = whole_numbers(counts, "counts")
    windows = whole.reshape(-1, *whole.shape[-2:])
    windows = windows[windows.any(axis=(1, 2))]
    routed: npt.NDArray[np.bool_] = np.asarray(windows.any(axis=(0, 2)))
    if not routed.any():
        raise InputError("counts", "all zero", "a load profile needs at least one counted token", "record under load")
    layers = np.arange(len(routed)) if layer_ids is None else np.asarray(layer_ids)
    if len(layers) != len(routed):
        rule = f"must have one entry per recorded layer ({len(routed)})"
        raise InputError("layer_ids", len(layers), rule, "name the model layer of every recorded layer")
    windows = np.ascontiguousarray(windows[:, routed])
    account = Account() if account is None else account
    dense, numbered = layers[~routed].tolist(), layers[routed].tolist()
    if dense:
        account.note(f"layer {layer_ranges(dense)} counts nothing (dense), left out")
    absent = absent_layers(layers.tolist())
    if absent:
        account.note(f"layer {layer_ranges(absent)} is not in the recording, though layers around it are")
    if float(windows.sum(dtype=np.float64)) > _MAX_EXACT_FLOAT:
        raise InputError("counts", "sum", "counts must sum to at most 2**53", "check the recording")
    profile = LoadProfile(
        counts=windows.sum(axis=0),
        windows=windows if whole.ndim == 3 and len(windows) > 1 else None,
        window_unit=window_unit if whole.ndim == 3 and len(windows) > 1 else "",
        model=model,
        layer_ids=tuple(numbered),
        source=source,
        licence=licence,
        top_k=top_k,
        metadata={**_dense(dense), "known": COUNTS_ONLY, **account.metadata(), **(metadata or {})},
    )
    validate_load(profile)
    return profile


def absent_layers(layers: Sequence[int]) -> list[int]:
    """Return the numbers missing between layers that are otherwise consecutive; none where every second one is routed."""
    inside = sorted(set(range(min(layers), max(layers) + 1)) - set(layers))
    return inside if len(inside) * _RARELY_ABSENT <= len(layers) else []


def whole_numbers(values: npt.NDArray[Any], name: str) -> npt.NDArray[np.int64]:
    """Return `values` as int64. Raises InputError when they are not numbers, not whole, negative or beyond 2**53."""
    if values.dtype.kind not in "iuf":
        raise InputError(name, str(values.dtype), "must be numbers", "check the recording")
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.floor(values)).all()):
        raise InputError(name, "fractions, infinities or NaN", "must be whole numbers", "check the recording")
    if values.size and (float(values.min()) < 0 or float(values.max()) > _MAX_EXACT_FLOAT):
        rule = "must be 0 to 2**53"
        raise InputError(name, [float(values.min()), float(values.max())], rule, "check the recording")
    return values.astype(np.int64)


def integer_array(values: object, name: str, ndim: int) -> npt.NDArray[Any]:
    """Return nested lists (or an array) of integers as an array with `ndim` axes. Raises InputError."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError, MemoryError, RecursionError):
        raise InputError(
            name, type(values).__name__, "must be a regular table of integers", "check the recording"
        ) from None
    if array.dtype.kind not in "iu" or array.ndim != ndim:
        rule = f"must be integers with {ndim} axes"
        raise InputError(name, f"{array.dtype} {array.shape}", rule, "check the recording")
    return array


def check_budget(num_bytes: int) -> None:
    """Raise InputError when a recording would take more memory than any reader may use."""
    if num_bytes > MAX_UNPACKED_BYTES:
        rule = f"more than the {format_bytes(MAX_UNPACKED_BYTES)} a reader may unpack"
        raise InputError("recording", format_bytes(num_bytes), rule, "import it in parts")


def _dense(layers: Sequence[int]) -> dict[str, str]:
    """Return the metadata entry that names dropped dense layers, if any."""
    return {"dense_layers": json.dumps([int(layer) for layer in layers])} if layers else {}
