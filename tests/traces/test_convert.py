"""Converted recordings hold the same choices, and equal recordings give equal files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from moeplan.base.errors import InputError, UnknownName
from moeplan.traces.convert import CONVERTERS, convert
from moeplan.traces.format import LoadProfile
from moeplan.traces.readers import import_trace
from small_traces import same, small_trace


def test_parquet_has_a_row_per_token_and_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeplan.traces.convert.row_chunks", lambda rows, _: [(0, 2), (2, rows)])
    trace = small_trace()
    convert(trace, "parquet", tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.column_names == [
        "request", "position", "phase", "layer", "experts", "weights", "predicted", "predicted_prob",
    ]  # fmt: skip
    rows = table.to_pylist()
    assert len(rows) == trace.num_tokens * trace.num_layers
    for t in range(trace.num_tokens):
        for column, layer in enumerate(trace.layer_ids):
            row = rows[t * trace.num_layers + column]
            assert (row["request"], row["position"]) == (trace.request[t], trace.position[t])
            assert (row["phase"], row["layer"]) == (trace.phase[t], layer)
            assert row["experts"] == trace.experts[t, column].tolist()
            assert row["weights"] == trace.weights[t, column].tolist()
            assert row["predicted"] == trace.predicted[t, column].ravel().tolist()
            assert row["predicted_prob"] == trace.predicted_prob[t, column].ravel().tolist()
    strings = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert strings["model"] == "tiny" and json.loads(strings["layer_ids"]) == [1, 2, 5]
    assert strings["num_experts"] == "6" and strings["metadata.note"] == "five tokens — «ünïcode»"
    assert json.loads(strings["predicted_shape"]) == [2, 2]
    assert os.listdir(tmp_path) == ["t.parquet"]


def test_parquet_without_optional_columns(tmp_path: Path) -> None:
    convert(small_trace(weights=None, predicted=None, predicted_prob=None), "parquet", tmp_path / "t.parquet")
    assert pq.read_table(tmp_path / "t.parquet").column_names == ["request", "position", "phase", "layer", "experts"]


def test_loads_become_rows_of_counts(tmp_path: Path) -> None:
    counts = np.array([[3, 1], [4, 0]], dtype=np.int64)
    profile = LoadProfile(counts=counts, model="m", layer_ids=(3, 7), source="s", licence="")
    convert(profile, "parquet", tmp_path / "p.parquet")
    assert pq.read_table(tmp_path / "p.parquet").to_pylist() == [
        {"layer": 3, "expert": 0, "count": 3},
        {"layer": 3, "expert": 1, "count": 1},
        {"layer": 7, "expert": 0, "count": 4},
        {"layer": 7, "expert": 1, "count": 0},
    ]
    with pytest.raises(InputError, match="loads only"):
        convert(profile, "npz", tmp_path / "p.npz")
    assert os.listdir(tmp_path) == ["p.parquet"]


def test_npz_comes_back_through_its_reader(tmp_path: Path) -> None:
    domains = '{"names": ["law", "code"], "runs": [[0, 1], [7, 0]]}'
    trace = small_trace(metadata={"domains": domains, "note": "own", "source.commit": "abc", "source.experts": "6"})
    convert(trace, "npz", tmp_path / "t.npz")
    same(trace, import_trace("npz", tmp_path / "t.npz"))  # type: ignore[arg-type]
    bare = small_trace(metadata={"source.experts": "6"}, weights=None, predicted=None, predicted_prob=None)
    convert(bare, "npz", tmp_path / "t.npz")
    same(bare, import_trace("npz", tmp_path / "t.npz"))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", sorted(CONVERTERS))
def test_equal_recordings_give_equal_files_and_wrong_ones_give_none(kind: str, tmp_path: Path) -> None:
    convert(small_trace(), kind, tmp_path / "a")
    convert(small_trace(), kind, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(InputError, match="num_experts"):
        convert(small_trace(num_experts=3), kind, tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_an_unknown_kind_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'parquet'"):
        convert(small_trace(), "parkett", tmp_path / "a")
