"""Writers that lay files out as the upstream projects do; each takes what a reader should give back.

The layouts were read from the sources named in each docstring; nothing of those projects is needed to run this.
"""

from __future__ import annotations

import base64
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

# One made-up model: 5 hidden layers of which 0 is dense, 8 logical experts, top 2.
NUM_LAYERS, DENSE, NUM_EXPERTS, TOP_K = 5, 0, 8, 2
MOE_LAYERS = tuple(range(1, NUM_LAYERS))


def choices(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """Return distinct expert ids [tokens, MoE layers, TOP_K], never all zero in a layer."""
    keys = rng.random((tokens, len(MOE_LAYERS), NUM_EXPERTS))
    return np.argsort(keys, axis=2)[:, :, :TOP_K].astype(np.int32)


def with_dense_layer(ids: np.ndarray, fill: int = 0) -> np.ndarray:
    """Return [tokens, NUM_LAYERS, k] with `fill` in the dense layer."""
    dense = np.full((len(ids), 1, ids.shape[2]), fill, ids.dtype)
    return np.concatenate([dense, ids], axis=1)


def torch_save(content: Any, path: Path) -> None:
    """Write with torch.save; numpy arrays become tensors."""
    import torch

    def tensors(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value.copy())
        if isinstance(value, dict):
            return {key: tensors(inner) for key, inner in value.items()}
        return [tensors(inner) for inner in value] if isinstance(value, list) else value

    torch.save(tensors(content), path)


def sglang_stat(counts: np.ndarray, path: Path, buffer_size: int = 6) -> None:
    """`_StatAccumulator.dump`: logical_count int32 [buffered_steps, num_layers, experts], unused steps all zero.

    counts: [steps, MoE layers, experts]; a path ending in .json gets the summed counts as JSON numbers instead.
    """
    every = np.zeros((max(buffer_size, len(counts)), NUM_LAYERS, counts.shape[2]), np.int32)
    every[: len(counts), 1:] = counts
    if path.suffix == ".json":
        path.write_text(json.dumps({"logical_count": every.sum(axis=0).astype(float).tolist()}))
    else:
        torch_save({"rank": 0, "logical_count": every, "average_utilization_rate_over_window": None}, path)


def slot_map(rng: np.random.Generator, num_slots: int = 12) -> np.ndarray:
    """Return physical → logical [NUM_LAYERS, num_slots]: every expert once and some twice, shuffled per layer."""
    base = np.arange(num_slots) % NUM_EXPERTS
    return np.stack([rng.permutation(base) for _ in range(NUM_LAYERS)]).astype(np.int64)


def to_slots(rng: np.random.Generator, ids: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Return physical ids [tokens, NUM_LAYERS, k]: any replica of each logical expert; −1 in the dense layer."""
    physical = np.full((len(ids), NUM_LAYERS, ids.shape[2]), -1, np.int32)
    for t, layer, j in np.ndindex(len(ids), len(MOE_LAYERS), ids.shape[2]):
        physical[t, layer + 1, j] = rng.choice(np.flatnonzero(slots[layer + 1] == ids[t, layer, j]))
    return physical


def slot_counts(physical: np.ndarray, num_slots: int) -> np.ndarray:
    """Return tokens per physical expert [NUM_LAYERS, num_slots], −1 not counted."""
    counts = np.zeros((NUM_LAYERS, num_slots), np.int32)
    for layer in range(NUM_LAYERS):
        ids = physical[:, layer].ravel()
        counts[layer] = np.bincount(ids[ids >= 0], minlength=num_slots)
    return counts


def sglang_detail(
    passes: list[dict[str, Any]], slots: np.ndarray, path: Path, rank: int = 0, per_token: bool = True
) -> None:
    """`_DetailAccumulator.dump`: records of one rank.

    A pass has `physical` [tokens, NUM_LAYERS, k], `positions`, `mode` and `lens`.
    """
    records = []
    for number, one in enumerate(passes):
        record: dict[str, Any] = {"forward_pass_id": 10 + number, "rank": rank, "gatherer_key": "primary"}
        record["global_physical_count"] = slot_counts(one["physical"], slots.shape[1])
        if per_token:
            padded = np.full((NUM_LAYERS, len(one["positions"]), 8), -1, np.int32)  # the recorder's width is fixed at 8
            padded[:, :, : one["physical"].shape[2]] = one["physical"].transpose(1, 0, 2)
            record |= {"input_ids": [5] * len(one["positions"]), "positions": list(one["positions"])}
            record |= {"extend_seq_lens": one["lens"], "forward_mode": one["mode"]}
            record |= {"topk_ids_of_layer": padded, "misc_objects": []}
        records.append(record)
    torch_save({"records": records, "last_physical_to_logical_map": slots}, path)


def per_token_passes(
    rng: np.random.Generator, slots: np.ndarray, requests: list[tuple[np.ndarray, int]], chunk: int
) -> list[dict[str, Any]]:
    """Return passes of a server that prefills requests one by one in chunks, then decodes all of them together."""

    def one(pieces: list[tuple[int, int, int]], mode: int) -> dict[str, Any]:
        ids = np.concatenate([requests[r][0][a:b] for r, a, b in pieces])
        physical = to_slots(rng, ids, slots)
        positions = [p for _, a, b in pieces for p in range(a, b)]
        lens = [b - a for _, a, b in pieces] if mode == 1 else None
        # A padded row at the end, as a captured graph has: no expert anywhere.
        physical = np.concatenate([physical, np.full_like(physical[:1], -1)]) if mode == 2 else physical
        return {"physical": physical, "positions": positions + [0] * (mode == 2), "mode": mode, "lens": lens}

    passes = []
    for r, (_, prompt) in enumerate(requests):
        for start in range(0, prompt, chunk):
            passes.append(one([(r, start, min(prompt, start + chunk))], 1))
    step = 0
    while True:
        running = [(r, p + step, p + step + 1) for r, (ids, p) in enumerate(requests) if p + step < len(ids)]
        if not running:
            return passes
        passes.append(one(running, 2))
        step += 1


def sglang_answer(ids: np.ndarray, prompt_tokens: int, native: bool = True) -> dict[str, Any]:
    """One answer with base64 of raw int32 for all but the last token (`routed_experts.py`, `SglExt`)."""
    payload = base64.b64encode(with_dense_layer(ids).astype("<i4").tobytes()).decode()
    if native:
        info = {"id": "x", "prompt_tokens": prompt_tokens, "completion_tokens": len(ids) + 1 - prompt_tokens}
        return {"text": "…", "meta_info": {**info, "routed_experts": payload}}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(ids) + 1 - prompt_tokens}
    return {"choices": [{"index": 0, "text": "…"}], "usage": usage, "sglext": {"routed_experts": payload}}


def vllm_answer(ids: np.ndarray, prompt_tokens: int, split: bool = False) -> dict[str, Any]:
    """One answer: base64 of a .npy, all layers (0.33), or nested lists apart for prompt and completion (0.21)."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(ids) + 1 - prompt_tokens}
    if split:
        prompt, completion = ids[:prompt_tokens].tolist(), ids[prompt_tokens:].tolist()
        return {
            "choices": [{"index": 0, "routed_experts": completion}],
            "usage": usage,
            "prompt_routed_experts": prompt,
        }
    raw = io.BytesIO()
    np.save(raw, with_dense_layer(ids).astype(np.uint8))
    return {"choices": [{"index": 0, "routed_experts": base64.b64encode(raw.getvalue()).decode()}], "usage": usage}


def trtllm(counts: np.ndarray, folder: Path, ranks: int = 2, first_iteration: int = 100) -> None:
    """`ExpertStatistic._write`: counts [iterations, MoE layers, experts] are split over rank{r}.safetensors."""
    folder.mkdir(exist_ok=True)
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": counts.shape[2], "num_experts_per_token": TOP_K}))
    for rank in range(ranks):
        share = counts // ranks + (counts % ranks > rank)
        tensors = {
            f"{first_iteration + i}_{layer}": share[i, column].astype(np.int64)
            for i in range(len(counts))
            for column, layer in enumerate(MOE_LAYERS)
        }
        save_file(tensors, folder / f"rank{rank}.safetensors")


def megatron(counts: np.ndarray, folder: Path, spread: int = 2, copies: int = 2, microbatches: int = 3) -> None:
    """`ActivationLogger.save_tpe`: counts [iterations, MoE layers, experts] over expert- (`spread`) × data-parallel ranks."""
    folder.mkdir(exist_ok=True)
    local = counts.shape[2] // spread
    for rank in range(spread * copies):
        lines = []
        mine = counts[:, :, (rank % spread) * local : (rank % spread + 1) * local]
        mine = mine // copies + (mine % copies > rank // spread)
        for i, layers in enumerate(mine):
            for column, layer in enumerate(MOE_LAYERS):
                tpe = [
                    (layers[column] // microbatches + (layers[column] % microbatches > m)).tolist()
                    for m in range(microbatches)
                ]
                lines.append(json.dumps({"iter": 7 + i, "block": "decoder", "layer": layer, "tpe": tpe}))
            lines.append(json.dumps({"iter": 7 + i, "block": "mtp", "mtp_idx": 0, "layer": 0, "tpe": [[1] * local]}))
        (folder / f"rank{rank}.jsonl").write_text("\n".join(lines) + "\n")


def verl(rows: list[tuple[np.ndarray, int]], path: Path, prompt_len: int, response_len: int) -> None:
    """A rollout batch: rows of (ids of all tokens but the last sampled one, prompt tokens), padded left and right."""
    total = prompt_len + response_len
    experts = np.zeros((len(rows), total, NUM_LAYERS, TOP_K), np.int32)
    mask = np.zeros((len(rows), total), np.int64)
    for i, (ids, prompt_tokens) in enumerate(rows):
        start = prompt_len - prompt_tokens
        experts[i, start : start + len(ids)] = with_dense_layer(ids)
        mask[i, start : start + len(ids) + 1] = 1
    batch = {
        "routed_experts": experts,
        "attention_mask": mask,
        "responses": np.ones((len(rows), response_len), np.int64),
    }
    if path.suffix == ".npz":
        np.savez(path, **batch)
    else:
        torch_save(batch, path)


def gguf_string(text: str) -> bytes:
    """Return a GGUF string."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def imatrix(counts: np.ndarray, path: Path, embedding: int = 3) -> None:
    """`IMatrixCollector::save_imatrix`: GGUF v3 with in_sum2 and counts per tensor; counts [MoE layers, experts]."""
    values = [
        gguf_string("general.type") + struct.pack("<I", 8) + gguf_string("imatrix"),
        gguf_string("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 1) + gguf_string("calibration.txt"),
        gguf_string("imatrix.chunk_count") + struct.pack("<II", 4, 12),
        gguf_string("imatrix.chunk_size") + struct.pack("<II", 4, 512),
    ]
    tensors: list[tuple[str, np.ndarray]] = []
    for column, layer in enumerate(MOE_LAYERS):
        for name in ("down", "gate", "up"):
            full = f"blk.{layer}.ffn_{name}_exps.weight"
            tensors.append((full + ".in_sum2", np.ones((counts.shape[1], embedding), np.float32)))
            tensors.append((full + ".counts", counts[column].astype(np.float32).reshape(-1, 1)))
    tensors.append(("blk.0.attn_q.weight.counts", np.array([[5.0]], np.float32)))
    table, data = b"", b""
    for name, array in tensors:
        data += b"\0" * (-len(data) % 32)
        shape = array.shape[::-1]
        table += gguf_string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        table += struct.pack("<IQ", 0, len(data))
        data += array.tobytes()
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)) + b"".join(values) + table
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)


def llama_csv(ids: np.ndarray, path: Path, batches: list[int], last_layer_tokens: list[int] | None = None) -> None:
    """The routing tracer: rows layer,expert, each batch layer by layer; the last layer may run its last tokens only."""
    lines, start = ["layer,expert"], 0
    for number, tokens in enumerate(batches):
        for column, layer in enumerate(MOE_LAYERS):
            last = column == len(MOE_LAYERS) - 1 and last_layer_tokens is not None
            kept = last_layer_tokens[number] if last and last_layer_tokens is not None else tokens
            for token in ids[start + tokens - kept : start + tokens, column]:
                lines += [f"{layer},{expert}" for expert in token]
        start += tokens
    path.write_text("\n".join(lines) + "\n")


def moe_infinity(counts: np.ndarray, path: Path, capacity: int = 6) -> None:
    """`trace_collection`: float32 [capacity, layers, experts], unused slots zero; counts [sequences, MoE layers, experts]."""
    table = np.zeros((capacity, *counts.shape[1:]), np.float32)
    table[: len(counts)] = counts
    np.save(path, table)


def npz(path: Path, **columns: Any) -> None:
    """A plain archive with the given columns; `meta` becomes JSON text."""
    meta = columns.pop("meta", None)
    np.savez_compressed(path, **columns, **({"meta": np.array(json.dumps(meta))} if meta is not None else {}))
