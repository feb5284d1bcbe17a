"""Parts of a recording that are not the whole: ranks, turns, draft layers, layers that were skipped or numbered otherwise."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import traces_upstream as upstream
from moeplan.base.errors import InputError
from moeplan.specs.models.load import load_model
from moeplan.traces.match import check_layers
from moeplan.traces.readers import import_trace, option_values
from moeplan.traces.readers.account import account_of
from moeplan.traces.recording import LoadProfile, RoutingTrace
from recorded_answers import Shape, shapes

EXAMPLES = 100 if os.environ.get("MOEPLAN_LONG") == "1" else 8
drawn = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
CASES = Path(__file__).resolve().parents[4] / "shared" / "data" / "cases"


def loads(kind: str, path: Path, **options: Any) -> LoadProfile:
    profile = import_trace(kind, path, **options)
    assert isinstance(profile, LoadProfile)
    return profile


def routing(kind: str, path: Path, **options: Any) -> RoutingTrace:
    trace = import_trace(kind, path, **options)
    assert isinstance(trace, RoutingTrace)
    return trace


def dump(folder: Path, rank: int, slots: np.ndarray, passes: list[np.ndarray]) -> Path:
    """Write a `per_pass` dump of one rank: counts [layers, slots] of each pass."""
    records = [
        {
            "forward_pass_id": i,
            "rank": rank,
            "gatherer_key": "primary",
            "global_physical_count": counts.astype(np.int32),
        }
        for i, counts in enumerate(passes)
    ]
    folder.mkdir(exist_ok=True)
    path = folder / f"expert_distribution_recorder_17.{rank}_{rank}.pt"
    upstream.torch_save({"records": records, "last_physical_to_logical_map": slots.astype(np.int64)}, path)
    return path


@drawn
@given(
    ranks=st.sampled_from([2, 4, 8]), local=st.integers(1, 6), layers=st.integers(2, 5), redundant=st.booleans(),
    seed=st.integers(0, 1 << 20), data=st.data(),
)  # fmt: skip
def test_a_rank_that_counts_only_its_own_slots_needs_the_others(
    tmp_path_factory: pytest.TempPathFactory,
    ranks: int,
    local: int,
    layers: int,
    redundant: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    rng = np.random.default_rng(seed)
    num_slots = ranks * local
    experts = num_slots - (1 if redundant and num_slots > 2 else 0)
    slots = np.stack([rng.permutation(np.arange(num_slots) % experts) for _ in range(layers)])
    whole = rng.integers(1, 60, (3, layers, num_slots))
    whole[:, 0] = 0  # a dense layer
    folder = tmp_path_factory.mktemp("d")
    for rank in range(ranks):
        own = np.zeros_like(whole)
        block = slice(rank * local, (rank + 1) * local)
        own[:, :, block] = whole[:, :, block]
        dump(folder / "low_latency", rank, slots, list(own))
        dump(folder / "tensor_parallel", rank, slots, list(whole))
        dump(folder / "data_parallel", rank, slots, list(whole + (rank * (whole > 0))))
    truth = np.zeros((layers, experts), int)
    np.add.at(truth, (np.arange(layers)[:, None], slots), whole.sum(axis=0))
    assert np.array_equal(loads("sglang-per-pass", folder / "low_latency").counts, truth[1:])
    once = loads("sglang-per-pass", folder / "tensor_parallel")
    assert np.array_equal(once.counts, truth[1:]) and "read once" in once.metadata["notes"]
    added = loads("sglang-per-pass", folder / "data_parallel").counts
    assert int(added.sum()) > ranks * int(truth.sum())
    files = sorted((folder / "low_latency").iterdir())
    alone = data.draw(st.sampled_from(files))
    with pytest.raises(InputError, match="a rank's part"):
        loads("sglang-per-pass", alone)
    alone.unlink()
    with pytest.raises(InputError, match="a rank's part"):
        loads("sglang-per-pass", folder / "low_latency")
    # A full count on one rank stands for itself.
    assert np.array_equal(loads("sglang-per-pass", folder / "tensor_parallel" / files[0].name).counts, truth[1:])


def test_ranks_of_megatron_and_tensorrt(tmp_path: Path) -> None:
    counts = np.random.default_rng(1).integers(1, 50, (2, len(upstream.MOE_LAYERS), 8))
    upstream.megatron(counts, tmp_path / "m", spread=4, copies=1)
    profile = loads("megatron", tmp_path / "m", expert_parallel=4)
    assert np.array_equal(profile.counts, counts.sum(axis=0)) and "draft (MTP)" in profile.metadata["notes"]
    assert "give expert_parallel" in loads("megatron", tmp_path / "m").metadata["notes"]
    with pytest.raises(InputError, match="one rank counts only its own experts"):
        loads("megatron", tmp_path / "m" / "rank0.jsonl")
    (tmp_path / "m" / "rank2.jsonl").unlink()
    for options in ({"expert_parallel": 4}, {}):
        with pytest.raises(InputError, match=r"is missing|only its own"):
            loads("megatron", tmp_path / "m", **options)
    upstream.trtllm(counts, tmp_path / "t")
    for rank in (1, 2, 4):
        (tmp_path / "t" / f"rank{rank}.safetensors").write_bytes((tmp_path / "t" / "rank0.safetensors").read_bytes())
    profile = loads("trtllm", tmp_path / "t")
    assert int(profile.counts.sum()) <= int(counts.sum() + counts.size) // 2
    notes = profile.metadata["notes"]
    assert "read once" in notes and "no file of rank 3" in notes


@drawn
@given(
    shape=shapes(), suffix=st.sampled_from([".pt", ".npz"]), seed=st.integers(0, 1 << 20),
    turns=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    pad=st.sampled_from([0, -1]),
)  # fmt: skip
def test_a_tools_answer_is_prefill(
    tmp_path_factory: pytest.TempPathFactory,
    shape: Shape,
    suffix: str,
    seed: int,
    turns: list[tuple[int, int]],
    pad: int,
) -> None:
    """turns: (generated tokens, tool tokens after them); the last turn's tool tokens are not there."""
    rng = np.random.default_rng(seed)
    generated = np.concatenate([np.r_[np.ones(own), np.zeros(tool)] for own, tool in turns])[: -turns[-1][1]]
    response = len(generated)
    prompts = [3, 5]
    left, right = max(prompts), response + 2
    experts = np.zeros((len(prompts), left + right, shape.layers, shape.top_k), np.int32)
    mask = np.zeros((len(prompts), left + right), int)
    own_mask = np.zeros((len(prompts), right), int)
    rows = []
    for i, prompt in enumerate(prompts):
        ids = shape.routing(rng, prompt + response - 1)
        experts[i, left - prompt : left + response - 1] = shape.all_layers(ids)
        experts[i, left + response :] = pad
        mask[i, left - prompt : left + response] = 1
        own_mask[i, :response] = generated
        rows.append(ids)
    batch = {
        "routed_experts": experts,
        "attention_mask": mask,
        "responses": np.ones((2, right), int),
        "response_mask": own_mask,
    }
    path = tmp_path_factory.mktemp("v") / f"batch{suffix}"
    np.savez(path, **batch) if suffix == ".npz" else upstream.torch_save(batch, path)
    trace = routing("verl", path, num_experts=shape.experts)
    assert np.array_equal(trace.experts, np.concatenate(rows))
    phases = [[0] * prompt + generated[:-1].astype(int).tolist() for prompt in prompts]
    assert trace.phase.tolist() == [phase for one in phases for phase in one]
    assert trace.position.tolist() == [p for ids in rows for p in range(len(ids))]
    assert int(trace.request[-1]) + 1 == 2 * len(turns) - 2 * (len(turns) > 1 and len(generated) == 0)
    assert account_of(trace)["tokens_dropped"] == {"last sampled token (never ran)": 2}
    assert account_of(trace)["tokens_read"] == trace.num_tokens + 2


@drawn
@given(shape=shapes(max_top_k=6), first=st.integers(0, 3), seed=st.integers(0, 1 << 20))
def test_padding_of_captured_graphs_and_fused_experts_in_token_dumps(
    tmp_path_factory: pytest.TempPathFactory, shape: Shape, first: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    ids = shape.routing(rng)
    slots = np.stack([rng.permutation(shape.experts) for _ in range(shape.layers)])
    where = np.argsort(slots, axis=1)
    tokens = np.full((shape.layers, shape.rows + first, 8), -1, np.int32)  # the recorder's width is fixed at 8
    for column, layer in enumerate(shape.moe_layers):
        tokens[layer, : shape.rows, : shape.top_k] = where[layer][ids[:, column]]
        tokens[layer, : shape.rows, shape.top_k] = shape.experts  # a fused shared expert comes after the last slot
    record = {
        "forward_pass_id": 1, "rank": 0, "gatherer_key": "primary", "topk_ids_of_layer": tokens, "forward_mode": 1,
        "positions": [*range(shape.rows), *[0] * first], "extend_seq_lens": [shape.rows],
    }  # fmt: skip
    path = tmp_path_factory.mktemp("t") / "r_0.pt"
    upstream.torch_save({"records": [record], "last_physical_to_logical_map": slots}, path)
    trace = routing("sglang-per-token", path)
    assert np.array_equal(trace.experts, ids) and trace.layer_ids == tuple(shape.moe_layers)
    assert trace.num_experts == shape.experts and account_of(trace)["tokens_dropped"] == (
        {"padding": first} if first else {}
    )
    notes = trace.metadata["notes"]
    assert "fused shared expert" in notes and ("padding in every token" in notes) == (shape.top_k < 7)


def test_draft_layers_are_left_out_of_any_recording(tmp_path: Path) -> None:
    counts = np.random.default_rng(1).integers(1, 50, (2, len(upstream.MOE_LAYERS), 8))
    upstream.trtllm(counts, tmp_path / "t")
    whole = loads("trtllm", tmp_path / "t")
    kept = loads("trtllm", tmp_path / "t", hidden_layers=4)
    assert kept.layer_ids == whole.layer_ids[:-1] and np.array_equal(kept.counts, whole.counts[:-1])
    assert kept.windows is not None and kept.windows.shape[1] == 3 and kept.metadata["draft_layers"] == "[4]"
    assert "layer 4 lies beyond the model's 4 layers (draft, MTP), left out" in kept.metadata["notes"]
    with pytest.raises(InputError, match="hidden_layers = 1"):
        loads("trtllm", tmp_path / "t", hidden_layers=1)
    ids = upstream.choices(np.random.default_rng(2), 4)
    np.savez(tmp_path / "n.npz", experts=ids, seq=np.zeros(4, int), pos=np.arange(4))
    assert routing("npz", tmp_path / "n.npz", hidden_layers=3).layer_ids == (0, 1, 2)


def test_a_recording_that_meets_a_model_names_its_layers() -> None:
    model = load_model("deepseek-v2-lite")  # 27 layers, the first dense
    for fine in (range(1, 27), range(26), range(2, 28)):
        check_layers(model, list(fine))
    wrong: dict[tuple[int, ...], str] = {
        tuple(layer for layer in range(1, 27) if layer != 17): "layer 17 is not in the recording",
        tuple(layer for layer in range(2, 28) if layer not in (9, 10)): "layer 8–9 is not in the recording",
        tuple(range(1, 28)): "layer 27 is none of its MoE layers.*hidden_layers=27",
        (*range(1, 17), *range(18, 28)): "layer 17 of deepseek-v2-lite is not in it, and layer 27 is not the model's",
        tuple(range(10)): "has 26",
    }
    for layers, message in wrong.items():
        with pytest.raises(InputError, match=message):
            check_layers(model, list(layers))


def test_options_are_what_the_reader_takes() -> None:
    assert option_values("vllm-routed-experts", {"layer_ids": "1,3, 5-7", "num_experts": "16", "model": "8"}) == {
        "layer_ids": [1, 3, 5, 6, 7], "num_experts": 16, "model": "8",
    }  # fmt: skip
    assert option_values("llama-csv", {"decode_only": "true", "hidden_layers": "4"}) == {
        "decode_only": True,
        "hidden_layers": 4,
    }
    for kind, name, text in (
        ("llama-csv", "top_k", "1,2"), ("llama-csv", "top_k", "9" * 5000), ("llama-csv", "decode_only", "maybe"),
        ("verl", "layer_ids", "1-x"), ("verl", "layer_ids", "5-2"), ("verl", "layer_ids", "0-99999999"), ("verl", "layer_ids", ""),
        ("verl", "nothing", "1"),
    ):  # fmt: skip
        with pytest.raises(InputError):
            option_values(kind, {name: text})


@pytest.mark.skipif(not CASES.is_dir(), reason="no recordings beside this checkout")
def test_recordings_as_engines_wrote_them(tmp_path: Path) -> None:
    sglang = {"num_layers": 6, "num_experts": 16, "top_k": 4}
    told: list[tuple[str, str, dict[str, Any], int, list[int], dict[str, int]]] = [
        ("sgl-ok/a.json", "sglang-routed-experts", sglang, 12, list(range(12)), {}),
        ("sgl-minus1/a.json", "sglang-routed-experts", sglang, 12, [0, 1, *range(3, 12)], {"a choice missing (-1)": 1}),
        ("sgl-prefix-cache-zeros/a.json", "sglang-routed-experts", sglang, 12, list(range(5, 12)),
         {"nothing captured (rows of zeros)": 5}),
        ("vllm-ok/a.json", "vllm-routed-experts", {"num_experts": 16}, 12, list(range(12)), {}),
        ("vllm-n2/a.json", "vllm-routed-experts", {"num_experts": 16}, 24, [*range(12), *range(8, 12)],
         {"prompt shared with another choice": 8}),
        ("vllm-prefix-omitted/a.json", "vllm-routed-experts", {"num_experts": 16}, 7, list(range(5, 12)), {}),
    ]  # fmt: skip
    for name, kind, options, read, positions, dropped in told:
        trace = routing(kind, CASES / name, **options)
        account = account_of(trace)
        assert (account["tokens_read"], account["tokens_dropped"]) == (read, dropped), name
        assert trace.position.tolist() == positions
        assert trace.phase.tolist() == [int(p >= 8) for p in positions]
    assert routing("vllm-routed-experts", CASES / "vllm-ok/a.json", num_experts=16).layer_ids == (1, 2, 3, 4, 5)
    rollouts = routing("verl", CASES / "verl-multiturn-tools/batch.pt")
    prompts = ([0] * 4, [0] * 6)
    expected = [phase for prompt in prompts for phase in [*prompt, 1, 1, 1, 0, 0, 0, 0, 1, 1]]
    assert rollouts.phase.tolist() == expected
    ranks = CASES / "deepep-ll-one-rank"
    assert int(loads("sglang-per-pass", ranks).counts.sum()) == 8914
    with pytest.raises(InputError, match=r"slots 0–3 of 16, a rank's part"):
        loads("sglang-per-pass", next(ranks.glob("*_0.pt")))
    profile = loads("llama-imatrix", CASES / "imatrix-missing-layer/i.gguf")
    with pytest.raises(InputError, match="layer 17 is not in the recording"):
        check_layers(load_model("deepseek-v2-lite"), profile.layer_ids)
    profile = loads("megatron", CASES / "megatron", expert_parallel=2)
    assert (profile.num_experts, profile.num_layers) == (16, 3)
    assert json.loads(profile.metadata["notes"]) == ["4 lines of draft (MTP) layers left out"]
