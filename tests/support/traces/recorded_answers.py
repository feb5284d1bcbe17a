"""Answers of serving engines as they are written, for models of any shape, with what engines put beside routing.

Each writer takes the routing of every token that ran ([tokens, MoE layers, top_k]) and lays it out as the engine does:
dense layers as zeros, the narrowest type, base64, `usage`. Nothing of those projects is needed to run this.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A made-up model and two lengths."""

    layers: int
    dense: tuple[int, ...]
    experts: int
    top_k: int
    prompt: int
    reply: int
    seed: int

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer in range(self.layers) if layer not in self.dense]

    @property
    def rows(self) -> int:
        """Tokens that ran: all but the last sampled one."""
        return self.prompt + self.reply - 1

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def routing(self, rng: np.random.Generator, tokens: int | None = None) -> np.ndarray:
        """Return distinct ids [tokens, MoE layers, top_k] that use many of the experts."""
        keys = rng.random((self.rows if tokens is None else tokens, len(self.moe_layers), self.experts))
        return np.argsort(keys, axis=2)[:, :, : self.top_k].astype(np.int64)

    def all_layers(self, ids: np.ndarray) -> np.ndarray:
        """Return [tokens, layers, k] with zeros in the dense layers."""
        every = np.zeros((len(ids), self.layers, ids.shape[2]), np.int64)
        every[:, self.moe_layers] = ids
        return every


@st.composite
def shapes(draw: st.DrawFn, min_top_k: int = 2, max_top_k: int = 8, min_prompt: int = 6) -> Shape:
    """Return models of 4 to 9 layers, up to two of them dense, of up to 600 experts."""
    layers = draw(st.integers(6, 9))
    dense = draw(st.sampled_from([(), (0,), (0, 1), (2,), (layers - 1,)]))
    experts = draw(st.sampled_from([9, 16, 64, 128, 256, 257, 384, 600]))
    top_k = draw(st.integers(min_top_k, min(max_top_k, experts - 1)))
    return Shape(
        layers=layers, dense=dense, experts=experts, top_k=top_k, prompt=draw(st.integers(min_prompt, 14)),
        reply=draw(st.integers(4, 9)), seed=draw(st.integers(0, 1 << 30)),
    )  # fmt: skip


def usage(shape: Shape, cached: int | None = None, reply: int | None = None) -> dict[str, Any]:
    """Return an OpenAI `usage`."""
    tokens = shape.reply if reply is None else reply
    found: dict[str, Any] = {
        "prompt_tokens": shape.prompt,
        "completion_tokens": tokens,
        "total_tokens": shape.prompt + tokens,
    }
    return found | ({} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}})


def vllm_table(shape: Shape, every: np.ndarray) -> str:
    """VLLM 0.33: base64 of a .npy, uint8 up to 256 experts, else uint16; −1 wraps."""
    raw = io.BytesIO()
    np.save(raw, every.astype(np.uint8 if shape.experts <= 256 else np.uint16))
    return base64.b64encode(raw.getvalue()).decode()


def vllm(shape: Shape, tables: list[np.ndarray], cached: int | None = None, reply: int | None = None) -> dict[str, Any]:
    """Return an answer with one choice a table [rows, layers, k]."""
    choices = [{"index": i, "routed_experts": vllm_table(shape, table)} for i, table in enumerate(tables)]
    return {"object": "chat.completion", "choices": choices, "usage": usage(shape, cached, reply)}


def sglang(shape: Shape, every: np.ndarray, cached: int = 0, native: bool = True) -> dict[str, Any]:
    """SGLang: base64 of raw int32, in `meta_info` or in `sglext` (0.5) or a choice's `sgl_ext` (its documentation)."""
    payload = base64.b64encode(every.astype("<i4").tobytes()).decode()
    if native:
        counts = {"prompt_tokens": shape.prompt, "completion_tokens": shape.reply, "cached_tokens": cached}
        return {"text": ".", "meta_info": {"id": "x", **counts, "routed_experts": payload}}
    choice = {"index": 0, "message": {"content": "."}, "sgl_ext": {"routed_experts": payload}}
    return {"choices": [choice], "usage": usage(shape, cached)}
