"""The file of a recording: safetensors, memory-mapped, fully checked on opening, written atomically.

Modelled: one file holds one RoutingTrace (header key `kind` = "routing") or one LoadProfile (`kind` = "load"); the
header carries `schema_version`, the producing version and every scalar as a string. Ignored: other containers (see
the readers and `convert`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ..base.errors import InputError
from ..base.version import __version__
from .files.container import TensorAppender, read_tensors, write_tensors
from .recording import DECODE, PREFILL, LoadProfile, RoutingTrace
from .validate import release_pages, row_chunks, validate_load, validate_trace

__all__ = [
    "DECODE",
    "PREFILL",
    "LoadProfile",
    "RoutingTrace",
    "TraceWriter",
    "load_profile",
    "load_recording",
    "load_trace",
    "save_profile",
    "save_trace",
    "validate_load",
    "validate_trace",
]

SCHEMA_VERSION = "1"
_METADATA_PREFIX = "metadata."
_REMEDY = "import the recording again with this version"


def load_trace(path: str | os.PathLike[str]) -> RoutingTrace:
    """Return the routing recording in `path`: arrays over the mapped file, every rule checked in bounded memory.

    Raises InputError when the file is missing, damaged, holds loads only, or breaks a rule of `RoutingTrace`.
    """
    recording = load_recording(path)
    if not isinstance(recording, RoutingTrace):
        raise InputError(
            "path", str(path), "holds expert loads only, no routing", "give a recording with token routing"
        )
    return recording


def load_profile(path: str | os.PathLike[str]) -> LoadProfile:
    """Return the load profile in `path`. Raises InputError when the file is missing, damaged or holds routing."""
    recording = load_recording(path)
    if not isinstance(recording, LoadProfile):
        raise InputError("path", str(path), "holds routing, not a load profile", "give a file of expert loads")
    return recording


def load_recording(path: str | os.PathLike[str]) -> RoutingTrace | LoadProfile:
    """Return whichever recording `path` holds. Raises InputError when it is missing, damaged or breaks a rule."""
    strings, tensors = read_tensors(path)
    if strings.get("schema_version") != SCHEMA_VERSION:
        version = strings.get("schema_version", "")
        raise InputError("schema_version", version, f"this version reads schema {SCHEMA_VERSION}", _REMEDY)
    kind = strings.get("kind")
    if kind == "routing":
        trace = _trace_of(strings, tensors)
        validate_trace(trace)
        return trace
    if kind == "load":
        profile = _profile_of(strings, tensors)
        validate_load(profile)
        return profile
    raise InputError("kind", kind, 'must be "routing" or "load"', _REMEDY)


def save_trace(trace: RoutingTrace, path: str | os.PathLike[str]) -> None:
    """Write a checked recording to `path`, atomically; equal recordings give equal bytes. Raises InputError."""
    row_bytes = max(1, trace.experts.nbytes // max(1, len(trace.experts)))
    validate_trace(trace)
    with TraceWriter(path, like=trace) as writer:
        for start, stop in row_chunks(trace.num_tokens, row_bytes):
            writer.append(
                experts=trace.experts[start:stop],
                request=trace.request[start:stop],
                position=trace.position[start:stop],
                phase=trace.phase[start:stop],
                weights=None if trace.weights is None else trace.weights[start:stop],
                predicted=None if trace.predicted is None else trace.predicted[start:stop],
                predicted_prob=None if trace.predicted_prob is None else trace.predicted_prob[start:stop],
            )
            release_pages(trace.experts)
        writer.finish()


def save_profile(profile: LoadProfile, path: str | os.PathLike[str]) -> None:
    """Write a checked load profile to `path`, atomically; equal profiles give equal bytes. Raises InputError."""
    validate_load(profile)
    tensors = {"counts": profile.counts}
    if profile.windows is not None:
        tensors["windows"] = profile.windows
    strings = _header("load", profile) | {
        "top_k": "" if profile.top_k is None else str(profile.top_k),
        "window_unit": profile.window_unit,
    }
    write_tensors(path, strings, tensors)


class TraceWriter:
    """Writes a recording chunk by chunk in constant memory; `finish` checks it and puts one valid file in place.

    Use it as a context: leaving without `finish` leaves nothing behind. Rows must come sorted by request and position.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        like: RoutingTrace | None = None,
        num_experts: int | None = None,
        model: str = "",
        layer_ids: tuple[int, ...] = (),
        source: str = "",
        licence: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Take the scalars of the recording from `like`, or from the other arguments."""
        if like is None and num_experts is None:
            raise InputError("num_experts", None, "needed to write a recording", "give num_experts")
        self._path = path
        self._num_experts = like.num_experts if like is not None else int(num_experts or 0)
        self._strings = (
            _header("routing", like)
            if like is not None
            else _scalars("routing", model, layer_ids, source, licence, metadata or {})
        ) | {"num_experts": str(self._num_experts)}
        self._out: TensorAppender | None = None
        self._given: frozenset[str] = frozenset()
        self._last: tuple[npt.NDArray[Any], ...] | None = None

    def append(
        self,
        *,
        experts: npt.NDArray[Any],
        request: npt.NDArray[Any],
        position: npt.NDArray[Any],
        phase: npt.NDArray[Any],
        weights: npt.NDArray[Any] | None = None,
        predicted: npt.NDArray[Any] | None = None,
        predicted_prob: npt.NDArray[Any] | None = None,
    ) -> None:
        """Append rows, converted to the types of the file.

        Raises InputError when they differ in kind from the first rows.
        """
        dtype = np.uint8 if self._num_experts <= 1 << 8 else np.uint16
        rows = {
            "experts": _narrowed(experts, dtype, "experts"),
            "request": _narrowed(request, np.int32, "request"),
            "position": _narrowed(position, np.int32, "position"),
            "phase": _narrowed(phase, np.uint8, "phase"),
        }
        if weights is not None:
            rows["weights"] = _half(weights)
        if predicted is not None:
            rows["predicted"] = _narrowed(predicted, np.int16, "predicted")
        if predicted_prob is not None:
            rows["predicted_prob"] = _half(predicted_prob)
        if self._out is None:
            self._given = frozenset(rows)
            self._out = TensorAppender(self._path, {name: (row.dtype, row.shape[1:]) for name, row in rows.items()})
        if frozenset(rows) != self._given or len({len(row) for row in rows.values()}) != 1:
            rule = "every chunk must bring the same columns, all of one length"
            raise InputError("rows", {name: row.shape for name, row in rows.items()}, rule, "append whole rows")
        for name, row in rows.items():
            self._out.append(name, row)

    def finish(self) -> None:
        """Return when the complete, checked file stands under its name. Raises InputError when a rule is broken."""
        if self._out is None:
            raise InputError("experts", 0, "has zero tokens", "record or import at least one token")
        self._out.finish(self._strings, check=load_recording)

    def discard(self) -> None:
        """Drop everything appended and not finished."""
        if self._out is not None:
            self._out.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def _narrowed(values: npt.NDArray[Any], dtype: type[np.generic], name: str) -> npt.NDArray[Any]:
    """Return `values` as `dtype`; raises InputError when a number would change."""
    array = np.asarray(values)
    if array.dtype == dtype:
        return array
    with np.errstate(invalid="ignore"):  # what is no integer differs afterwards, and is refused
        narrow = array.astype(dtype)
    if not np.array_equal(narrow, array):
        raise InputError(
            name, str(array.dtype), f"has numbers that {np.dtype(dtype).name} cannot hold", "check the source"
        )
    return narrow


def _half(values: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """Return `values` as float16; what is too large becomes infinite, which validation refuses."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(values).astype(np.float16, copy=False)


def _header(kind: str, recording: RoutingTrace | LoadProfile) -> dict[str, str]:
    """Return the header strings every recording has."""
    r = recording
    return _scalars(kind, r.model, r.layer_ids, r.source, r.licence, r.metadata)


def _scalars(
    kind: str, model: str, layer_ids: tuple[int, ...], source: str, licence: str, metadata: Mapping[str, str]
) -> dict[str, str]:
    """Return header strings: format, producer, and the scalars of a recording."""
    return {
        "kind": kind,
        "schema_version": SCHEMA_VERSION,
        "producer": f"moeplan {__version__}",
        "model": model,
        "layer_ids": json.dumps([int(layer) for layer in layer_ids]),
        "source": source,
        "licence": licence,
        **{_METADATA_PREFIX + key: value for key, value in metadata.items()},
    }


def _trace_of(strings: Mapping[str, str], tensors: Mapping[str, npt.NDArray[Any]]) -> RoutingTrace:
    """Return the (not yet validated) trace of a file's header and tensors."""
    known = {"experts", "request", "position", "phase", "weights", "predicted", "predicted_prob"}
    _only(known, known - {"weights", "predicted", "predicted_prob"}, tensors)
    return RoutingTrace(
        experts=tensors["experts"],
        request=tensors["request"],
        position=tensors["position"],
        phase=tensors["phase"],
        weights=tensors.get("weights"),
        predicted=tensors.get("predicted"),
        predicted_prob=tensors.get("predicted_prob"),
        num_experts=_integer(strings, "num_experts"),
        **_common(strings),
    )


def _profile_of(strings: Mapping[str, str], tensors: Mapping[str, npt.NDArray[Any]]) -> LoadProfile:
    """Return the (not yet validated) load profile of a file's header and tensors."""
    _only({"counts", "windows"}, {"counts"}, tensors)
    return LoadProfile(
        counts=tensors["counts"],
        windows=tensors.get("windows"),
        top_k=_integer(strings, "top_k") if strings.get("top_k") else None,
        window_unit=strings.get("window_unit", ""),
        **_common(strings),
    )


def _common(strings: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields both kinds of recording share."""
    try:
        layer_ids = json.loads(strings["layer_ids"])
        if not isinstance(layer_ids, list) or not all(type(layer) is int for layer in layer_ids):
            raise ValueError
    except (KeyError, ValueError, RecursionError):
        raise InputError("layer_ids", strings.get("layer_ids"), "must be a JSON list of integers", _REMEDY) from None
    skip = len(_METADATA_PREFIX)
    return {
        "model": strings.get("model", ""),
        "layer_ids": tuple(layer_ids),
        "source": strings.get("source", ""),
        "licence": strings.get("licence", ""),
        "metadata": {key[skip:]: strings[key] for key in sorted(strings) if key.startswith(_METADATA_PREFIX)},
    }


def _integer(strings: Mapping[str, str], key: str) -> int:
    """Return a header string as an integer; raises InputError."""
    text = strings.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise InputError(key, text, "must be a non-negative integer of at most nine digits", _REMEDY)
    return int(text)


def _only(known: set[str], needed: set[str], tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """Raise InputError when a tensor is missing or unknown."""
    for name in sorted(needed - set(tensors)):
        raise InputError("tensors", sorted(tensors), f"tensor {name!r} is missing", _REMEDY)
    for name in sorted(set(tensors) - known):
        raise InputError("tensors", name, f"unknown tensor; known are {', '.join(sorted(known))}", _REMEDY)
