"""A model's matrices as GGUF files hold them: name, layer, length of a row, number of rows.

Modelled: attention with projections of its own or fused, latents, gated delta nets and state spaces, dense and shared MLPs, experts of a
layer in one tensor, token embedding and output matrix. Ignored: vectors (norms, biases, routers, convolutions), which files keep
at 32 bits; draft layers; names of projections that no recipe treats apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..mixers import AttentionSpec
    from ..model import ModelSpec

EMBEDDING, HEAD = "token_embd", "output"
EXPERTS = "_exps"
_FUSED = ("dbrx",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One tensor of a file."""

    name: str
    """Without `blk.N.` and `.weight`."""
    layer: int | None
    row: int
    """Weights in a row: the fastest-running axis."""
    rows: int
    stacked: bool = False
    """Of three dimensions: experts, or heads of latents."""

    @property
    def weights(self) -> int:
        """Numbers in it."""
        return self.row * self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What recipes ask of a model."""

    num_layers: int
    num_experts: int
    heads_per_kv: int
    """Query heads that share keys and values, as the file's keys say it: all of them, where attention is on latents."""
    tied: bool
    """Token embedding and output matrix are one."""


def shape_of(model: ModelSpec) -> Shape:
    """Return what recipes ask of `model`."""
    attention = model.attention_of(0) or model.attention
    kept = 1 if attention.kind == "mla" else attention.num_kv_heads
    return Shape(
        num_layers=model.num_layers, num_experts=model.num_experts, heads_per_kv=attention.num_heads // max(kept, 1),
        tied=model.tied_embeddings,
    )  # fmt: skip


def matrices_of(model: ModelSpec) -> Iterator[Matrix]:
    """Yield every matrix in the order in which quantisers go over them: layer by layer, by name within one."""
    hidden = model.hidden_size
    yield Matrix(name=EMBEDDING, layer=None, row=hidden, rows=model.vocab_size)
    if not model.tied_embeddings:
        yield Matrix(name=HEAD, layer=None, row=hidden, rows=model.vocab_size)
    if model.encoder_matrix_parameters:
        yield _rest("enc", None, hidden, model.encoder_matrix_parameters)
    for _ in model.encoder_moe_layers:
        yield from _experts(model, None)
    for layer in range(model.num_layers):
        yield from sorted(_layer(model, layer), key=lambda one: one.name)


def _layer(model: ModelSpec, layer: int) -> Iterator[Matrix]:
    named = [*_mixer(model, layer), *_mlps(model, layer)]
    yield from named
    left = model.dense_matrix_parameters(layer) - sum(one.weights for one in named)
    if left > 0:
        yield _rest("other", layer, model.hidden_size, left)
    if layer in model.moe_layers:
        yield from _experts(model, layer)


def _rest(name: str, layer: int | None, row: int, weights: int) -> Matrix:
    """Return weights that no recipe treats apart, in rows of `row` where they are whole rows."""
    return Matrix(name=name, layer=layer, row=row, rows=weights // row) if weights % row == 0 else Matrix(
        name=name, layer=layer, row=weights, rows=1
    )  # fmt: skip


def _mixer(model: ModelSpec, layer: int) -> list[Matrix]:
    """Return the projections of a layer's attention or state, as far as they are known one by one."""
    if model.is_recurrent(layer) and model.recurrent is not None:
        found = [(name, row, rows, False) for name, row, rows in model.recurrent.projections]
    else:
        attention = model.attention_of(layer)
        if attention is None or attention.projections is not None:
            return []
        one = _latent(attention, model.hidden_size) if attention.kind == "mla" else _heads(model, attention)
        found = one * model.variant(layer).num_mixers
    return [Matrix(name=name, layer=layer, row=row, rows=rows, stacked=deep) for name, row, rows, deep in found]


def _heads(model: ModelSpec, attention: AttentionSpec) -> list[tuple[str, int, int, bool]]:
    hidden, kept = model.hidden_size, attention.num_kv_heads
    queries = attention.num_heads * attention.head_dim * (2 if attention.gated else 1)
    keys, values = kept * attention.head_dim, 0 if attention.key_is_value else kept * attention.v_head_dim
    out = ("attn_output", attention.num_heads * attention.v_head_dim, hidden, False)
    if model.family in _FUSED:
        return [("attn_qkv", hidden, queries + keys + values, False), out]
    found = [("attn_q", hidden, queries, False), ("attn_k", hidden, keys, False), out]
    return [*found, ("attn_v", hidden, values, False)] if values else found


def _latent(attention: AttentionSpec, hidden: int) -> list[tuple[str, int, int, bool]]:
    heads, rank, of_queries = attention.num_heads, attention.kv_lora_rank, attention.q_lora_rank
    queries = heads * attention.head_dim
    into = [("attn_q", hidden, queries, False)] if of_queries is None else [
        ("attn_q_a", hidden, of_queries, False), ("attn_q_b", of_queries, queries, False)
    ]  # fmt: skip
    return [
        *into, ("attn_kv_a_mqa", hidden, rank + attention.qk_rope_head_dim, False),
        ("attn_k_b", attention.qk_nope_head_dim, rank * heads, True), ("attn_v_b", rank, attention.v_head_dim * heads, True),
        ("attn_output", heads * attention.v_head_dim, hidden, False),
    ]  # fmt: skip


def _mlps(model: ModelSpec, layer: int) -> list[Matrix]:
    """Return the dense MLPs of a layer, and its shared experts."""
    is_moe, variant, found = layer in model.moe_layers, model.variant(layer), []
    count = int(not is_moe) if variant.num_dense_mlps is None else variant.num_dense_mlps
    own = variant.dense_intermediate_size
    for _ in range(count):
        found += _mlp(model, layer, "", model.dense_intermediate_size if own is None else own)
    if is_moe and model.num_shared_experts:
        found += _mlp(model, layer, "_shexp", model.num_shared_experts * model.shared_intermediate_size)
    return found


def _mlp(model: ModelSpec, layer: int, ending: str, width: int) -> list[Matrix]:
    if not width:
        return []
    into = ("gate", "up") if model.gated else ("up",)
    hidden = model.hidden_size
    return [
        *(Matrix(name=f"ffn_{part}{ending}", layer=layer, row=hidden, rows=width) for part in into),
        Matrix(name=f"ffn_down{ending}", layer=layer, row=width, rows=hidden),
    ]


def _experts(model: ModelSpec, layer: int | None) -> Iterator[Matrix]:
    """Yield the matrices of a layer's routed experts, all experts in one."""
    hidden, width, count = model.expert_hidden, model.expert_intermediate_size, model.num_experts
    into = ("gate", "up") if model.gated else ("up",)
    for part in into:
        yield Matrix(name=f"ffn_{part}{EXPERTS}", layer=layer, row=hidden, rows=width * count, stacked=True)
    yield Matrix(name=f"ffn_down{EXPERTS}", layer=layer, row=width, rows=hidden * count, stacked=True)
