"""One recording for each reader, to be damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import traces_upstream as upstream
from moeplan.traces.convert import convert
from moeplan.traces.readers import import_trace

RNG_SEED = 5


def _npz(folder: Path, rng: np.random.Generator) -> Path:
    ids = upstream.choices(rng, 6).astype(np.uint8)
    spec = np.full((6, 4, 1, 2), -1, np.int16)
    columns: dict[str, Any] = {"experts": ids, "seq": np.arange(6) // 3, "pos": np.arange(6) % 3, "spec": spec}
    columns |= {"weights": rng.random((6, 4, 2)).astype(np.float16), "domain": np.arange(6) // 3}
    upstream.npz(folder / "t.npz", **columns, domain_names=np.array(["a", "b"]), meta={"experts": 8, "model": "m"})
    return folder / "t.npz"


def _per_token(folder: Path, rng: np.random.Generator) -> Path:
    slots = upstream.slot_map(rng)
    requests = [(upstream.choices(rng, 5), 3), (upstream.choices(rng, 4), 2)]
    upstream.sglang_detail(upstream.per_token_passes(rng, slots, requests, chunk=2), slots, folder / "r_0.pt")
    return folder


def _per_pass(folder: Path, rng: np.random.Generator) -> Path:
    slots = upstream.slot_map(rng)
    passes = [{"physical": upstream.to_slots(rng, upstream.choices(rng, 4), slots), "positions": []} for _ in range(2)]
    upstream.sglang_detail(passes, slots, folder / "r_0.pt", per_token=False)
    return folder


def _counts(write: Callable[[np.ndarray, Path], None], name: str) -> Callable[[Path, np.random.Generator], Path]:
    def make(folder: Path, rng: np.random.Generator) -> Path:
        write(rng.integers(0, 9, (2, 4, 8)), folder / name)
        return folder / name

    return make


def _loads(folder: Path, rng: np.random.Generator) -> Path:
    held = [rng.permutation(8).tolist() for _ in range(4)]
    records = [
        {"record_type": "eplb_load_stats", "version": 1, "step": step, "num_ranks": 2,
         "expert_load": rng.integers(1, 9, (4, 8)).tolist(), "p2l_map": held}
        for step in range(2)
    ]  # fmt: skip
    (folder / "loads.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder / "loads.jsonl"


def _answers(write: Callable[..., dict[str, Any]], **options: Any) -> Callable[[Path, np.random.Generator], Path]:
    def make(folder: Path, rng: np.random.Generator) -> Path:
        answers = [write(upstream.choices(rng, 4), 2, **options) for _ in range(2)]
        (folder / "answers.json").write_text(json.dumps(answers))
        return folder / "answers.json"

    return make


def _verl(suffix: str) -> Callable[[Path, np.random.Generator], Path]:
    def make(folder: Path, rng: np.random.Generator) -> Path:
        upstream.verl([(upstream.choices(rng, 4), 2)], folder / f"batch{suffix}", 3, 3)
        return folder / f"batch{suffix}"

    return make


def _csv(folder: Path, rng: np.random.Generator) -> Path:
    upstream.llama_csv(upstream.choices(rng, 4), folder / "t.csv", [2, 1, 1])
    return folder / "t.csv"


def _imatrix(folder: Path, rng: np.random.Generator) -> Path:
    upstream.imatrix(rng.integers(0, 9, (4, 8)), folder / "m.gguf")
    return folder / "m.gguf"


def _rows(style: str) -> Callable[[Path, np.random.Generator], Path]:
    def make(folder: Path, rng: np.random.Generator) -> Path:
        ids = upstream.choices(rng, 3)
        rows = [(0, t, layer, *ids[t, layer]) for t in range(3) for layer in range(4)]
        if style == "csv":
            text = "request,token,layer,expert_0,expert_1\n" + "\n".join(",".join(map(str, row)) for row in rows) + "\n"
            (folder / "t.csv").write_text(text)
            return folder / "t.csv"
        objects = [{"request": r, "token": t, "layer": n, "experts": [int(a), int(b)]} for r, t, n, a, b in rows]
        if style == "parquet":
            pq.write_table(pa.Table.from_pylist(objects), folder / "t.parquet")
            return folder / "t.parquet"
        (folder / "t.jsonl").write_text("\n".join(map(json.dumps, objects)) + "\n")
        return folder / "t.jsonl"

    return make


def _converted(folder: Path, rng: np.random.Generator) -> Path:
    convert(import_trace("npz", _npz(folder, rng)), "parquet", folder / "c.parquet")
    (folder / "t.npz").unlink()
    return folder / "c.parquet"


def _logits(folder: Path, rng: np.random.Generator) -> Path:
    upstream.torch_save({"router_logits": [rng.random((4, 8)).astype(np.float32) for _ in range(3)]}, folder / "l.pt")
    return folder / "l.pt"


def _layers(folder: Path, rng: np.random.Generator) -> Path:
    for layer in range(3):
        np.save(folder / f"layer{layer}.npy", upstream.choices(rng, 4)[:, layer])
    return folder


CASES: dict[str, tuple[str, Callable[[Path, np.random.Generator], Path], dict[str, Any]]] = {
    "npz": ("npz", _npz, {}),
    "sglang-stat": ("sglang-stat", _counts(upstream.sglang_stat, "s.pt"), {}),
    "sglang-stat-json": ("sglang-stat", _counts(upstream.sglang_stat, "s.json"), {}),
    "sglang-per-pass": ("sglang-per-pass", _per_pass, {}),
    "sglang-per-token": ("sglang-per-token", _per_token, {}),
    "sglang-routed-experts": ("sglang-routed-experts", _answers(upstream.sglang_answer), {"num_layers": 5, "top_k": 2}),
    "vllm-routed-experts": ("vllm-routed-experts", _answers(upstream.vllm_answer), {}),
    "vllm-routed-experts-split": ("vllm-routed-experts", _answers(upstream.vllm_answer, split=True), {}),
    "trtllm": ("trtllm", _counts(upstream.trtllm, "stat"), {}),
    "megatron": ("megatron", _counts(upstream.megatron, "tpe"), {"expert_parallel": 2}),
    "verl": ("verl", _verl(".pt"), {}),
    "verl-npz": ("verl", _verl(".npz"), {}),
    "llama-imatrix": ("llama-imatrix", _imatrix, {}),
    "llama-csv": ("llama-csv", _csv, {"top_k": 2}),
    "llama-csv-loads": ("llama-csv", _csv, {}),
    "jsonl": ("jsonl", _rows("jsonl"), {"num_experts": 8}),
    "csv": ("csv", _rows("csv"), {"num_experts": 8}),
    "parquet": ("parquet", _rows("parquet"), {"num_experts": 8}),
    "parquet-converted": ("parquet", _converted, {}),
    "npy": ("npy", _layers, {}),
    "hf-router-logits": ("hf-router-logits", _logits, {"top_k": 2}),
    "moe-infinity": ("moe-infinity", _counts(upstream.moe_infinity, "t.npy"), {}),
    "vllm-eplb-stats": ("vllm-eplb-stats", _loads, {}),
}
