"""How a layer mixes tokens: attention over a cache of keys and values, or a state of fixed size; and which layers differ.

Modelled: multi-head, grouped-query and latent (MLA) attention, keys that are values, caches that keep one compressed entry for
several tokens, sparse attention that reads the best entries of an index, linear attention and state spaces. Ignored: how queries
are compressed on the way into an index, the precision of states.
"""

from __future__ import annotations

from dataclasses import dataclass

from .weights import FLOPS_PER_WEIGHT


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The attention of a layer."""

    kind: str
    """mha, gqa (fewer key–value heads than heads) or mla (latent: a compressed key–value vector per token)."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Width of a query and key head (mla: both parts together)."""
    v_head_dim: int
    """Width of a value head."""
    q_lora_rank: int | None = None
    """mla only: width of the compressed query; None where queries are not compressed."""
    kv_lora_rank: int = 0
    """mla only: width of the compressed key–value vector."""
    qk_rope_head_dim: int = 0
    """mla only: the part of a key that carries positions, shared by all heads."""
    qk_nope_head_dim: int = 0
    """mla only: the part of a query and key head without positions."""
    gated: bool = False
    """The query projection also yields an output gate (Qwen3-Next)."""
    key_is_value: bool = False
    """One vector a head is both key and value (DeepSeek-V4): the cache keeps it once."""
    projections: int | None = None
    """Weights of one layer's projections where no formula of `kind` gives them."""
    extra_matrix_parameters: int = 0
    """Weights beside the usual projections: output gates, indexers, compressors."""
    idle_parameters: int = 0
    """Of all weights, those that a token does not meet (experts of attention)."""
    tokens_per_entry: int = 1
    """Tokens that one kept entry stands for, beyond a sliding window."""
    compressed: bool = False
    """Entries beyond the window are compressed ones; False with a window: there are none."""
    index_values: int = 0
    """Values of an index that are kept with each entry."""
    tokens_per_index: int = 1
    """Tokens that one entry of the index stands for."""
    selected: int | None = None
    """Entries that sparse attention reads at most, chosen by the index; None: all."""
    vector_parameters: int = 0
    """Biases, norms of queries and keys, and sinks of one layer."""

    def matrix_parameters(self, hidden_size: int) -> int:
        """Return the weights of one layer's projections."""
        heads = self.num_heads
        if self.projections is not None:
            return self.projections + self.extra_matrix_parameters
        if self.kind == "mla":
            query = heads * self.head_dim
            rank = self.q_lora_rank
            return (
                (hidden_size * query if rank is None else rank * (hidden_size + query))
                + hidden_size * (self.kv_lora_rank + self.qk_rope_head_dim)
                + self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
                + heads * self.v_head_dim * hidden_size
                + self.extra_matrix_parameters
            )
        query = heads * self.head_dim * (2 if self.gated else 1)
        kept = self.num_kv_heads * (self.head_dim + self.v_head_dim)
        return hidden_size * (query + kept + heads * self.v_head_dim) + self.extra_matrix_parameters

    @property
    def kv_values_per_token(self) -> int:
        """Values that one layer keeps for each token of context (or entry, where tokens are compressed)."""
        if self.kind == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return self.num_kv_heads * (self.head_dim + (0 if self.key_is_value else self.v_head_dim))

    def flops(self, num_pairs: float, context_tokens: float) -> float:
        """Return the operations of `num_pairs` (query token, context token) meetings: scores, then the sum of values.

        Latent attention either expands every context token's keys and values or works on the latents themselves with wider
        heads; engines take whichever is less (expansion for prompts, latents for decoding), and so does this.
        """
        expanded = FLOPS_PER_WEIGHT * self.num_heads * (self.head_dim + self.v_head_dim) * num_pairs
        if self.kind != "mla":
            return expanded
        latent = FLOPS_PER_WEIGHT * self.num_heads * (2 * self.kv_lora_rank + self.qk_rope_head_dim) * num_pairs
        expansion = FLOPS_PER_WEIGHT * self.kv_lora_rank * self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return min(latent, expanded + expansion * context_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecurrentSpec:
    """A layer that mixes tokens through a state of fixed size (linear attention, state space) instead of a KV cache."""

    kind: str
    matrix_parameters: int
    vector_parameters: int
    state_values: int
    """Values kept per request and layer, whatever the context."""
    projections: tuple[tuple[str, int, int], ...] = ()
    """Its matrices as (name in GGUF files, length of a row, rows), as far as they are known one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerVariant:
    """What some decoder layers have that differs from the model's other layers."""

    layers: tuple[int, ...]
    """Ascending; no layer is in two variants."""
    attention: AttentionSpec | None = None
    """Their attention; None: the model's."""
    num_mixers: int = 1
    """Attentions (or states) of such a layer: none in a layer that is only an MLP, two where the layer is a pair."""
    num_dense_mlps: int | None = None
    """Dense MLPs of the model's `dense_intermediate_size`; None: one in a layer without routed experts, none in others."""
    dense_intermediate_size: int | None = None
    """Their width; None: the model's."""
    matrix_parameters: int = 0
    """Further weights of each such layer."""
    vector_parameters: int = 0
    """Further norms, scales and biases of each such layer."""
    table_parameters: int = 0
    """Further tables of which a token reads a few rows (n-gram embeddings)."""
    keeps_cache: bool = True
    """False where the layer reads another layer's keys and values."""
