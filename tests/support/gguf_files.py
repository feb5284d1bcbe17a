"""Headers of GGUF files written by hand, as ggml's docs/gguf.md lays them out, for models that this package bundles.

Modelled: keys and tensors with the names, shapes and types that llama.cpp's converters write. Ignored: tensor data.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moeplan.specs.models import ModelSpec
from moeplan.specs.models.gguf_types import tensor_type

NUMBERS = {tensor_type(number).name: number for number in range(159) if tensor_type(number) is not None}  # type: ignore[union-attr]
Tensors = dict[str, tuple[tuple[int, ...], str]]
ARCHITECTURES = {
    "qwen3moe": "qwen3-30b-a3b", "gpt-oss": "gpt-oss-20b", "deepseek2": "deepseek-v3", "glm4moe": "glm-4.5-air",
    "qwen3next": "qwen3-next-80b-a3b", "llama": "mixtral-8x7b", "olmoe": "olmoe-1b-7b", "minimax-m2": "minimax-m2.5",
    "qwen35moe": "qwen3.6-35b-a3b",
}  # fmt: skip


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value_bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    inner = 8 if value and isinstance(value[0], str) else 4
    body = b"".join(text(one) if inner == 8 else struct.pack("<I", one) for one in value)
    return struct.pack("<IIQ", 9, inner, len(value)) + body


def num_bytes(shape: tuple[int, ...], kind: str) -> int:
    found = tensor_type(NUMBERS[kind])
    assert found is not None
    size = found.num_bytes(shape)
    assert size is not None
    return size


def header(values: Mapping[str, Any], tensors: Tensors) -> bytes:
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(values))]
    out += [text(key) + value_bytes(value) for key, value in values.items()]
    at = 0
    for name, (shape, kind) in tensors.items():
        out.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, NUMBERS[kind], at))
        at += -(-num_bytes(shape, kind) // 32) * 32
    return b"".join(out)


def keys_of(arch: str, model: ModelSpec, drafts: int = 0) -> dict[str, Any]:
    attention = model.attention
    found: dict[str, Any] = {
        "block_count": model.num_layers + drafts, "embedding_length": model.hidden_size, "expert_count": model.num_experts,
        "expert_used_count": model.top_k, "attention.head_count": attention.num_heads, "attention.head_count_kv": attention.num_kv_heads,
        "attention.key_length": attention.head_dim, "attention.value_length": attention.v_head_dim, "rope.dimension_count": 64,
        "feed_forward_length": model.dense_intermediate_size or model.expert_intermediate_size,
        "expert_feed_forward_length": model.expert_intermediate_size,
    }  # fmt: skip
    if model.longest_context is not None:
        found["context_length"] = model.longest_context
    if drafts:
        found["nextn_predict_layers"] = drafts
    if model.sliding_window:
        found["attention.sliding_window"] = model.sliding_window
    if attention.kv_lora_rank:
        found |= {
            "attention.kv_lora_rank": attention.kv_lora_rank, "attention.q_lora_rank": attention.q_lora_rank,
            "attention.key_length": attention.kv_lora_rank + 64, "attention.value_length": attention.kv_lora_rank,
            "attention.key_length_mla": attention.head_dim, "attention.value_length_mla": attention.v_head_dim,
            "attention.head_count_kv": 1, "leading_dense_block_count": model.moe_layers[0],
        }  # fmt: skip
    if model.recurrent_layers:  # those of Qwen3-Next and 3.5: 16 heads of keys, 32 of values, all 128 wide
        found |= {
            "ssm.group_count": 16, "ssm.time_step_rank": 32, "ssm.state_size": 128, "ssm.inner_size": 4096, "ssm.conv_kernel": 4,
        }  # fmt: skip
    words = [f"word {n}" for n in range(9000)]
    return {"general.architecture": arch, "tokenizer.ggml.tokens": words} | {
        f"{arch}.{key}": value for key, value in found.items()
    }


def tensors_of(
    arch: str, model: ModelSpec, kind_of: Callable[[str], str], drafts: int = 0, *, split_experts: bool = False
) -> Tensors:
    """Return the table of a model's tensors; matrices in the types that `kind_of` gives their names, vectors and routers in F32."""
    found: Tensors = {}
    hidden, width = model.hidden_size, model.expert_intermediate_size

    def matrix(name: str, *shape: int) -> None:
        found[name] = (shape, kind_of(name))

    def vector(name: str, *shape: int) -> None:
        found[name] = (shape, "F32")

    matrix("token_embd.weight", hidden, model.vocab_size)
    vector("output_norm.weight", hidden)
    if not model.tied_embeddings:
        matrix("output.weight", hidden, model.vocab_size)
    for layer in range(model.num_layers + drafts):
        at = f"blk.{layer}"
        vector(f"{at}.attn_norm.weight", hidden)
        vector(f"{at}.ffn_norm.weight", hidden)
        if layer in model.recurrent_layers:
            matrix(f"{at}.attn_qkv.weight", hidden, 8192)
            matrix(f"{at}.attn_gate.weight", hidden, 4096)
            matrix(f"{at}.ssm_ba.weight", hidden, 64)
            matrix(f"{at}.ssm_out.weight", 4096, hidden)
            for name, shape in {
                "conv1d.weight": (4, 8192),
                "dt.bias": (32,),
                "a": (32,),
                "norm.weight": (128,),
            }.items():
                vector(f"{at}.ssm_{name}", *shape)
        else:
            _attention(at, model, matrix, vector)
        if layer not in model.moe_layers and layer < model.num_layers:
            for part in ("gate", "up"):
                matrix(f"{at}.ffn_{part}.weight", hidden, model.dense_intermediate_size)
            matrix(f"{at}.ffn_down.weight", model.dense_intermediate_size, hidden)
            continue
        vector(f"{at}.ffn_gate_inp.weight", hidden, model.num_experts)
        for part, shape in (("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden))):
            if split_experts:
                for expert in range(model.num_experts):
                    matrix(f"{at}.ffn_{part}.{expert}.weight", *shape)
            else:
                matrix(f"{at}.ffn_{part}_exps.weight", *shape, model.num_experts)
            if model.expert_bias:
                vector(f"{at}.ffn_{part}_exps.bias", shape[1], model.num_experts)
            if model.num_shared_experts:
                wide = model.num_shared_experts * model.shared_intermediate_size
                matrix(f"{at}.ffn_{part}_shexp.weight", *(wide if one == width else one for one in shape))
        if model.router_bias:
            vector(f"{at}.ffn_gate_inp.bias", model.num_experts)
        if model.shared_gate:
            vector(f"{at}.ffn_gate_inp_shexp.weight", hidden)
    return found


def _attention(at: str, model: ModelSpec, matrix: Callable[..., None], vector: Callable[..., None]) -> None:
    attention, hidden = model.attention, model.hidden_size
    if attention.kv_lora_rank:
        rank, queries, heads = attention.kv_lora_rank, attention.q_lora_rank or 0, attention.num_heads
        matrix(f"{at}.attn_q_a.weight", hidden, queries)
        matrix(f"{at}.attn_q_b.weight", queries, heads * attention.head_dim)
        matrix(f"{at}.attn_kv_a_mqa.weight", hidden, rank + 64)
        vector(f"{at}.attn_q_a_norm.weight", queries)
        vector(f"{at}.attn_kv_a_norm.weight", rank)
        matrix(f"{at}.attn_k_b.weight", 128, rank, heads)
        matrix(f"{at}.attn_v_b.weight", rank, attention.v_head_dim, heads)
        matrix(f"{at}.attn_kv_b.weight", rank, heads * (128 + attention.v_head_dim))
        matrix(f"{at}.attn_output.weight", heads * attention.v_head_dim, hidden)
        return
    queries = attention.num_heads * attention.head_dim
    cached = attention.num_kv_heads * attention.head_dim
    matrix(f"{at}.attn_q.weight", hidden, queries * (2 if attention.gated else 1))
    matrix(f"{at}.attn_k.weight", hidden, cached)
    matrix(f"{at}.attn_v.weight", hidden, cached)
    matrix(f"{at}.attn_output.weight", queries, hidden)
    if model.family in ("gpt_oss", "glm4_moe"):
        for part, size in (("q", queries), ("k", cached), ("v", cached)):
            vector(f"{at}.attn_{part}.bias", size)
    if model.family == "gpt_oss":
        vector(f"{at}.attn_output.bias", hidden)
        vector(f"{at}.attn_sinks.weight", attention.num_heads)
    norm = {"qwen3_moe": attention.head_dim, "qwen3_next": attention.head_dim, "qwen3_5_moe": attention.head_dim,
            "olmoe": queries, "minimax_m2": queries}.get(model.family)  # fmt: skip
    if norm:
        vector(f"{at}.attn_q_norm.weight", norm)
        vector(f"{at}.attn_k_norm.weight", cached if norm == queries else norm)


def write(path: Path, values: Mapping[str, Any], tensors: Tensors) -> Path:
    path.write_bytes(header(values, tensors))
    return path
