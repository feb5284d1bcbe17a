"""The hash of what a recording holds, by which a plan knows its recording again, wherever its file has gone.

Modelled: every value that decides a prediction: choices, requests, positions, phases, weights, guesses, or counts. Two files of
different formats with the same values have the same hash. Ignored: the model's name, source, licence and further strings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..base.errors import InputError
from .recording import LoadProfile, RoutingTrace
from .validate import release_pages, row_chunks

# Types that values are hashed in, whatever they are stored in.
_ROUTING = {
    "experts": "<u2", "request": "<i4", "position": "<i4", "phase": "<u1", "weights": "<f2", "predicted": "<i2",
    "predicted_prob": "<f2",
}  # fmt: skip
_COUNTS = {"counts": "<i8", "windows": "<i8"}


def recording_sha256(recording: RoutingTrace | LoadProfile) -> str:
    """Return the SHA-256 of a recording's values; memory-mapped arrays are read in chunks."""
    kinds = _ROUTING if isinstance(recording, RoutingTrace) else _COUNTS
    found = hashlib.sha256()
    found.update(repr((recording.num_experts, tuple(int(layer) for layer in recording.layer_ids))).encode())
    if isinstance(recording, LoadProfile):
        found.update(repr(recording.top_k).encode())
    for name, kind in kinds.items():
        array: npt.NDArray[Any] | None = getattr(recording, name)
        found.update(f"{name}{None if array is None else array.shape}".encode())
        if array is None:
            continue
        row_bytes = int(np.prod(array.shape[1:])) * np.dtype(kind).itemsize
        for start, stop in row_chunks(len(array), row_bytes):
            found.update(np.ascontiguousarray(array[start:stop], dtype=kind).data)
        release_pages(array)
    return found.hexdigest()


def describe(recording: Mapping[str, Any]) -> str:
    """Return a recording in a few words, from its facts as plans keep them (`model`, `source`, `num_tokens`)."""
    tokens = recording.get("num_tokens")
    length = "loads only" if tokens is None else f"{tokens} tokens"
    return f"{recording.get('model') or 'an unnamed model'}, {length}, {recording.get('source') or 'of unknown source'}"


def _planned(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a plan says of its recording; nothing where it says nothing."""
    provenance = document.get("provenance")
    planned = provenance.get("trace") if isinstance(provenance, Mapping) else None
    return planned if isinstance(planned, Mapping) else {}


def planned_source(document: Mapping[str, Any]) -> str | None:
    """Return where the recording that a plan was made from comes from; None where the plan does not say."""
    found = _planned(document).get("source")
    return found if isinstance(found, str) else None


def check_recording(document: Mapping[str, Any], recording: RoutingTrace | LoadProfile, given: str) -> None:
    """Return nothing; raises InputError where `recording`, given by the name `given`, is another than the plan was made from."""
    planned = _planned(document)
    if not isinstance(planned.get("sha256"), str):
        rule = "the plan was written before plans knew their recording"
        raise InputError("plan: provenance.trace.sha256", "(absent)", rule, "make it again with moeplan plan")
    if planned["sha256"] != recording_sha256(recording):
        facts = {
            "model": recording.model,
            "source": recording.source,
            "num_tokens": getattr(recording, "num_tokens", None),
        }
        rule = f"another recording ({describe(facts)}) than the plan was made from ({describe(planned)})"
        raise InputError("--trace", given, rule, "give the plan's recording, or plan with this one")
