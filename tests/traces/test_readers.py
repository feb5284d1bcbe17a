"""Every reader gives back what a generator wrote in the layout of the upstream project."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import traces_upstream as upstream
from moeplan.base.errors import InputError, UnknownName
from moeplan.traces.format import LoadProfile, RoutingTrace, load_recording, save_profile
from moeplan.traces.readers import READERS, import_trace, reader_options
from moeplan.traces.readers.account import account_of
from traces_upstream import MOE_LAYERS, NUM_EXPERTS, TOP_K

LOADS = Path(__file__).resolve().parents[3] / "shared" / "data" / "loads"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def routing(kind: str, path: Path, **options: Any) -> RoutingTrace:
    """Return what a reader gives, which must be routing."""
    trace = import_trace(kind, path, **options)
    assert isinstance(trace, RoutingTrace)
    return trace


def loads(kind: str, path: Path, **options: Any) -> LoadProfile:
    """Return what a reader gives, which must be loads and say so."""
    profile = import_trace(kind, path, **options)
    assert isinstance(profile, LoadProfile)
    assert profile.metadata["known"].startswith("counts only")
    return profile


def counted(rng: np.random.Generator, windows: int = 3) -> np.ndarray:
    """Return counts [windows, MoE layers, experts], none of the windows empty."""
    counts: np.ndarray = rng.integers(0, 50, (windows, len(MOE_LAYERS), NUM_EXPERTS))
    return counts


def same_counts(profile: LoadProfile, windows: np.ndarray, unit: str) -> None:
    """Assert counts, windows and layers of a profile."""
    assert np.array_equal(profile.counts, windows.sum(axis=0))
    assert profile.windows is not None and np.array_equal(profile.windows, windows)
    assert profile.window_unit == unit and profile.layer_ids == MOE_LAYERS


def same_requests(trace: RoutingTrace, requests: list[tuple[np.ndarray, int]]) -> None:
    """Assert that a trace holds these requests: (ids of each token from position 0, prompt length)."""
    assert trace.layer_ids == MOE_LAYERS and (trace.num_experts, trace.top_k) == (NUM_EXPERTS, TOP_K)
    assert trace.num_tokens == sum(len(ids) for ids, _ in requests)
    for number, (ids, prompt) in enumerate(requests):
        rows = trace.request == number
        assert np.array_equal(trace.experts[rows], ids)
        assert trace.position[rows].tolist() == list(range(len(ids)))
        assert trace.phase[rows].tolist() == [int(t >= prompt) for t in range(len(ids))]


def test_npz_columns_come_back_sorted(tmp_path: Path, rng: np.random.Generator) -> None:
    ids = upstream.choices(rng, 6)
    order = rng.permutation(6)
    seq, pos = np.array([0, 0, 0, 4, 4, 4]), np.array([0, 1, 2, 3, 4, 9])
    spec = np.full((6, len(MOE_LAYERS), 1, 2), -1, np.int16)
    spec[:, 1:, 0] = [3, 1]
    columns = {"experts": ids.astype(np.uint8), "seq": seq, "pos": pos, "phase": np.array([0, 0, 1, 0, 1, 1], np.int8)}
    columns |= {
        "weights": rng.random((6, 4, 2)).astype(np.float32),
        "spec": spec,
        "domain": np.array([1, 1, 1, 0, 0, 0]),
    }
    shuffled = {name: array[order] for name, array in columns.items()}
    meta = {"model": "m", "source": "s", "licence": "MIT", "experts": NUM_EXPERTS, "commit": "abc", "top_k": 2}
    upstream.npz(
        tmp_path / "t.npz", **shuffled, domain_names=np.array(["a", "b"]), layer_ids=np.arange(1, 5), meta=meta
    )
    trace = routing("npz", tmp_path / "t.npz")
    assert np.array_equal(trace.experts, ids) and trace.experts.dtype == np.uint8
    assert trace.request.tolist() == seq.tolist() and trace.position.tolist() == pos.tolist()
    assert trace.phase.tolist() == [0, 0, 1, 0, 1, 1] and trace.layer_ids == MOE_LAYERS
    assert np.array_equal(trace.weights, columns["weights"].astype(np.float16))
    assert np.array_equal(trace.predicted, spec)
    assert (trace.model, trace.source, trace.licence, trace.num_experts) == ("m", "s", "MIT", NUM_EXPERTS)
    assert trace.metadata == {
        "source.commit": "abc", "source.experts": "8", "source.top_k": "2",
        "domains": '{"names": ["a", "b"], "runs": [[0, 1], [4, 0]]}',
    }  # fmt: skip
    assert routing("npz", tmp_path / "t.npz", model="other").model == "other"


def test_npz_without_extras_and_with_mistakes(tmp_path: Path) -> None:
    base: dict[str, Any] = {"experts": np.array([[[0, 300]]]), "seq": np.array([0]), "pos": np.array([2])}
    upstream.npz(tmp_path / "t.npz", **base)
    trace = routing("npz", tmp_path / "t.npz")
    assert (trace.num_experts, trace.phase.tolist(), trace.experts.dtype) == (301, [1], np.uint16)
    for change, message in [
        ({"experts": np.array([[[0, -1]]])}, "experts = -1: expert ids must be 0 to"),
        ({"experts": np.array([[[0.0, 1.0]]])}, "experts = 'float64"),
        ({"experts": np.zeros((0, 1, 2), int)}, "zero tokens"),
        ({"seq": np.array([0, 1])}, "seq = .*one entry per token"),
        ({"pos": np.array([1 << 40])}, "pos = .*beyond int32"),
        ({"phase": np.array([3])}, "phase = "),
        ({"meta": [1]}, "meta = "),
        ({"meta": {"experts": 5}}, "experts = 300: expert ids must be 0 to 4"),
        ({"weights": np.array([[[1, 2]]])}, "weights = 'int64'"),
        ({"weights": np.array([[[1, np.nan]]])}, "weights must be finite"),
        ({"domain": np.array([0])}, "domain = 0"),
        ({"layer_ids": np.array([3, 4])}, "layer_ids"),
    ]:
        upstream.npz(tmp_path / "bad.npz", **(base | change))
        with pytest.raises(InputError, match=message):
            import_trace("npz", tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", **base, extra=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="not a plain number"):
        import_trace("npz", tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", seq=base["seq"])
    with pytest.raises(InputError, match="missing"):
        import_trace("npz", tmp_path / "bad.npz")


def test_an_archive_that_unpacks_beyond_its_budget_is_refused_unread(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", experts=np.zeros((1 << 22, 1, 1), np.uint8))
    assert (tmp_path / "bomb.npz").stat().st_size < 20_000
    with pytest.raises(InputError, match=r"unpacks to 4.00 MiB, more than the budget of 1.00 MiB"):
        import_trace("npz", tmp_path / "bomb.npz", max_bytes=1 << 20)


def test_sglang_stat(tmp_path: Path, rng: np.random.Generator) -> None:
    counts = counted(rng)
    upstream.sglang_stat(counts, tmp_path / "expert_distribution_recorder_1.5.pt")
    profile = loads("sglang-stat", tmp_path / "expert_distribution_recorder_1.5.pt", model="m", licence="l")
    same_counts(profile, counts, "forward pass")
    assert (profile.model, profile.licence, profile.metadata["dense_layers"]) == ("m", "l", "[0]")
    assert profile.source == "SGLang expert-distribution recorder, stat: expert_distribution_recorder_1.5.pt"
    upstream.sglang_stat(counts, tmp_path / "counts.json")
    profile = loads("sglang-stat", tmp_path / "counts.json")
    assert np.array_equal(profile.counts, counts.sum(axis=0)) and profile.windows is None
    (tmp_path / "steps.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    assert loads("sglang-stat", tmp_path / "steps.json").layer_ids == (0, 1, 2, 3)


def test_sglang_per_pass_adds_ranks_and_maps_slots(tmp_path: Path, rng: np.random.Generator) -> None:
    slots = upstream.slot_map(rng)
    windows = np.zeros((2, len(MOE_LAYERS), NUM_EXPERTS), np.int64)
    for rank in range(2):
        passes = []
        for number in range(2):
            ids = upstream.choices(rng, 5 + rank)
            passes.append({"physical": upstream.to_slots(rng, ids, slots), "positions": [0] * len(ids)})
            for layer in range(len(MOE_LAYERS)):
                windows[number, layer] += np.bincount(ids[:, layer].ravel(), minlength=NUM_EXPERTS)
        upstream.sglang_detail(
            passes, slots, tmp_path / f"expert_distribution_recorder_1_{rank}.pt", rank, per_token=False
        )
    same_counts(loads("sglang-per-pass", tmp_path), windows, "forward pass")
    one = loads("sglang-per-pass", tmp_path / "expert_distribution_recorder_1_0.pt")
    assert one.counts.sum() == 2 * 5 * TOP_K * len(MOE_LAYERS)
    assert int(one.counts.sum()) < int(windows.sum())


def test_sglang_per_token_links_requests_by_position(tmp_path: Path, rng: np.random.Generator) -> None:
    slots = upstream.slot_map(rng)
    requests = [(upstream.choices(rng, n), prompt) for n, prompt in ((9, 5), (7, 3), (12, 8), (2, 2))]
    passes = upstream.per_token_passes(rng, slots, requests, chunk=4)
    upstream.sglang_detail(passes, slots, tmp_path / "r_0.pt")
    trace = routing("sglang-per-token", tmp_path / "r_0.pt", model="m")
    same_requests(trace, requests)
    assert trace.metadata["requests"].startswith("linked by position") and trace.metadata["dense_layers"] == "[0]"
    assert "ambiguous_links" not in trace.metadata
    # A second rank that recorded the same tokens changes nothing; one with other tokens adds its requests.
    upstream.sglang_detail(passes, slots, tmp_path / "r_1.pt", rank=1)
    same_requests(routing("sglang-per-token", tmp_path), requests)
    more = [(upstream.choices(rng, 4), 2)]
    upstream.sglang_detail(upstream.per_token_passes(rng, slots, more, chunk=9), slots, tmp_path / "r_2.pt", rank=2)
    same_requests(routing("sglang-per-token", tmp_path), requests + more)


def test_sglang_per_token_says_when_links_are_ambiguous(tmp_path: Path, rng: np.random.Generator) -> None:
    slots = upstream.slot_map(rng)
    requests = [(upstream.choices(rng, 6), 3), (upstream.choices(rng, 6), 3)]  # same lengths: any order would fit
    upstream.sglang_detail(upstream.per_token_passes(rng, slots, requests, chunk=9), slots, tmp_path / "r.pt")
    trace = routing("sglang-per-token", tmp_path / "r.pt")
    same_requests(trace, requests)  # batch order resolves them rightly here
    assert int(trace.metadata["ambiguous_links"]) == 3  # and it says that it was a guess, once per step


def test_sglang_per_token_drops_tokens_with_holes(tmp_path: Path, rng: np.random.Generator) -> None:
    slots = upstream.slot_map(rng)
    ids = upstream.choices(rng, 3)
    physical = upstream.to_slots(rng, ids, slots)
    physical[1, 2, 1] = -1
    one = {"physical": physical, "positions": [0, 1, 2], "mode": 1, "lens": [3]}
    upstream.sglang_detail([one], slots, tmp_path / "r.pt")
    trace = routing("sglang-per-token", tmp_path / "r.pt")
    assert np.array_equal(trace.experts, ids[[0, 2]]) and trace.position.tolist() == [0, 2]
    assert account_of(trace)["tokens_dropped"] == {"a choice missing (-1)": 1}
    upstream.sglang_detail([one | {"mode": 5}], slots, tmp_path / "r.pt")
    with pytest.raises(InputError, match="forward_mode = 5"):
        import_trace("sglang-per-token", tmp_path / "r.pt")
    physical[1, 2, 1] = 12
    upstream.sglang_detail([], slots, tmp_path / "r.pt")
    with pytest.raises(InputError, match="zero tokens"):
        import_trace("sglang-per-token", tmp_path / "r.pt")


def test_sglang_routed_experts(tmp_path: Path, rng: np.random.Generator) -> None:
    requests = [(upstream.choices(rng, 7), 4), (upstream.choices(rng, 3), 2)]
    answers = [upstream.sglang_answer(ids, prompt, native=i == 0) for i, (ids, prompt) in enumerate(requests)]
    options = {"num_layers": 5, "top_k": TOP_K, "num_experts": NUM_EXPERTS}
    (tmp_path / "list.json").write_text(json.dumps(answers))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(answer) for answer in answers) + "\n")
    (tmp_path / "one.json").write_text(json.dumps(answers[0], indent=2))
    same_requests(routing("sglang-routed-experts", tmp_path / "list.json", **options), requests)
    same_requests(routing("sglang-routed-experts", tmp_path / "lines.jsonl", **options), requests)
    same_requests(routing("sglang-routed-experts", tmp_path / "one.json", **options), requests[:1])
    answers[0]["meta_info"] |= {
        "prompt_tokens": 2,
        "completion_tokens": 6,
    }  # the prompt's length is told, and overrides
    (tmp_path / "late.json").write_text(json.dumps(answers[0]))
    late = routing("sglang-routed-experts", tmp_path / "late.json", **options, start_len=10, prompt_tokens=12)
    assert late.position.tolist() == list(range(10, 17)) and late.phase.tolist() == [0, 0, 1, 1, 1, 1, 1]
    with pytest.raises(InputError, match="not a whole number of tokens of 3 layers"):
        import_trace("sglang-routed-experts", tmp_path / "one.json", num_layers=3, top_k=8)
    with pytest.raises(InputError, match="num_layers = 'missing'"):
        import_trace("sglang-routed-experts", tmp_path / "one.json", top_k=2)


def test_vllm_routed_experts_in_both_shapes(tmp_path: Path, rng: np.random.Generator) -> None:
    requests = [(upstream.choices(rng, 7), 4), (upstream.choices(rng, 3), 2)]
    (tmp_path / "new.json").write_text(json.dumps([upstream.vllm_answer(ids, prompt) for ids, prompt in requests]))
    old = [upstream.vllm_answer(ids, prompt, split=True) for ids, prompt in requests]
    (tmp_path / "old.jsonl").write_text("\n".join(map(json.dumps, old)))
    same_requests(routing("vllm-routed-experts", tmp_path / "new.json", num_experts=NUM_EXPERTS), requests)
    options: dict[str, Any] = {"num_experts": NUM_EXPERTS, "layer_ids": MOE_LAYERS}  # the old shape has MoE layers only
    same_requests(routing("vllm-routed-experts", tmp_path / "old.jsonl", **options), requests)
    np.save(tmp_path / "one.npy", upstream.with_dense_layer(requests[0][0]).astype(np.uint8))
    same_requests(routing("vllm-routed-experts", tmp_path / "one.npy", num_experts=8, prompt_tokens=4), requests[:1])
    answer = upstream.vllm_answer(*requests[0])
    del answer["usage"]
    (tmp_path / "short.json").write_text(json.dumps(answer))
    with pytest.raises(InputError, match="does not say how long the prompt was"):
        import_trace("vllm-routed-experts", tmp_path / "short.json")
    (tmp_path / "none.json").write_text('{"choices": [{"routed_experts": null}]}')
    with pytest.raises(InputError, match="no answer carries routed experts"):
        import_trace("vllm-routed-experts", tmp_path / "none.json")


def test_trtllm_adds_ranks(tmp_path: Path, rng: np.random.Generator) -> None:
    counts = counted(rng)
    upstream.trtllm(counts, tmp_path / "expert_statistic")
    profile = loads("trtllm", tmp_path / "expert_statistic")
    same_counts(profile, counts, "iteration")
    assert profile.top_k == TOP_K
    (tmp_path / "expert_statistic" / "rank0_raw.safetensors").write_bytes(b"not read")
    same_counts(loads("trtllm", tmp_path / "expert_statistic"), counts, "iteration")
    (tmp_path / "expert_statistic" / "meta_info.json").write_text('{"num_experts": 9, "num_experts_per_token": 2}')
    with pytest.raises(InputError, match="must hold 9 counts"):
        import_trace("trtllm", tmp_path / "expert_statistic")


def test_megatron_adds_microbatches_and_copies(tmp_path: Path, rng: np.random.Generator) -> None:
    counts = counted(rng, 2)
    upstream.megatron(counts, tmp_path / "tokens_per_expert")
    profile = loads("megatron", tmp_path / "tokens_per_expert", expert_parallel=2)
    same_counts(profile, counts, "iteration")
    assert profile.metadata["skipped_lines"] == "8"
    upstream.megatron(counts, tmp_path / "one", spread=1, copies=1)
    same_counts(loads("megatron", tmp_path / "one" / "rank0.jsonl"), counts, "iteration")
    (tmp_path / "one" / "rank1.jsonl").write_text('{"iter": 7, "block": "decoder", "layer": 1, "tpe": [[1, 2]]}\n')
    with pytest.raises(InputError, match=r"rank1.jsonl, line 1 = 2: must count 8 local experts"):
        import_trace("megatron", tmp_path / "one")


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_verl_drops_padding(suffix: str, tmp_path: Path, rng: np.random.Generator) -> None:
    requests = [(upstream.choices(rng, 7), 4), (upstream.choices(rng, 3), 2), (upstream.choices(rng, 8), 5)]
    upstream.verl(requests, tmp_path / f"batch{suffix}", prompt_len=6, response_len=5)
    same_requests(routing("verl", tmp_path / f"batch{suffix}", num_experts=NUM_EXPERTS), requests)
    if suffix == ".pt":
        upstream.torch_save({"batch": {"routed_experts": np.zeros((1, 2, 3, 4))}}, tmp_path / "bad.pt")
        with pytest.raises(InputError, match="attention_mask = 'missing'"):
            import_trace("verl", tmp_path / "bad.pt")


def test_llama_imatrix(tmp_path: Path, rng: np.random.Generator) -> None:
    counts = counted(rng)[0]
    upstream.imatrix(counts, tmp_path / "imatrix.gguf")
    profile = loads("llama-imatrix", tmp_path / "imatrix.gguf", top_k=2)
    assert np.array_equal(profile.counts, counts) and profile.layer_ids == MOE_LAYERS and profile.top_k == 2
    notes = {key: profile.metadata[key] for key in profile.metadata if key.startswith("imatrix")}
    assert notes == {
        "imatrix.chunk_count": "12",
        "imatrix.chunk_size": "512",
        "imatrix.datasets": '["calibration.txt"]',
    }
    raw = (tmp_path / "imatrix.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(raw[:-40])
    with pytest.raises(InputError, match="reaches beyond the end"):
        import_trace("llama-imatrix", tmp_path / "cut.gguf")
    (tmp_path / "old.gguf").write_bytes(raw[:4] + b"\x01" + raw[5:])
    with pytest.raises(InputError, match="version 1 is not 2 or 3"):
        import_trace("llama-imatrix", tmp_path / "old.gguf")


def test_llama_csv_with_and_without_top_k(tmp_path: Path, rng: np.random.Generator) -> None:
    ids = upstream.choices(rng, 9)
    upstream.llama_csv(ids, tmp_path / "t.csv", batches=[4, 2, 1, 1, 1])
    same_requests(routing("llama-csv", tmp_path / "t.csv", top_k=TOP_K, num_experts=NUM_EXPERTS), [(ids, 6)])
    profile = loads("llama-csv", tmp_path / "t.csv", num_experts=NUM_EXPERTS)
    expected = [np.bincount(ids[:, layer].ravel(), minlength=NUM_EXPERTS) for layer in range(len(MOE_LAYERS))]
    assert np.array_equal(profile.counts, expected) and profile.layer_ids == MOE_LAYERS
    # Prompt batches whose last layer ran for the last token only: that token is what can be known.
    upstream.llama_csv(ids, tmp_path / "t.csv", batches=[4, 2, 1, 1, 1], last_layer_tokens=[1, 1, 1, 1, 1])
    trace = routing("llama-csv", tmp_path / "t.csv", top_k=TOP_K, num_experts=NUM_EXPERTS)
    assert np.array_equal(trace.experts, ids[[3, 5, 6, 7, 8]]) and trace.position.tolist() == [3, 5, 6, 7, 8]
    assert trace.metadata["lost_tokens"].startswith("4 prompt tokens")
    decode = routing("llama-csv", tmp_path / "t.csv", top_k=TOP_K, num_experts=NUM_EXPERTS, decode_only=True)
    assert np.array_equal(decode.experts, ids[6:]) and decode.phase.tolist() == [1, 1, 1]
    for text, message in [
        ("layer,expert\n1,2\n1,x\n", "line = '1,x'"),
        ("layer,expert\n1,2\n1,-3\n", "line = '1,-3'"),
        ("layer,expert\n", "has no rows"),
        ("1,2\n1,3\n2,0\n", "rows of a layer are not whole tokens"),
        ("1,2\n1,3\n2,0\n2,1\n1,0\n1,1\n", "every batch must list every layer once"),
        ("1,70000\n", "layer, expert = "),
    ]:
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            import_trace("llama-csv", tmp_path / "bad.csv", top_k=2)


def test_moe_infinity(tmp_path: Path, rng: np.random.Generator) -> None:
    counts = counted(rng)
    upstream.moe_infinity(counts, tmp_path / "trace.npy")
    profile = loads("moe-infinity", tmp_path / "trace.npy", layer_ids=MOE_LAYERS)
    same_counts(profile, counts, "request")
    np.save(tmp_path / "bad.npy", counts + 0.5)
    with pytest.raises(InputError, match="whole numbers"):
        import_trace("moe-infinity", tmp_path / "bad.npy")
    np.save(tmp_path / "bad.npy", counts[0])
    with pytest.raises(InputError, match="num_sequences"):
        import_trace("moe-infinity", tmp_path / "bad.npy")


def test_wrong_kinds_and_options_name_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'sglang-stat'"):
        import_trace("sglang_stat", "x")
    with pytest.raises(UnknownName, match="did you mean 'model'"):
        import_trace("npz", "x", modell="m")
    with pytest.raises(UnknownName):
        reader_options("nothing")
    assert reader_options("llama-csv")["top_k"] is None
    assert len(READERS) == len(set(READERS)) >= 12


def test_readers_do_not_import_torch_and_say_when_it_is_missing(tmp_path: Path) -> None:
    upstream.sglang_stat(np.ones((1, 4, 8), int), tmp_path / "stat.pt")
    script = (
        "import sys; import moeplan.traces.readers as readers; assert 'torch' not in sys.modules\n"
        "sys.modules['torch'] = None\n"
        "from moeplan.base.errors import InputError\n"
        "try: readers.import_trace('sglang-stat', sys.argv[1])\n"
        "except InputError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "stat.pt")],
        env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "needs torch, which is not installed; install moeplan[run]" in done.stdout


@pytest.mark.skipif(not LOADS.is_dir(), reason="no recordings beside this checkout")
def test_recorded_loads_import_and_save(tmp_path: Path) -> None:
    files = sorted(LOADS.glob("*.json"))
    assert len(files) == 6
    for file in files:
        profile = loads("sglang-stat", file, model="deepseek-r1")
        assert profile.counts.shape == (58, 256) and profile.layer_ids == tuple(range(3, 61))
        assert profile.metadata["dense_layers"] == "[0, 1, 2]"
        assert int(profile.counts.sum()) == int(sum(map(sum, json.loads(file.read_text())["logical_count"])))
        save_profile(profile, tmp_path / "p.safetensors")
        back = load_recording(tmp_path / "p.safetensors")
        assert isinstance(back, LoadProfile) and np.array_equal(back.counts, profile.counts)
