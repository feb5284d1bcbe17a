"""Checkpoints of safetensors files written by hand: headers with the names and shapes that published ones have, data left out.

Modelled: plain, AWQ and GPTQ, NVFP4, blocked FP8, MXFP4 of gpt-oss. Ignored: tensor data, unless a test writes some.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeplan.specs.models import ModelSpec

SIZES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1, "I32": 4, "I64": 8}
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def num_bytes(kind: str, shape: tuple[int, ...]) -> int:
    size = SIZES[kind]
    for length in shape:
        size *= length
    return size


def header(tensors: Tensors) -> bytes:
    at, table = 0, {}
    for name, (kind, shape) in tensors.items():
        end = at + num_bytes(kind, shape)
        table[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **table}).encode()
    return struct.pack("<Q", len(text)) + text


def linear(name: str, rows: int, columns: int, how: str) -> Tensors:
    """Return the tensors of one matrix of `rows` outputs and `columns` inputs, as quantisers write them."""
    if how == "BF16":
        return {f"{name}.weight": ("BF16", (rows, columns))}
    if how == "awq":
        return {
            f"{name}.qweight": ("I32", (columns, rows // 8)), f"{name}.qzeros": ("I32", (columns // 128, rows // 8)),
            f"{name}.scales": ("F16", (columns // 128, rows)),
        }  # fmt: skip
    if how == "gptq":
        return {
            f"{name}.qweight": ("I32", (columns // 8, rows)), f"{name}.qzeros": ("I32", (columns // 128, rows // 8)),
            f"{name}.scales": ("F16", (columns // 128, rows)), f"{name}.g_idx": ("I32", (columns,)),
        }  # fmt: skip
    if how == "nvfp4":
        return {
            f"{name}.weight": ("U8", (rows, columns // 2)), f"{name}.weight_scale": ("F8_E4M3", (rows, columns // 16)),
            f"{name}.weight_scale_2": ("F32", ()), f"{name}.input_scale": ("F32", ()),
        }  # fmt: skip
    assert how == "fp8"
    return {
        f"{name}.weight": ("F8_E4M3", (rows, columns)), f"{name}.weight_scale_inv": ("F32", (-(-rows // 128), -(-columns // 128))),
    }  # fmt: skip


def qwen3_moe(model: ModelSpec, how: str, dense: str) -> Tensors:
    """Return a Qwen3-MoE checkpoint with experts stored as `how` and attention as `dense`."""
    hidden, width, attention = model.hidden_size, model.expert_intermediate_size, model.attention
    queries, kept = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    found: Tensors = {
        "model.embed_tokens.weight": ("BF16", (model.vocab_size, hidden)),
        "model.norm.weight": ("BF16", (hidden,)),
    }
    found["lm_head.weight"] = ("BF16", (model.vocab_size, hidden))
    for layer in range(model.num_layers):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{name}.weight"] = ("BF16", (hidden,))
        for name in ("q_norm", "k_norm"):
            found[f"{at}.self_attn.{name}.weight"] = ("BF16", (attention.head_dim,))
        for name, rows, columns in (
            ("q", queries, hidden),
            ("k", kept, hidden),
            ("v", kept, hidden),
            ("o", hidden, queries),
        ):
            found |= linear(f"{at}.self_attn.{name}_proj", rows, columns, dense)
        found[f"{at}.mlp.gate.weight"] = ("BF16", (model.num_experts, hidden))
        for expert in range(model.num_experts):
            for name, rows, columns in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
                found |= linear(f"{at}.mlp.experts.{expert}.{name}_proj", rows, columns, how)
    return found


def gpt_oss(model: ModelSpec) -> Tensors:
    """Return a gpt-oss checkpoint: experts of a layer together, in MXFP4 blocks."""
    hidden, width, attention, count = (
        model.hidden_size,
        model.expert_intermediate_size,
        model.attention,
        model.num_experts,
    )
    queries, kept = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    found: Tensors = {
        "model.embed_tokens.weight": ("BF16", (model.vocab_size, hidden)),
        "model.norm.weight": ("BF16", (hidden,)),
    }
    found["lm_head.weight"] = ("BF16", (model.vocab_size, hidden))
    for layer in range(model.num_layers):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{name}.weight"] = ("BF16", (hidden,))
        found[f"{at}.self_attn.sinks"] = ("BF16", (attention.num_heads,))
        for name, rows, columns in (
            ("q", queries, hidden),
            ("k", kept, hidden),
            ("v", kept, hidden),
            ("o", hidden, queries),
        ):
            found[f"{at}.self_attn.{name}_proj.weight"] = ("BF16", (rows, columns))
            found[f"{at}.self_attn.{name}_proj.bias"] = ("BF16", (rows,))
        found[f"{at}.mlp.router.weight"] = ("BF16", (count, hidden))
        found[f"{at}.mlp.router.bias"] = ("BF16", (count,))
        for name, rows, columns in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
            found[f"{at}.mlp.experts.{name}_blocks"] = ("U8", (count, rows, columns // 32, 16))
            found[f"{at}.mlp.experts.{name}_scales"] = ("U8", (count, rows, columns // 32))
            found[f"{at}.mlp.experts.{name}_bias"] = ("BF16", (count, rows))
    return found


def write(folder: Path, config: Mapping[str, Any], tensors: Tensors, parts: int = 1) -> Path:
    """Write a checkpoint's configuration, its parts (headers alone) and their index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names, weight_map = list(tensors), {}
    for part in range(parts):
        name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        mine = {one: tensors[one] for one in names[part::parts]}
        (folder / name).write_bytes(header(mine))
        weight_map |= dict.fromkeys(mine, name)
    index = {"metadata": {"total_size": sum(num_bytes(*one) for one in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
