"""Recordings for other people's tools: Parquet tables and numpy archives.

Modelled: Parquet with one row per token and layer (`request`, `position`, `phase`, `layer`, `experts`, and `weights`,
`predicted`, `predicted_prob` where recorded), or one row per layer and expert for load profiles; numpy archives in the
layout that the npz reader reads. Both are written chunk by chunk, atomically, with equal bytes for equal recordings.
Ignored: formats of serving engines.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib import format as npy_format

from ..base.errors import InputError, UnknownName
from ..base.text_files import written_aside
from ..base.version import __version__
from .domains import KEY as DOMAINS
from .domains import decode_domains
from .readers.files.npz import METADATA
from .recording import LoadProfile, RoutingTrace
from .validate import release_pages, row_chunks, validate_load, validate_trace

Recording = RoutingTrace | LoadProfile
_SOURCE = "source."  # prefix under which the npz reader keeps an archive's own strings


def convert(recording: Recording, kind: str, path: str | os.PathLike[str]) -> None:
    """Write a recording to `path` as `kind` ("npz" or "parquet").

    Raises UnknownName, or InputError when it cannot be written.
    """
    writer = CONVERTERS.get(kind)
    if writer is None:
        raise UnknownName("kind", kind, CONVERTERS)
    writer(recording, path)


def write_parquet(recording: Recording, path: str | os.PathLike[str]) -> None:
    """Write a recording as a Parquet table, its scalars in the schema's metadata. Raises InputError."""
    if isinstance(recording, LoadProfile):
        validate_load(recording)
        layers, experts = recording.counts.shape
        table = pa.table(
            {
                "layer": np.repeat(np.array(recording.layer_ids, dtype=np.int32), experts),
                "expert": np.tile(np.arange(experts, dtype=np.int32), layers),
                "count": recording.counts.ravel(),
            }
        )
        with written_aside(path, "path") as file:
            pq.write_table(table.replace_schema_metadata(_strings(recording)), file, compression="zstd")
        return
    validate_trace(recording)
    schema = _schema(recording)
    row_bytes = recording.num_layers * (recording.top_k * 4 + 16)
    if recording.predicted is not None:
        row_bytes += 6 * int(np.prod(recording.predicted.shape[1:]))
    with written_aside(path, "path") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start, stop in row_chunks(recording.num_tokens, row_bytes):
            writer.write_batch(_batch(recording, schema, start, stop))
            release_pages(recording.experts)


def write_npz(recording: Recording, path: str | os.PathLike[str]) -> None:
    """Write a routing recording as a compressed numpy archive. Raises InputError for a load profile."""
    if isinstance(recording, LoadProfile):
        rule = "numpy archives hold routing, and this recording has loads only"
        raise InputError("kind", "npz", rule, "convert it to parquet")
    validate_trace(recording)
    trace = recording
    own = {key: value for key, value in trace.metadata.items() if not key.startswith(_SOURCE) and key != DOMAINS}
    meta: dict[str, Any] = {
        key.removeprefix(_SOURCE): value for key, value in trace.metadata.items() if key.startswith(_SOURCE)
    }
    meta |= {"model": trace.model, "source": trace.source, "licence": trace.licence, "experts": trace.num_experts}
    meta |= {METADATA: own} if own else {}
    arrays: dict[str, npt.NDArray[Any]] = {
        "meta": np.array(json.dumps(meta, sort_keys=True)),
        "experts": trace.experts,
        "seq": trace.request,
        "pos": trace.position,
        "phase": trace.phase,
        "layer_ids": np.array(trace.layer_ids, dtype=np.int32),
    }
    if DOMAINS in trace.metadata:
        names, domain = decode_domains(trace.metadata, trace.request)
        arrays["domain"], arrays["domain_names"] = domain.astype(np.int16), np.array(names)
    optional = {"weights": trace.weights, "spec": trace.predicted, "spec_prob": trace.predicted_prob}
    arrays |= {name: array for name, array in optional.items() if array is not None}
    with written_aside(path, "path") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            # A fixed date, so that equal recordings give equal archives.
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w", force_zip64=True) as stream:
                npy_format.write_array(stream, np.asanyarray(array), allow_pickle=False)
            release_pages(array)


CONVERTERS: Mapping[str, Callable[[Recording, str | os.PathLike[str]], None]] = MappingProxyType(
    {"npz": write_npz, "parquet": write_parquet}
)


def _schema(trace: RoutingTrace) -> pa.Schema:
    """Return the Parquet schema of a routing recording."""
    id_type = pa.uint8() if trace.experts.dtype == np.uint8 else pa.uint16()
    fields = [
        pa.field("request", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("phase", pa.uint8(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("experts", pa.list_(id_type, trace.top_k), nullable=False),
    ]
    if trace.weights is not None:
        fields.append(pa.field("weights", pa.list_(pa.float32(), trace.top_k), nullable=False))
    if trace.predicted is not None:
        guesses = int(np.prod(trace.predicted.shape[2:]))
        fields.append(pa.field("predicted", pa.list_(pa.int16(), guesses), nullable=False))
        if trace.predicted_prob is not None:
            fields.append(pa.field("predicted_prob", pa.list_(pa.float32(), guesses), nullable=False))
    return pa.schema(fields, metadata=_strings(trace))


def _batch(trace: RoutingTrace, schema: pa.Schema, start: int, stop: int) -> pa.RecordBatch:
    """Return rows [start, stop) as one batch: every token once per layer."""
    tokens = stop - start
    columns: dict[str, npt.NDArray[Any]] = {
        "request": np.repeat(trace.request[start:stop], trace.num_layers),
        "position": np.repeat(trace.position[start:stop], trace.num_layers),
        "phase": np.repeat(trace.phase[start:stop], trace.num_layers),
        "layer": np.tile(np.array(trace.layer_ids, dtype=np.int32), tokens),
    }
    lists: dict[str, npt.NDArray[Any] | None] = {
        "experts": trace.experts,
        "weights": trace.weights,
        "predicted": trace.predicted,
        "predicted_prob": trace.predicted_prob,
    }
    arrays = []
    for field in schema:
        values = lists.get(field.name)
        if values is None:
            arrays.append(pa.array(columns[field.name], type=field.type))
            continue
        flat = np.asarray(values[start:stop]).ravel()
        flat = flat.astype(np.float32) if flat.dtype == np.float16 else flat
        arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), field.type.list_size))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _strings(recording: Recording) -> dict[str, str]:
    """Return the scalars of a recording as strings, for the schema's metadata."""
    strings = {
        "producer": f"moeplan {__version__}",
        "model": recording.model,
        "source": recording.source,
        "licence": recording.licence,
        "num_experts": str(recording.num_experts),
        "layer_ids": json.dumps(recording.layer_ids),
        **{f"metadata.{key}": value for key, value in recording.metadata.items()},
    }
    if isinstance(recording, LoadProfile) and recording.top_k is not None:
        strings["top_k"] = str(recording.top_k)
    if isinstance(recording, RoutingTrace) and recording.predicted is not None:
        strings["predicted_shape"] = json.dumps(recording.predicted.shape[2:])
    return strings
