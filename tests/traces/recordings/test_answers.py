"""Rows of routing against what an answer says: every kind of difference is recognised, over models of many shapes."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import recorded_answers as written
from moeplan.base.errors import InputError
from moeplan.traces.readers import import_trace
from moeplan.traces.readers.account import account_of
from moeplan.traces.recording import RoutingTrace
from recorded_answers import Shape, shapes

EXAMPLES = 200 if os.environ.get("MOEPLAN_LONG") == "1" else 12
drawn = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
ENGINES = st.sampled_from(["vllm", "sglang", "sglang-openai"])


def read(folder: Path, engine: str, shape: Shape, answers: Any, **options: Any) -> RoutingTrace:
    """Return what the engine's reader makes of answers."""
    (folder / "a.json").write_text(json.dumps(answers))
    told: dict[str, Any] = {"num_experts": shape.experts, **options}
    if engine != "vllm":
        told |= {"num_layers": shape.layers, "top_k": shape.top_k}
    trace = import_trace(
        "vllm-routed-experts" if engine == "vllm" else "sglang-routed-experts", folder / "a.json", **told
    )
    assert isinstance(trace, RoutingTrace)
    assert trace.layer_ids == tuple(shape.moe_layers) and trace.num_experts == shape.experts
    return trace


def answer(engine: str, shape: Shape, every: np.ndarray, cached: int | None = None) -> dict[str, Any]:
    """Return one engine's answer with the rows `every` [rows, layers, k]."""
    if engine == "vllm":
        return written.vllm(shape, [every], cached)
    return written.sglang(shape, every, cached or 0, native=engine == "sglang")


def holds(trace: RoutingTrace, shape: Shape, ids: np.ndarray, positions: list[int]) -> None:
    """Assert that a trace is these tokens of one request, with the right phases."""
    assert np.array_equal(trace.experts, ids[positions])
    assert trace.position.tolist() == positions
    assert trace.phase.tolist() == [int(p >= shape.prompt) for p in positions]


@drawn
@given(shape=shapes(), engine=ENGINES)
def test_whole_answers_are_read_whole(tmp_path_factory: pytest.TempPathFactory, shape: Shape, engine: str) -> None:
    ids = shape.routing(shape.rng())
    trace = read(tmp_path_factory.mktemp("a"), engine, shape, answer(engine, shape, shape.all_layers(ids)))
    holds(trace, shape, ids, list(range(shape.rows)))
    account = account_of(trace)
    assert account["tokens_read"] == shape.rows and not account["tokens_dropped"]
    assert json.loads(trace.metadata.get("dense_layers", "[]")) == list(shape.dense)


@drawn
@given(shape=shapes(), engine=ENGINES, data=st.data())
def test_a_prefix_the_server_left_out_moves_the_positions(
    tmp_path_factory: pytest.TempPathFactory, shape: Shape, engine: str, data: st.DataObject
) -> None:
    cached = data.draw(st.integers(1, shape.prompt - 1))
    ids = shape.routing(shape.rng())
    folder = tmp_path_factory.mktemp("a")
    rest = shape.all_layers(ids)[cached:]
    trace = read(folder, engine, shape, answer(engine, shape, rest, cached))
    holds(trace, shape, ids, list(range(cached, shape.rows)))
    assert account_of(trace)["tokens_missing"] == {"prefix left out by the server": cached}
    # Asked for by the request: the option says it.
    start = {"prompt_start" if engine == "vllm" else "start_len": cached}
    holds(
        read(folder, engine, shape, answer(engine, shape, rest), **start), shape, ids, list(range(cached, shape.rows))
    )
    # Nothing says it: refused, with the option that would.
    with pytest.raises(InputError, match=f"(prompt_start|start_len)={cached} if the request or the server skipped"):
        read(folder, engine, shape, answer(engine, shape, rest))
    with pytest.raises(InputError, match="rows of routed_experts"):
        read(folder, engine, shape, answer(engine, shape, rest), **dict.fromkeys(start, cached + 1))
    # Rows beyond the tokens there are.
    with pytest.raises(InputError, match="rows of routed_experts"):
        read(folder, engine, shape, answer(engine, shape, np.concatenate([shape.all_layers(ids)] * 2)))


@drawn
@given(shape=shapes(), engine=ENGINES)
def test_a_row_of_the_last_sampled_token_is_left_out(
    tmp_path_factory: pytest.TempPathFactory, shape: Shape, engine: str
) -> None:
    ids = shape.routing(shape.rng())
    every = np.concatenate([shape.all_layers(ids), np.zeros((1, shape.layers, shape.top_k), np.int64)])
    trace = read(tmp_path_factory.mktemp("a"), engine, shape, answer(engine, shape, every))
    holds(trace, shape, ids, list(range(shape.rows)))
    assert account_of(trace)["tokens_dropped"] == {"last sampled token (never ran)": 1}


@drawn
@given(shape=shapes(), choices=st.integers(2, 4), summed=st.booleans(), same=st.booleans())
def test_choices_that_share_a_prompt_count_it_once(
    tmp_path_factory: pytest.TempPathFactory, shape: Shape, choices: int, summed: bool, same: bool
) -> None:
    rng = shape.rng()
    prompt = shape.routing(rng, shape.prompt)
    replies = [shape.routing(rng, shape.reply - 1) for _ in range(choices)]
    heads = [prompt if same or i == 0 else shape.routing(rng, shape.prompt) for i in range(choices)]
    tables = [shape.all_layers(np.concatenate([head, reply])) for head, reply in zip(heads, replies, strict=True)]
    folder = tmp_path_factory.mktemp("a")
    trace = read(folder, "vllm", shape, written.vllm(shape, tables, reply=shape.reply * (choices if summed else 1)))
    account = account_of(trace)
    assert account["tokens_read"] == choices * shape.rows
    assert int((trace.phase == 0).sum()) == shape.prompt * (1 if same else choices)
    assert int((trace.phase == 1).sum()) == choices * (shape.reply - 1)
    for i, reply in enumerate(replies):
        rows = (trace.request == i) & (trace.phase == 1)
        assert np.array_equal(trace.experts[rows], reply)
        assert trace.position[rows].tolist() == list(range(shape.prompt, shape.rows))
    again = (choices - 1) * shape.prompt
    assert account["tokens_dropped"] == ({"prompt shared with another choice": again} if same else {})
    # Several prompts in one request, of which only the sum is told.
    body = written.vllm(shape, tables, reply=shape.reply * choices)
    body["usage"]["prompt_tokens"] = shape.prompt * choices
    with pytest.raises(InputError, match="one prompt a request"):
        read(folder, "vllm", shape, body)


def test_samples_of_one_prompt_in_native_answers(tmp_path: Path) -> None:
    shape = Shape(layers=6, dense=(0,), experts=64, top_k=4, prompt=9, reply=5, seed=3)
    rng = shape.rng()
    prompt = shape.routing(rng, shape.prompt)
    tables = [shape.all_layers(np.concatenate([prompt, shape.routing(rng, shape.reply - 1)])) for _ in range(3)]
    cached = [written.sglang(shape, table, 0 if i == 0 else shape.prompt - 1) for i, table in enumerate(tables)]
    trace = read(tmp_path, "sglang", shape, cached)
    assert int((trace.phase == 0).sum()) == shape.prompt
    assert account_of(trace)["tokens_dropped"] == {"prompt shared with another choice": 2 * shape.prompt}
    # Without the cache each was computed, and counts.
    trace = read(tmp_path, "sglang", shape, [written.sglang(shape, table) for table in tables])
    assert int((trace.phase == 0).sum()) == 3 * shape.prompt


@drawn
@given(shape=shapes(), engine=ENGINES, data=st.data())
def test_padding_holes_and_rows_never_captured_are_dropped_by_cause(
    tmp_path_factory: pytest.TempPathFactory, shape: Shape, engine: str, data: st.DataObject
) -> None:
    rng = shape.rng()
    ids = shape.routing(rng)
    every = shape.all_layers(ids)
    kinds = ["padding", "nothing captured (rows of zeros)", "a choice missing (-1)", "captured in some layers only"]
    # With 256 experts a lone 255 of a uint8 is also an expert.
    lone = engine != "vllm" or shape.experts not in (256, 1 << 16)
    usable = [kind for kind in kinds if lone or kind != "a choice missing (-1)"]
    rows = data.draw(st.lists(st.integers(0, shape.rows - 1), unique=True, max_size=shape.rows - 3))
    causes = {row: data.draw(st.sampled_from(usable)) for row in rows}
    for row, cause in causes.items():
        layer = shape.moe_layers[int(rng.integers(len(shape.moe_layers)))]
        if cause == kinds[0]:
            every[row, shape.moe_layers] = -1
        elif cause == kinds[1]:
            every[row] = 0
        elif cause == kinds[2]:
            every[row, layer, rng.integers(shape.top_k)] = -1
        else:
            every[row, layer] = 0
    trace = read(tmp_path_factory.mktemp("a"), engine, shape, answer(engine, shape, every))
    holds(trace, shape, ids, [row for row in range(shape.rows) if row not in causes])
    expected = {kind: list(causes.values()).count(kind) for kind in kinds if kind in causes.values()}
    assert account_of(trace)["tokens_dropped"] == expected


@drawn
@given(shape=shapes(min_top_k=1, max_top_k=1, min_prompt=12), engine=ENGINES, data=st.data())
def test_with_one_choice_a_token(
    tmp_path_factory: pytest.TempPathFactory, shape: Shape, engine: str, data: st.DataObject
) -> None:
    ids = shape.routing(shape.rng())
    every = shape.all_layers(ids)
    padding = data.draw(st.sets(st.integers(0, shape.rows - 1), max_size=2))
    blank = data.draw(st.sets(st.integers(0, shape.rows - 1), max_size=2)) - padding
    every[np.ix_(sorted(padding), shape.moe_layers)] = -1
    every[sorted(blank)] = 0
    trace = read(tmp_path_factory.mktemp("a"), engine, shape, answer(engine, shape, every))
    holds(trace, shape, ids, [row for row in range(shape.rows) if row not in padding | blank])
    dropped = account_of(trace)["tokens_dropped"]
    assert dropped == {
        cause: len(rows) for cause, rows in (("padding", padding), ("nothing captured (rows of zeros)", blank)) if rows
    }


def test_one_choice_and_few_tokens_is_said_to_be_unsure(tmp_path: Path) -> None:
    shape = Shape(layers=4, dense=(1,), experts=16, top_k=1, prompt=3, reply=3, seed=1)
    every = shape.all_layers(shape.routing(shape.rng()) % 15 + 1)
    (tmp_path / "a.json").write_text(json.dumps(written.vllm(shape, [every])))
    trace = import_trace("vllm-routed-experts", tmp_path / "a.json", num_experts=16)
    assert trace.layer_ids == (0, 1, 2, 3)
    assert "layer 1: every token names expert 0" in trace.metadata["notes"]


def test_a_wrapped_padding_or_an_expert_is_asked_for(tmp_path: Path) -> None:
    shape = Shape(layers=6, dense=(), experts=64, top_k=2, prompt=8, reply=5, seed=1)
    every = shape.all_layers(shape.routing(shape.rng()))
    every[3, 2, 1] = 255
    (tmp_path / "a.json").write_text(json.dumps(written.vllm(shape, [every])))
    with pytest.raises(InputError, match=r"expert id = 255: may be an expert or padding.*give num_experts"):
        import_trace("vllm-routed-experts", tmp_path / "a.json")
    for experts, dropped in ((64, 1), (256, 0)):
        trace = import_trace("vllm-routed-experts", tmp_path / "a.json", num_experts=experts)
        assert isinstance(trace, RoutingTrace) and trace.num_tokens == shape.rows - dropped
    every[5] = 255  # padding for certain, so the lone one is too
    (tmp_path / "a.json").write_text(json.dumps(written.vllm(shape, [every])))
    trace = import_trace("vllm-routed-experts", tmp_path / "a.json")
    assert account_of(trace)["tokens_dropped"] == {"padding": 1, "a choice missing (-1)": 1} and trace.num_experts <= 64


@drawn
@given(shape=shapes(), told=st.booleans(), fused=st.integers(1, 2))
def test_a_fused_shared_expert_is_no_choice(
    tmp_path_factory: pytest.TempPathFactory, shape: Shape, told: bool, fused: int
) -> None:
    ids = shape.routing(shape.rng())
    fused = fused if told else 1  # two shared experts can only be told from the number of routed ones
    extra = np.broadcast_to(np.arange(shape.experts, shape.experts + fused), (*ids.shape[:2], fused))
    every = shape.all_layers(np.concatenate([ids, extra], axis=2))
    folder = tmp_path_factory.mktemp("a")
    trace = read(folder, "sglang", shape, written.sglang(shape, every), **({} if told else {"num_experts": None}))
    holds(trace, shape, ids, list(range(shape.rows)))
    assert "fused shared expert" in trace.metadata["notes"]
    wide = dataclasses.replace(shape, experts=600)
    every = shape.all_layers(ids)
    every[0, shape.moe_layers[0], 0] = 5000
    with pytest.raises(InputError, match="expert id"):  # one token with an id too large is a wrong number of experts
        read(folder, "sglang", wide, written.sglang(wide, every))


@drawn
@given(shape=shapes(), narrow=st.booleans())
def test_sglang_answers_in_a_narrower_type(
    tmp_path_factory: pytest.TempPathFactory, shape: Shape, narrow: bool
) -> None:
    ids = shape.routing(shape.rng())
    every = shape.all_layers(ids)
    every[1, shape.moe_layers] = -1
    dtype = np.uint8 if narrow and shape.experts <= 256 else np.uint16
    body = written.sglang(shape, every)
    body["meta_info"]["routed_experts"] = base64.b64encode(every.astype(dtype).tobytes()).decode()
    trace = read(tmp_path_factory.mktemp("a"), "sglang", shape, body)
    holds(trace, shape, ids, [0, *range(2, shape.rows)])
    assert account_of(trace)["tokens_dropped"] == {"padding": 1}


def test_layers_or_choices_told_wrongly_are_noticed(tmp_path: Path) -> None:
    shape = Shape(layers=6, dense=(0,), experts=16, top_k=4, prompt=8, reply=5, seed=5)
    (tmp_path / "a.json").write_text(json.dumps(written.sglang(shape, shape.all_layers(shape.routing(shape.rng())))))
    for layers, top_k in ((3, 4), (4, 6), (12, 4), (6, 2)):
        with pytest.raises(InputError):
            import_trace("sglang-routed-experts", tmp_path / "a.json", num_layers=layers, top_k=top_k, num_experts=16)


def test_answers_of_a_request_output_and_bare_arrays(tmp_path: Path) -> None:
    shape = Shape(layers=6, dense=(0,), experts=300, top_k=4, prompt=8, reply=5, seed=5)
    ids = shape.routing(shape.rng())
    table = shape.all_layers(ids).astype(np.uint16)
    np.save(tmp_path / "r.npy", table)
    np.savez(tmp_path / "r.npz", routed_experts=table, prompt_token_ids=np.arange(8), token_ids=np.arange(5))
    told: dict[str, Any] = {"num_experts": 300}
    for name, options in (
        ("r.npy", {"prompt_tokens": 8, "completion_tokens": 5}),
        ("r.npy", {"prompt_tokens": 8}),
        ("r.npz", {}),
    ):
        trace = import_trace("vllm-routed-experts", tmp_path / name, **told, **options)
        assert isinstance(trace, RoutingTrace)
        holds(trace, shape, ids, list(range(shape.rows)))
    with pytest.raises(InputError, match="prompt_tokens"):
        import_trace("vllm-routed-experts", tmp_path / "r.npy", **told)
    with pytest.raises(InputError, match="prompt_start=3"):
        import_trace("vllm-routed-experts", tmp_path / "r.npy", **told, prompt_tokens=11, completion_tokens=5)
    output = {
        "prompt_token_ids": list(range(8)),
        "outputs": [{"token_ids": list(range(5)), "routed_experts": table.tolist()}],
    }
    (tmp_path / "o.json").write_text(json.dumps(output))
    trace = import_trace("vllm-routed-experts", tmp_path / "o.json", **told)
    assert isinstance(trace, RoutingTrace)
    holds(trace, shape, ids, list(range(shape.rows)))
