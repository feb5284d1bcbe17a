"""Recordings as people keep them themselves: tables in JSON Lines, CSV and Parquet, numpy arrays, router logits."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import traces_upstream as upstream
from moeplan.base.errors import InputError
from moeplan.traces.convert import convert
from moeplan.traces.readers import import_trace
from moeplan.traces.readers.account import account_of
from moeplan.traces.recording import LoadProfile, RoutingTrace
from recorded_answers import Shape, shapes

EXAMPLES = 100 if os.environ.get("MOEPLAN_LONG") == "1" else 8
drawn = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
CASES = Path(__file__).resolve().parents[4] / "shared" / "data" / "cases"


def routing(kind: str, path: Path, **options: Any) -> RoutingTrace:
    trace = import_trace(kind, path, **options)
    assert isinstance(trace, RoutingTrace)
    return trace


def rows_of(shape: Shape, requests: list[np.ndarray], weights: bool, phase: bool) -> list[dict[str, Any]]:
    """Return one dictionary a token and layer; weights are exact in float16."""
    return [
        {"request": f"r{r}", "token": t, "layer": layer, "experts": ids[t, column].tolist()}
        | ({"weights": [(j + 1) / 8 for j in range(shape.top_k)]} if weights else {})
        | ({"phase": "decode" if t >= 2 else "prefill"} if phase else {})
        for r, ids in enumerate(requests)
        for t in range(len(ids))
        for column, layer in enumerate(shape.moe_layers)
    ]


def write(path: Path, rows: list[dict[str, Any]], style: str) -> str:
    """Write rows in a style; returns the kind that reads it."""
    if style == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        return "jsonl"
    if style == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return "parquet"
    flat: list[dict[str, Any]] = []
    for row in rows:
        lists = {key: row[key] for key in ("experts", "weights") if key in row}
        rest = {key: value for key, value in row.items() if key not in lists}
        if style == "csv-numbered":
            flat.append(
                rest
                | {f"{key.removesuffix('s')}_{j}": one for key, many in lists.items() for j, one in enumerate(many)}
            )
        elif style == "csv-long":
            flat += [
                rest | {"expert": row["experts"][j]} | ({"weight": row["weights"][j]} if "weights" in row else {})
                for j in range(len(row["experts"]))
            ]
        else:
            separator = {"csv": ";", "csv-json": ", ", "csv-tab": " "}[style]
            text = {key: separator.join(map(str, many)) for key, many in lists.items()}
            flat.append(rest | ({key: f"[{value}]" for key, value in text.items()} if style == "csv-json" else text))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]), delimiter="\t" if style == "csv-tab" else ",")
        writer.writeheader()
        writer.writerows(flat)
    return "csv"


@drawn
@given(
    shape=shapes(min_top_k=1), style=st.sampled_from(["jsonl", "parquet", "csv", "csv-json", "csv-tab", "csv-numbered", "csv-long"]),
    weights=st.booleans(), phase=st.booleans(), shuffle=st.booleans(),
)  # fmt: skip
def test_tables_of_every_style(
    tmp_path_factory: pytest.TempPathFactory, shape: Shape, style: str, weights: bool, phase: bool, shuffle: bool
) -> None:
    rng = shape.rng()
    requests = [shape.routing(rng, 12), shape.routing(rng, 10)]
    for ids in requests:
        ids[0] = np.arange(shape.top_k) + (shape.top_k == 1)  # no layer is all zeros with one choice
    rows = rows_of(shape, requests, weights, phase)
    if shuffle:  # requests keep the order of their first appearance
        rows = [rows[0], *[rows[i] for i in rng.permutation(np.arange(1, len(rows)))]] if style != "csv-long" else rows
    path = tmp_path_factory.mktemp("t") / "table"
    kind = write(path, rows, style)
    trace = routing(kind, path, num_experts=shape.experts, **({} if phase else {"prompt_tokens": 2}))
    first = 0 if trace.num_tokens == 22 and int((trace.request == 0).sum()) == 12 else 1
    ordered = [requests[first], requests[1 - first]]
    assert np.array_equal(trace.experts, np.concatenate(ordered)) and trace.layer_ids == tuple(shape.moe_layers)
    assert trace.position.tolist() == [t for ids in ordered for t in range(len(ids))]
    assert trace.phase.tolist() == [int(t >= 2) for ids in ordered for t in range(len(ids))]
    assert (trace.weights is not None) == weights
    if trace.weights is not None:
        assert np.array_equal(trace.weights, np.broadcast_to((np.arange(shape.top_k) + 1) / 8, trace.weights.shape))


def test_columns_of_other_names_and_rows_that_lack_something(tmp_path: Path) -> None:
    shape = Shape(layers=5, dense=(0,), experts=16, top_k=3, prompt=4, reply=4, seed=1)
    ids = shape.routing(shape.rng())
    rows = rows_of(shape, [ids], False, False)
    renamed = [{"a": r["token"], "b": r["layer"], "c": r["experts"]} for r in rows]
    write(tmp_path / "t", renamed, "jsonl")
    told = {"token_column": "a", "layer_column": "b", "experts_column": "c"}
    trace = routing("jsonl", tmp_path / "t", **told, num_experts=16)
    assert np.array_equal(trace.experts, ids) and "every token counts as decoded" in trace.metadata["notes"]
    write(tmp_path / "t", rows[:5] + rows[6:], "jsonl")  # token 1 lacks a layer
    trace = routing("jsonl", tmp_path / "t", num_experts=16)
    assert trace.position.tolist() == [0, 2, 3, 4, 5, 6] and account_of(trace)["tokens_dropped"] == {
        "a choice missing (-1)": 1
    }
    every = [{"position": t, "experts": ids[t].tolist()} for t in range(len(ids))]
    write(tmp_path / "t", every, "jsonl")
    assert np.array_equal(routing("jsonl", tmp_path / "t", layer_ids=shape.moe_layers, num_experts=16).experts, ids)
    bad: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
        (renamed, {}, "no column for the token; the columns are a, b, c"),
        (renamed, {**told, "layer_column": "z"}, "layer_column = 'z'"),
        (rows + rows[:1], {}, "token 0 of request 0 has layer 1 twice"),
        ([*rows, {**rows[0], "token": 9, "experts": [1, 2]}], {}, "experts = .*must be 3 experts like the rows before"),
        ([*rows, {**rows[0], "token": 9, "experts": [1, 2, None]}], {}, "whole number|is missing"),
        ([{**rows[0], "token": t, "layer": t} for t in range(40)], {}, "40 tokens × 40 layers have only 40 rows"),
        (rows, {"layer_ids": [1, 2]}, "layer_ids = 2"),
        ([{**row, "phase": "late"} for row in rows], {}, "phase = 'late'"),
        ([{**row, "phase": 1} for row in rows], {"prompt_tokens": 3}, "column of phases"),
    ]
    for lines, options, message in bad:
        write(tmp_path / "t", lines, "jsonl")
        with pytest.raises(InputError, match=message):
            import_trace("jsonl", tmp_path / "t", **options)
    (tmp_path / "t").write_text("token,layer,experts\n0,1,3,5\n")
    with pytest.raises(InputError, match="has 4 cells for 3 columns"):
        import_trace("csv", tmp_path / "t")
    (tmp_path / "t").write_text("token,layer,expert\n0,1,3\n0,1,5\n1,1,3\n")
    with pytest.raises(InputError, match="others have 2"):
        import_trace("csv", tmp_path / "t")


@drawn
@given(shape=shapes(), dtype=st.sampled_from([np.int16, np.int32, np.int64, np.uint16]), first=st.booleans())
def test_numpy_arrays_of_all_layers_and_of_each(
    tmp_path_factory: pytest.TempPathFactory, shape: Shape, dtype: Any, first: bool
) -> None:
    ids = shape.routing(shape.rng())
    every = shape.all_layers(ids).astype(dtype)
    folder = tmp_path_factory.mktemp("n")
    np.save(folder / "all.npy", every.transpose(1, 0, 2) if first else every)
    for layer in shape.moe_layers:
        np.save(folder / f"layer_{layer}.npy", every[:, layer])
    told: dict[str, Any] = {"num_experts": shape.experts, "prompt_tokens": shape.prompt}
    for path, options in ((folder / "all.npy", {"layers_first": first}), (folder, {})):
        trace = routing("npy", path, **told, **options)
        assert np.array_equal(trace.experts, ids) and trace.layer_ids == tuple(shape.moe_layers)
        assert trace.phase.tolist() == [int(p >= shape.prompt) for p in range(shape.rows)]
    one = routing("npy", folder / f"layer_{shape.moe_layers[1]}.npy", **told)
    assert np.array_equal(one.experts, ids[:, 1:2]) and one.layer_ids == (shape.moe_layers[1],)
    np.save(folder / "layer_77.npy", every[1:, shape.moe_layers[0]])
    with pytest.raises(InputError, match=r"layer_77\.npy"):
        import_trace("npy", folder, **told)


@drawn
@given(
    shape=shapes(min_top_k=1),
    form=st.sampled_from(["tuple", "dict", "tensor", "batch", "masked", "passes", "bfloat16"]),
)
def test_router_logits(tmp_path_factory: pytest.TempPathFactory, shape: Shape, form: str) -> None:
    import torch

    rng = shape.rng()
    layers, tokens = len(shape.moe_layers), 12
    logits = rng.permuted(np.broadcast_to(np.arange(shape.experts) / 4 - 9, (layers, tokens, shape.experts)), axis=2)
    if form == "bfloat16":
        logits = rng.permuted(np.broadcast_to(np.arange(shape.experts) % 256, (layers, tokens, shape.experts)), axis=2)
    expected = np.argsort(-logits, axis=2, kind="stable")[:, :, : shape.top_k].transpose(1, 0, 2)
    tensors = tuple(
        torch.tensor(layer, dtype=torch.bfloat16 if form == "bfloat16" else torch.float32) for layer in logits
    )
    mask = np.ones((2, 6), int)
    mask[0, :2] = 0
    content: Any = {
        "tuple": tensors, "bfloat16": tensors, "dict": {"router_logits": tensors, "attention_mask": None}, "tensor": torch.stack(tensors),
        "batch": {"router_logits": tuple(t.reshape(2, 6, -1) for t in tensors)},
        "masked": {"router_logits": tensors, "attention_mask": torch.tensor(mask)},
        "passes": (tuple(t[:9] for t in tensors), *[tuple(t[i : i + 1] for t in tensors) for i in (9, 10, 11)]),
    }[form]  # fmt: skip
    path = tmp_path_factory.mktemp("h") / "logits.pt"
    torch.save(content, path)
    told = {"layer_ids": shape.moe_layers, "top_k": shape.top_k}
    trace = routing("hf-router-logits", path, **told)
    kept = mask.ravel().astype(bool) if form == "masked" else np.ones(12, bool)
    assert np.array_equal(trace.experts, expected[kept]) and trace.num_experts == shape.experts
    assert trace.layer_ids == tuple(shape.moe_layers)
    sizes = {"batch": [6, 6], "masked": [4, 6]}.get(form, [12])
    assert trace.position.tolist() == [t for size in sizes for t in range(size)]
    assert trace.phase.tolist() == ([0] * 9 + [1] * 3 if form == "passes" else [0] * int(kept.sum()))
    if form != "passes":
        split = routing("hf-router-logits", path, **told, prompt_tokens=3)
        assert split.phase.tolist() == [int(t >= 3) for size in sizes for t in range(size)]
    with pytest.raises(InputError, match="top_k"):
        import_trace("hf-router-logits", path, top_k=shape.experts + 1)


def test_router_logits_that_are_none(tmp_path: Path) -> None:
    import torch

    for content, message in (
        ({"logits": torch.zeros(2, 3)}, "has only logits"),
        ((), "holds no layer"),
        ((torch.zeros(2, 3), torch.zeros(3, 3)), "must have the shape of the first"),
        ((torch.full((2, 3), float("nan")),), "NaN"),
        ((torch.zeros(2, 3, dtype=torch.int64),), "must be numbers"),
        ({"router_logits": (torch.zeros(4, 3),), "attention_mask": torch.ones(3, 2)}, "not so many sequences"),
    ):
        torch.save(content, tmp_path / "l.pt")
        with pytest.raises(InputError, match=message):
            import_trace("hf-router-logits", tmp_path / "l.pt", top_k=2)


def test_a_converted_recording_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    ids = upstream.choices(rng, 6).astype(np.uint8)
    spec = np.full((6, 4, 2, 3), -1, np.int16)
    spec[:, 1:, 0] = [3, 1, -1]
    columns: dict[str, Any] = {
        "experts": ids,
        "seq": np.arange(6) // 3,
        "pos": np.arange(6) % 3,
        "phase": np.arange(6) % 3 // 2,
    }
    prob = np.where(spec >= 0, 0.25, 0).astype(np.float32)
    columns |= {
        "weights": rng.random((6, 4, 2)).astype(np.float16),
        "spec": spec,
        "spec_prob": prob,
        "domain": np.arange(6) // 3,
    }
    upstream.npz(
        tmp_path / "t.npz",
        **columns,
        domain_names=np.array(["a", "b"]),
        meta={"experts": 8, "model": "m", "licence": "l"},
    )
    whole = routing("npz", tmp_path / "t.npz")
    convert(whole, "parquet", tmp_path / "t.parquet")
    back = routing("parquet", tmp_path / "t.parquet")
    for field in dataclasses.fields(RoutingTrace):
        mine, theirs = getattr(whole, field.name), getattr(back, field.name)
        assert np.array_equal(mine, theirs) if isinstance(mine, np.ndarray) else mine == theirs, field.name
        assert getattr(mine, "dtype", None) == getattr(theirs, "dtype", None)
    assert routing("parquet", tmp_path / "t.parquet", model="other").model == "other"
    with pytest.raises(InputError, match="says itself"):
        import_trace("parquet", tmp_path / "t.parquet", num_experts=8)
    upstream.trtllm(rng.integers(1, 50, (2, 4, 8)), tmp_path / "stat")
    loads = import_trace("trtllm", tmp_path / "stat")
    assert isinstance(loads, LoadProfile)
    convert(loads, "parquet", tmp_path / "l.parquet")
    again = import_trace("parquet", tmp_path / "l.parquet")
    assert isinstance(again, LoadProfile) and np.array_equal(again.counts, loads.counts)
    assert (again.layer_ids, again.top_k, again.source, again.metadata) == (
        loads.layer_ids,
        loads.top_k,
        loads.source,
        loads.metadata,
    )


@pytest.mark.skipif(not CASES.is_dir(), reason="no recordings beside this checkout")
def test_tables_as_people_keep_them() -> None:
    folder = CASES / "jsonl-token-layer"
    for kind, name, layers in (
        ("jsonl", "a.jsonl", range(6)),
        ("npy", "all.npy", range(6)),
        ("npy", "layer0.npy", range(1)),
    ):
        trace = routing(kind, folder / name)
        assert (trace.num_tokens, trace.top_k, trace.layer_ids) == (12, 4, tuple(layers))
    for name in ("router_logits.pt", "dict.pt"):
        trace = routing("hf-router-logits", CASES / "hf-router-logits" / name, top_k=4)
        assert (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_experts) == (12, 6, 4, 16)
