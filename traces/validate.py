"""Checks that a recording can be trusted: every rule a RoutingTrace or LoadProfile keeps, in bounded memory.

Modelled: shapes, types, ranges, no expert twice in a token, finite weights, order of rows, placement of early guesses.
Rows are read in chunks and, for memory-mapped arrays, given back to the operating system, so that a recording of any
length is checked in a few megabytes. Ignored: whether a trace belongs to a model (the caller compares with its spec).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..base.errors import InputError
from ..base.units import MIB
from .recording import DECODE, LoadProfile, RoutingTrace

MAX_LAYERS = 1024
MAX_EXPERTS = 1 << 16  # ids are at most uint16
MAX_TOP_K = 256
MAX_TOTAL_COUNT = 1 << 60  # sums of int64 counts stay exact below
_MAX_PAIRWISE = 16
_CHUNK_BYTES = 4 * MIB


def row_chunks(num_rows: int, row_bytes: int, chunk_bytes: int = _CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """Return consecutive (start, stop) row ranges of about `chunk_bytes` each, at least one row long."""
    step = max(1, chunk_bytes // max(1, row_bytes))
    for start in range(0, num_rows, step):
        yield start, min(num_rows, start + step)


def release_pages(array: npt.NDArray[Any]) -> None:
    """Return nothing; tell the operating system that the file pages under a memory-mapped array may leave memory.

    The array stays valid: touching it again reads the file again. Does nothing for arrays in ordinary memory.
    """
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def validate_trace(trace: RoutingTrace) -> None:
    """Return nothing when every rule of `RoutingTrace` holds.

    Raise InputError naming field, value and rule otherwise.
    """
    _check_header(trace)
    _check_shapes(trace)
    row_bytes = trace.num_layers * trace.top_k * trace.experts.itemsize
    row_bytes += 0 if trace.weights is None else trace.num_layers * trace.top_k * 2
    row_bytes += 0 if trace.predicted is None else 4 * int(np.prod(trace.predicted.shape[1:]))
    for start, stop in row_chunks(trace.num_tokens, row_bytes):
        _check_rows(trace, start, stop)
        _check_order(trace, start, stop)
        release_pages(trace.experts)


def validate_load(profile: LoadProfile) -> None:
    """Return nothing when every rule of `LoadProfile` holds; raise InputError otherwise."""
    _check_int64(profile.counts, "counts", 2)
    if profile.windows is not None:
        _check_int64(profile.windows, "windows", 3)
        if profile.windows.shape[1:] != profile.counts.shape:
            _refuse(
                "windows", profile.windows.shape, f"must be [num_windows, {profile.num_layers}, {profile.num_experts}]"
            )
        if not np.array_equal(profile.windows.sum(axis=0), profile.counts):
            _refuse("windows", "their sum", "must equal counts")
    if not (1 <= profile.num_experts <= MAX_EXPERTS):
        _refuse("num_experts", profile.num_experts, f"must be 1 to {MAX_EXPERTS}")
    if profile.top_k is not None and not (1 <= profile.top_k <= profile.num_experts):
        _refuse("top_k", profile.top_k, f"must be 1 to num_experts ({profile.num_experts})")
    _check_layer_ids(profile.layer_ids, profile.num_layers)
    _check_strings(profile)
    if int(profile.counts.sum()) == 0:
        _refuse("counts", "all zero", "a load profile needs at least one counted token")


def _check_header(trace: RoutingTrace) -> None:
    """Raise InputError when a scalar field is out of range."""
    if not (1 <= trace.num_experts <= MAX_EXPERTS):
        _refuse("num_experts", trace.num_experts, f"must be 1 to {MAX_EXPERTS}")
    if trace.experts.ndim != 3:
        _refuse("experts", trace.experts.shape, "must be [num_tokens, num_layers, top_k]")
    if trace.experts.dtype not in (np.uint8, np.uint16):
        _refuse("experts", str(trace.experts.dtype), "must be uint8 or uint16")
    if trace.num_tokens == 0:
        _refuse("experts", trace.experts.shape, "has zero tokens", "record or import at least one token")
    _check_layer_ids(trace.layer_ids, trace.num_layers)
    if not (1 <= trace.top_k <= min(MAX_TOP_K, trace.num_experts)):
        _refuse("top_k", trace.top_k, f"must be 1 to num_experts ({trace.num_experts}) and at most {MAX_TOP_K}")
    _check_strings(trace)


def _check_layer_ids(layer_ids: tuple[int, ...], num_layers: int) -> None:
    """Raise InputError unless there is one id per layer, strictly increasing and not negative."""
    if not (1 <= num_layers <= MAX_LAYERS):
        _refuse("num_layers", num_layers, f"must be 1 to {MAX_LAYERS}")
    if len(layer_ids) != num_layers:
        _refuse("layer_ids", f"{len(layer_ids)} entries", f"must have one entry per layer ({num_layers})")
    if any(b <= a for a, b in zip((-1, *layer_ids), layer_ids, strict=False)) or layer_ids[-1] >= 1 << 31:
        _refuse("layer_ids", layer_ids, "must be strictly increasing and not negative")


def _check_strings(recording: RoutingTrace | LoadProfile) -> None:
    """Raise InputError unless every name and every metadata entry is a string that UTF-8 can hold."""
    named = {"model": recording.model, "source": recording.source, "licence": recording.licence}
    for name, text in [*named.items(), *((f"metadata.{key}", value) for key, value in recording.metadata.items())]:
        if not isinstance(text, str):
            _refuse(name, text, "must be a string")
        try:
            (name + text).encode("utf-8")
        except UnicodeEncodeError:
            _refuse(repr(name), text, "must be a string that UTF-8 can hold")


def _check_shapes(trace: RoutingTrace) -> None:
    """Raise InputError when an array does not have the type or shape its neighbours ask for."""
    tokens = (trace.num_tokens,)
    columns: list[tuple[str, npt.NDArray[Any], type[np.generic], tuple[int, ...]]] = [
        ("request", trace.request, np.int32, tokens),
        ("position", trace.position, np.int32, tokens),
        ("phase", trace.phase, np.uint8, tokens),
    ]
    if trace.weights is not None:
        columns.append(("weights", trace.weights, np.float16, trace.experts.shape))
    if trace.predicted is not None:
        shape = trace.predicted.shape
        if len(shape) != 4 or shape[:2] != trace.experts.shape[:2] or not (1 <= shape[2] <= trace.num_layers):
            rule = "must be [num_tokens, num_layers, distance, width] with distance at most num_layers"
            _refuse("predicted", shape, rule)
        if not (1 <= shape[3] <= trace.num_experts):
            _refuse("predicted", shape, f"width must be 1 to num_experts ({trace.num_experts})")
        if trace.num_experts > 1 << 15:
            _refuse("num_experts", trace.num_experts, "guesses are int16, so at most 32768 experts")
        columns.append(("predicted", trace.predicted, np.int16, shape))
        if trace.predicted_prob is not None:
            columns.append(("predicted_prob", trace.predicted_prob, np.float16, shape))
    elif trace.predicted_prob is not None:
        _refuse("predicted_prob", trace.predicted_prob.shape, "probabilities without guesses", "give predicted as well")
    for name, array, dtype, wanted in columns:
        if array.dtype != dtype:
            _refuse(name, str(array.dtype), f"must be {np.dtype(dtype).name}")
        if array.shape != wanted:
            _refuse(name, array.shape, f"must have shape {wanted}")


def _check_rows(trace: RoutingTrace, start: int, stop: int) -> None:
    """Raise InputError when a value in rows [start, stop) is out of range."""
    experts = np.asarray(trace.experts[start:stop])
    if int(experts.max()) >= trace.num_experts:
        t, layer, choice = (int(i) for i in np.argwhere(experts >= trace.num_experts)[0])
        rule = f"expert ids must be below num_experts ({trace.num_experts})"
        _refuse(f"experts[{start + t}, {layer}, {choice}]", int(experts[t, layer, choice]), rule)
    twice = _doubled(experts)
    if twice.any():
        t, layer = (int(i) for i in np.argwhere(twice)[0])
        ordered = np.sort(experts[t, layer])
        expert = int(ordered[1:][ordered[1:] == ordered[:-1]][0])
        rule = f"expert {expert} occurs twice in one token"
        _refuse(f"experts[{start + t}, {layer}]", experts[t, layer].tolist(), rule)
    if trace.weights is not None:
        weights = np.asarray(trace.weights[start:stop])
        if not np.isfinite(weights).all():
            t, layer, choice = (int(i) for i in np.argwhere(~np.isfinite(weights))[0])
            rule = "weights must be finite numbers"
            _refuse(f"weights[{start + t}, {layer}, {choice}]", float(weights[t, layer, choice]), rule)
    if trace.predicted is not None:
        _check_guesses(trace, trace.predicted, start, stop)


def _doubled(experts: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return [tokens, layers]: whether a choice occurs twice. Few choices are compared pair by pair, which is faster."""
    if experts.shape[2] > _MAX_PAIRWISE:
        ordered = np.sort(experts, axis=2)
        return np.asarray((ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=2))
    choices = np.ascontiguousarray(np.moveaxis(experts, 2, 0))
    twice = np.zeros(experts.shape[:2], dtype=bool)
    for j in range(1, len(choices)):
        for i in range(j):
            twice |= choices[i] == choices[j]
    return twice


def _check_guesses(trace: RoutingTrace, predicted: npt.NDArray[np.int16], start: int, stop: int) -> None:
    """Raise InputError when guesses in rows [start, stop) are out of range, doubled or from before the first layer."""
    guesses = np.asarray(predicted[start:stop])
    wrong = (guesses < -1) | (guesses >= trace.num_experts)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        rule = f"guesses must be -1 (none) or expert ids below num_experts ({trace.num_experts})"
        _refuse(f"predicted[{start + at[0]}, {at[1]}, {at[2]}]", int(guesses[at]), rule)
    for distance in range(1, guesses.shape[2] + 1):
        if (guesses[:, :distance, distance - 1] >= 0).any():
            rule = f"a guess made {distance} layers earlier needs {distance} earlier layers; use -1 there"
            _refuse(f"predicted[:, :{distance}, {distance - 1}]", "has guesses", rule)
    ordered = np.sort(guesses, axis=3)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        at = tuple(int(i) for i in np.argwhere(twice)[0])
        rule = f"expert {int(ordered[at])} is guessed twice"
        _refuse(f"predicted[{start + at[0]}, {at[1]}, {at[2]}]", guesses[at[:3]].tolist(), rule)
    if trace.predicted_prob is not None:
        prob = np.asarray(trace.predicted_prob[start:stop])
        wrong = ~((prob >= 0) & (prob <= 1)) | ((guesses < 0) & (prob != 0))  # written so that NaN is wrong
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            rule = "probabilities must be 0 to 1, and 0 where there is no guess"
            _refuse(f"predicted_prob[{start + at[0]}, {at[1]}, {at[2]}, {at[3]}]", float(prob[at]), rule)


def _check_order(trace: RoutingTrace, start: int, stop: int) -> None:
    """Raise InputError unless rows [start, stop) continue the order (request, position), prefill before decode."""
    before = max(0, start - 1)  # one row of overlap, so that chunk borders are checked too
    request, position = (np.asarray(column[before:stop], dtype=np.int64) for column in (trace.request, trace.position))
    phase = np.asarray(trace.phase[before:stop])
    for name, column in (("request", request), ("position", position)):
        if int(column.min()) < 0:
            _refuse(f"{name}[{before + int(column.argmin())}]", int(column.min()), "must not be negative")
    if int(phase.max()) > DECODE:
        _refuse(f"phase[{before + int(phase.argmax())}]", int(phase.max()), "must be 0 (prefill) or 1 (decode)")
    same = request[1:] == request[:-1]
    broken = (request[1:] < request[:-1]) | (same & (position[1:] <= position[:-1]))
    if broken.any():
        t = before + 1 + int(broken.argmax())
        where = (int(trace.request[t]), int(trace.position[t]))
        rule = "rows must be sorted by request, then by strictly increasing position"
        _refuse(f"(request, position)[{t}]", where, rule, "sort the rows and drop repeated positions")
    backwards = same & (phase[1:] < phase[:-1])
    if backwards.any():
        t = before + 1 + int(backwards.argmax())
        _refuse(f"phase[{t}]", 0, "prefill after decode within one request", "split it into two requests")


def _check_int64(array: npt.NDArray[Any], name: str, ndim: int) -> None:
    """Raise InputError unless `array` is int64 with `ndim` axes, none empty, and holds no negative number."""
    if array.dtype != np.int64:
        _refuse(name, str(array.dtype), "must be int64")
    if array.ndim != ndim or 0 in array.shape:
        _refuse(name, array.shape, f"must have {ndim} axes, none empty")
    if int(array.min()) < 0:
        _refuse(name, int(array.min()), "counts must not be negative")
    if float(array.sum(dtype=np.float64)) > MAX_TOTAL_COUNT:
        _refuse(name, f"sum {float(array.sum(dtype=np.float64)):.3g}", f"counts must sum to at most {MAX_TOTAL_COUNT}")


def _refuse(field: str, value: object, rule: str, remedy: str = "repair the recording or record it again") -> NoReturn:
    """Raise the InputError that every check of this file ends in."""
    raise InputError(field, value, rule, remedy)
