"""Reader of plain numpy archives of routing: one array per column, as `np.savez` writes them.

Modelled: `experts` [tokens, layers, k], `seq`, `pos`, `phase` (0 prefill, 1 decode), and, where present, `layer_ids`,
`weights`, `spec` [tokens, layers, distance, width] (guesses for a layer made 1, 2, … layers earlier, −1 for none) with
`spec_prob`, `domain` with `domain_names`, and `meta`, a JSON text with `model`, `source`, `licence`, `experts` (their
number per layer). Rows are sorted by (seq, pos) if they are not. Ignored: further arrays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ....base.errors import InputError
from ...domains import KEY as DOMAINS
from ...domains import encode_domains
from ...files.npy import MAX_UNPACKED_BYTES, read_npz
from ...recording import DECODE, RoutingTrace
from ...validate import MAX_EXPERTS, validate_trace

METADATA = "metadata"  # key of `meta` under which a converted recording keeps its own metadata
_REMEDY = "write the archive as documented for the npz reader"


def read_npz_trace(
    path: str | os.PathLike[str],
    *,
    num_experts: int | None = None,
    model: str | None = None,
    source: str | None = None,
    licence: str | None = None,
    max_bytes: int = MAX_UNPACKED_BYTES,
) -> RoutingTrace:
    """Return the routing recorded in a numpy archive; the arguments override what its `meta` says.

    Without `num_experts` in the arguments or in `meta`, the largest id seen decides. Raises InputError when the archive
    is damaged, lacks a column, needs unpickling, unpacks beyond `max_bytes` or breaks a rule of `RoutingTrace`.
    """
    arrays = read_npz(path, max_bytes)
    meta = _meta(arrays)
    experts = integers(arrays, "experts", 3)
    if experts.size == 0:
        raise InputError("experts", experts.shape, "has zero tokens", "record at least one token")
    tokens = len(experts)
    request = integers(arrays, "seq", 1, tokens).astype(np.int32)
    position = integers(arrays, "pos", 1, tokens).astype(np.int32)
    phase = integers(arrays, "phase", 1, tokens) if "phase" in arrays else np.full(tokens, DECODE)
    if num_experts is None:
        recorded = meta.get("experts", meta.get("num_experts"))
        num_experts = recorded if type(recorded) is int else int(experts.max()) + 1
    check_ids(experts, "experts", 0, num_experts)
    if int(phase.min()) < 0 or int(phase.max()) > DECODE:
        raise InputError("phase", [int(phase.min()), int(phase.max())], "must be 0 (prefill) or 1 (decode)", _REMEDY)
    layers = integers(arrays, "layer_ids", 1).tolist() if "layer_ids" in arrays else range(experts.shape[1])
    weights = _floats(arrays, "weights")
    predicted = integers(arrays, "spec", 4) if "spec" in arrays else None
    if predicted is not None:
        check_ids(predicted, "spec", -1, min(num_experts, 1 << 15))
    probability = _floats(arrays, "spec_prob")
    order = np.lexsort((position, request))
    sort: slice | npt.NDArray[np.intp] = slice(None) if np.array_equal(order, np.arange(tokens)) else order
    metadata = {f"source.{key}": _text(value) for key, value in sorted(meta.items()) if key not in (*_NAMED, METADATA)}
    if isinstance(meta.get(METADATA), dict):
        metadata.update({key: _text(value) for key, value in sorted(meta[METADATA].items())})
    if "domain" in arrays:
        names = [str(name) for name in arrays.get("domain_names", np.empty(0, "U1")).ravel()]
        metadata[DOMAINS] = encode_domains(names, request[sort], integers(arrays, "domain", 1, tokens)[sort])
    named = {key: _text(meta[key]) if key in meta else "" for key in _NAMED}
    trace = RoutingTrace(
        experts=id_array(experts, num_experts)[sort],
        request=request[sort],
        position=position[sort],
        phase=phase.astype(np.uint8)[sort],
        num_experts=num_experts,
        model=named["model"] if model is None else model,
        layer_ids=tuple(int(layer) for layer in layers),
        source=named["source"] if source is None else source,
        licence=named["licence"] if licence is None else licence,
        weights=None if weights is None else weights[sort],
        predicted=None if predicted is None else predicted.astype(np.int16, copy=False)[sort],
        predicted_prob=None if probability is None else probability[sort],
        metadata=metadata,
    )
    validate_trace(trace)
    return trace


_NAMED = ("model", "source", "licence")


def integers(
    arrays: Mapping[str, npt.NDArray[Any]], name: str, ndim: int, length: int | None = None
) -> npt.NDArray[Any]:
    """Return the integer array `name` with `ndim` axes whose values int32 can hold. Raises InputError."""
    array = arrays.get(name)
    if array is None:
        raise InputError(name, "missing", f"the archive has only {', '.join(sorted(arrays)) or 'nothing'}", _REMEDY)
    if array.dtype.kind not in "iu" or array.ndim != ndim:
        raise InputError(name, f"{array.dtype} {array.shape}", f"must be integers with {ndim} axes", _REMEDY)
    if length is not None and len(array) != length:
        raise InputError(name, array.shape, f"must have one entry per token ({length})", _REMEDY)
    limits = np.iinfo(np.int32)
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        raise InputError(name, [int(array.min()), int(array.max())], "has values beyond int32", _REMEDY)
    return array


def check_ids(ids: npt.NDArray[Any], name: str, low: int, num_experts: int) -> None:
    """Raise InputError unless `num_experts` is sane and every id is in [low, num_experts)."""
    if not (1 <= num_experts <= MAX_EXPERTS):
        raise InputError(
            "num_experts", num_experts, f"must be 1 to {MAX_EXPERTS}", "give the model's number of experts"
        )
    if ids.size and (int(ids.min()) < low or int(ids.max()) >= num_experts):
        outside = int(ids.min()) if int(ids.min()) < low else int(ids.max())
        rule = f"expert ids must be {low} to {num_experts - 1}"
        raise InputError(name, outside, rule, "check the recording and the number of experts")


def id_array(ids: npt.NDArray[Any], num_experts: int) -> npt.NDArray[np.unsignedinteger]:
    """Return checked expert ids in the narrowest type a recording uses for this many experts."""
    if num_experts <= 1 << 8:
        return ids.astype(np.uint8, copy=False)
    return ids.astype(np.uint16, copy=False)


def _floats(arrays: Mapping[str, npt.NDArray[Any]], name: str) -> npt.NDArray[np.float16] | None:
    """Return the array `name` as float16, or None when it is absent.

    What float16 cannot hold becomes infinite and is refused later.
    """
    array = arrays.get(name)
    if array is None:
        return None
    if array.dtype.kind != "f":
        raise InputError(name, str(array.dtype), "must be floating-point numbers", _REMEDY)
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float16, copy=False)


def _meta(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Return the archive's `meta` object, empty where there is none. Raises InputError when it is not a JSON object."""
    if "meta" not in arrays:
        return {}
    try:
        meta: object = json.loads(str(arrays["meta"].item()))
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        raise InputError("meta", arrays["meta"].shape, "must hold one JSON object as text", _REMEDY)
    return meta


def _text(value: object) -> str:
    """Return a metadata value as text: strings as they are, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
