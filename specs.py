"""The nouns of a model: how weights are stored, what a layer consists of, and how many parameters, bytes and operations that is.

Modelled: decoders and encoder–decoders with routed experts in some layers; multi-head, grouped-query and latent (MLA)
attention; sliding windows; layers that keep a fixed state instead of a KV cache; gated and plain MLPs, biases, shared
experts, tied embeddings. Counts are exact for the families the reader knows (compared with instantiated models in the
tests). Ignored: extra heads for multi-token prediction, vision and audio towers, layers whose experts differ in size, the
padding a packer adds at the end of a row. Everything here is a plain dataclass: validation of files is `specs_io`'s job.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

from .errors import InputError, UnknownName

BITS_PER_BYTE = 8
# Norms, biases, routers and embeddings are never stored below this width, whatever the experts use (arXiv 2312.17238 §3.3).
_UNQUANTISED_BITS = 16
# A multiplication and an addition for every weight a token meets.
FLOPS_PER_WEIGHT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """One way of storing weight matrices."""

    name: str
    """What the command line calls it."""
    bits: int
    """Width of one stored value."""
    bits_per_weight: Fraction
    """Storage of one weight, packing and quantisation metadata included."""
    group: int | None
    """Weights that share a scale; None for unquantised formats."""
    description: str
    source: str
    """Where packing and metadata are documented."""

    @property
    def quantised(self) -> bool:
        """Whether weights are expanded before they are multiplied."""
        return self.group is not None

    def num_bytes(self, num_weights: int) -> int:
        """Return the bytes of a matrix of `num_weights`, rounded up to whole bytes."""
        return math.ceil(self.bits_per_weight * num_weights / BITS_PER_BYTE)

    def vector_bytes(self, num_values: int) -> int:
        """Return the bytes of values that stay unquantised (norms, biases, routers, embeddings) beside such matrices."""
        return num_values * max(self.bits, _UNQUANTISED_BITS) // BITS_PER_BYTE


# HQQ stores a scale and a zero point of 8 bits for each group of weights; those are quantised themselves, with two 16-bit
# constants for each 128 of them.
_SCALES_PER_GROUP = 2
_SCALE_BITS = 8
_SCALE_GROUP = 128
_SCALE_OF_SCALES_BITS = 2 * 16
_HQQ = "HQQ packing as used by Mixtral-offloading (arXiv 2312.17238 §3.3; github.com/mobiusml/hqq)"


def _hqq(bits: int, packed_bits: Fraction, group: int, description: str) -> WeightFormat:
    """Return an HQQ format; `packed_bits` is what a value takes after packing."""
    scale_bits = _SCALE_BITS + Fraction(_SCALE_OF_SCALES_BITS, _SCALE_GROUP)
    return WeightFormat(
        name=str(bits), bits=bits, bits_per_weight=packed_bits + _SCALES_PER_GROUP * scale_bits / group, group=group,
        description=description, source=_HQQ,
    )  # fmt: skip


def _plain(bits: int, description: str) -> WeightFormat:
    return WeightFormat(
        name=str(bits),
        bits=bits,
        bits_per_weight=Fraction(bits),
        group=None,
        description=description,
        source="IEEE 754; bfloat16",
    )


WEIGHT_FORMATS: Mapping[str, WeightFormat] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            _plain(32, "float32"),
            _plain(16, "float16 or bfloat16"),
            WeightFormat(
                name="8", bits=8, bits_per_weight=8 + Fraction(32, 128 * 128), group=128 * 128,
                description="8-bit values, one float32 scale per 128x128 block",
                source="DeepSeek-V3 technical report §3.3.2 (arXiv 2412.19437)",
            ),
            _hqq(4, Fraction(4), 64, "4-bit values in groups of 64, two per byte"),
            WeightFormat(
                name="mxfp4", bits=4, bits_per_weight=4 + Fraction(8, 32), group=32,
                description="4-bit floating point in blocks of 32 with an 8-bit exponent",
                source="OCP Microscaling Formats (MX) Specification v1.0 §5",
            ),
            _hqq(3, Fraction(32, 10), 64, "3-bit values in groups of 64, ten per int32"),
            _hqq(2, Fraction(2), 16, "2-bit values in groups of 16, four per byte"),
        )
    }
)  # fmt: skip
"""Every known way of storing expert weights, by name."""


def weight_format(name: str | int) -> WeightFormat:
    """Return the weight format called `name` ("16", 4, "mxfp4"); raises UnknownName for any other."""
    found = WEIGHT_FORMATS.get(str(name))
    if found is None:
        raise UnknownName("bits", name, WEIGHT_FORMATS)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The attention of every layer that has one."""

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
    vector_parameters: int = 0
    """Biases, norms of queries and keys, and sinks of one layer."""

    def matrix_parameters(self, hidden_size: int) -> int:
        """Return the weights of one layer's projections."""
        heads = self.num_heads
        if self.kind == "mla":
            query = heads * self.head_dim
            rank = self.q_lora_rank
            return (
                (hidden_size * query if rank is None else rank * (hidden_size + query))
                + hidden_size * (self.kv_lora_rank + self.qk_rope_head_dim)
                + self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
                + heads * self.v_head_dim * hidden_size
            )
        query = heads * self.head_dim * (2 if self.gated else 1)
        return hidden_size * (query + self.num_kv_heads * (self.head_dim + self.v_head_dim) + heads * self.v_head_dim)

    @property
    def kv_values_per_token(self) -> int:
        """Values that one layer keeps for each token of context."""
        if self.kind == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return self.num_kv_heads * (self.head_dim + self.v_head_dim)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A Mixture-of-Experts language model, as far as memory and time depend on it.

    Layer indices are those of the decoder (the only stack of most models), from 0 to `num_layers` - 1.
    """

    name: str
    family: str
    """`model_type` of the configuration it was read from."""
    hidden_size: int
    num_layers: int
    moe_layers: tuple[int, ...]
    """Layers with routed experts, ascending."""
    num_experts: int
    top_k: int
    expert_intermediate_size: int
    gated: bool
    """MLPs have three matrices (gate, up, down) rather than two."""
    vocab_size: int
    attention: AttentionSpec
    expert_bias: bool = False
    """Every matrix of an expert has a bias."""
    router_bias: bool = False
    num_shared_experts: int = 0
    """Experts that every token visits, in each MoE layer."""
    shared_intermediate_size: int = 0
    """Width of one shared expert."""
    shared_gate: bool = False
    """The shared experts' output is scaled by a learned gate."""
    dense_intermediate_size: int = 0
    """Width of the MLP in layers without routed experts; 0 where there are none."""
    dense_bias: bool = False
    """Every matrix of a dense or shared MLP has a bias."""
    tied_embeddings: bool = False
    head_bias: bool = False
    num_norms_per_layer: int = 2
    """Norms of one layer, that of the cross-attention not counted."""
    norm_width: int = 1
    """Parameters of a norm for each hidden value: 1, 2 with a bias, 0 without parameters."""
    num_final_norms: int = 1
    other_parameters: int = 0
    """Position tables and the like, resident with the embeddings."""
    sliding_layers: tuple[int, ...] = ()
    """Layers whose attention sees only the last `sliding_window` tokens."""
    sliding_window: int | None = None
    recurrent: RecurrentSpec | None = None
    recurrent_layers: tuple[int, ...] = ()
    """Layers that have `recurrent` in place of attention."""
    num_encoder_layers: int = 0
    encoder_moe_layers: tuple[int, ...] = ()
    cross_attention: bool = False
    """Each decoder layer also attends to the encoder's output."""
    native_bits: str = "16"
    """Weight format in which the checkpoint stores routed experts, by name."""

    def __post_init__(self) -> None:
        _check_model(self)

    # --- experts -------------------------------------------------------------------------------------------------

    @property
    def num_moe_layers(self) -> int:
        """Decoder layers with routed experts."""
        return len(self.moe_layers)

    @property
    def expert_matrix_parameters(self) -> int:
        """Weights of one routed expert's matrices."""
        return self._mlp(self.expert_intermediate_size, bias=False)

    @property
    def expert_vector_parameters(self) -> int:
        """Biases of one routed expert."""
        return self.expert_parameters - self.expert_matrix_parameters

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert."""
        return self._mlp(self.expert_intermediate_size, bias=self.expert_bias)

    def expert_bytes(self, fmt: WeightFormat) -> int:
        """Return the bytes of one routed expert stored as `fmt`; biases stay at 16 bits or more."""
        return fmt.num_bytes(self.expert_matrix_parameters) + fmt.vector_bytes(self.expert_vector_parameters)

    @property
    def expert_flops_per_token(self) -> int:
        """Operations of one expert for one token."""
        return FLOPS_PER_WEIGHT * self.expert_parameters

    @property
    def num_routed_experts(self) -> int:
        """Routed experts of the whole model, the encoder's included."""
        return self.num_experts * (self.num_moe_layers + len(self.encoder_moe_layers))

    # --- everything that is not a routed expert ---------------------------------------------------------------------

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's self-attention."""
        return self.attention.matrix_parameters(self.hidden_size) + self.attention.vector_parameters

    def is_recurrent(self, layer: int) -> bool:
        """Return whether decoder layer `layer` keeps a state instead of a KV cache."""
        return layer in self.recurrent_layers

    def attended_tokens(self, layer: int, context_tokens: int, num_requests: int = 1) -> int:
        """Return how many of `context_tokens` (summed over requests) layer `layer` reads."""
        if self.is_recurrent(layer):
            return 0
        if self.sliding_window is not None and layer in self.sliding_layers:
            return min(context_tokens, self.sliding_window * num_requests)
        return context_tokens

    def dense_matrix_parameters(self, layer: int) -> int:
        """Return the weights of decoder layer `layer` that a quantiser may shrink: projections, dense and shared MLPs."""
        self._check_layer(layer)
        if self.is_recurrent(layer) and self.recurrent is not None:
            mixer = self.recurrent.matrix_parameters
        else:
            mixer = self.attention.matrix_parameters(self.hidden_size)
        if self.cross_attention:
            mixer += self.attention.matrix_parameters(self.hidden_size)
        return mixer + self._dense_mlp(layer in self.moe_layers, bias=False)

    def dense_vector_parameters(self, layer: int) -> int:
        """Return the rest of decoder layer `layer` outside its routed experts: router, norms, biases."""
        self._check_layer(layer)
        if self.is_recurrent(layer) and self.recurrent is not None:
            mixer = self.recurrent.vector_parameters
        else:
            mixer = self.attention.vector_parameters
        if self.cross_attention:
            mixer += self.attention.vector_parameters
        norms = self.num_norms_per_layer + int(self.cross_attention)
        return mixer + norms * self.norm_width * self.hidden_size + self._mlp_vectors(layer in self.moe_layers)

    def dense_parameters(self, layer: int) -> int:
        """Return the parameters of decoder layer `layer` that are not in a routed expert."""
        return self.dense_matrix_parameters(layer) + self.dense_vector_parameters(layer)

    def dense_layer_bytes(self, layer: int, fmt: WeightFormat) -> int:
        """Return the bytes of `dense_parameters(layer)` with matrices stored as `fmt`."""
        return fmt.num_bytes(self.dense_matrix_parameters(layer)) + fmt.vector_bytes(
            self.dense_vector_parameters(layer)
        )

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding, and of the output matrix unless it is the same one."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def head_parameters(self) -> int:
        """Parameters read to turn a hidden state into logits: final norm and output matrix."""
        return self.vocab_size * (self.hidden_size + int(self.head_bias)) + self.norm_width * self.hidden_size

    @property
    def encoder_matrix_parameters(self) -> int:
        """Weights of the encoder's projections and dense MLPs."""
        mixer = self.num_encoder_layers * self.attention.matrix_parameters(self.hidden_size)
        return mixer + sum(
            self._dense_mlp(n in self.encoder_moe_layers, bias=False) for n in range(self.num_encoder_layers)
        )

    @property
    def encoder_vector_parameters(self) -> int:
        """Norms, routers and biases of the encoder."""
        each = self.attention.vector_parameters + self.num_norms_per_layer * self.norm_width * self.hidden_size
        routers = sum(self._mlp_vectors(n in self.encoder_moe_layers) for n in range(self.num_encoder_layers))
        return self.num_encoder_layers * each + routers

    def dense_bytes(self, fmt: WeightFormat) -> int:
        """Return the bytes of everything but routed experts: embeddings, all layers, the encoder.

        Matrices of attention, dense and shared MLPs are stored as `fmt`; the rest stays at 16 bits or more.
        """
        matrices = self.encoder_matrix_parameters
        vectors = self.encoder_vector_parameters + self._outside_layers
        for layer in range(self.num_layers):
            matrices += self.dense_matrix_parameters(layer)
            vectors += self.dense_vector_parameters(layer)
        return fmt.num_bytes(matrices) + fmt.vector_bytes(vectors)

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole model."""
        layers = sum(self.dense_parameters(layer) for layer in range(self.num_layers))
        encoder = self.encoder_matrix_parameters + self.encoder_vector_parameters
        return layers + encoder + self._outside_layers + self.num_routed_experts * self.expert_parameters

    # --- what grows with the context --------------------------------------------------------------------------------

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Return the bytes that one more token of context takes over all layers, before any sliding window is full."""
        layers = self.num_layers - len(self.recurrent_layers)
        return layers * self.attention.kv_values_per_token * bytes_per_value

    def kv_bytes(self, context_tokens: int, bytes_per_value: int = 2, encoder_tokens: int = 0) -> int:
        """Return the cache bytes of one request: windows are capped, states and cross-attention included.

        encoder_tokens: input tokens of an encoder–decoder, whose keys and values every decoder layer keeps.
        """
        attended = sum(self.attended_tokens(layer, context_tokens) for layer in range(self.num_layers))
        if self.cross_attention:
            attended += encoder_tokens * self.num_layers
        state = len(self.recurrent_layers) * (self.recurrent.state_values if self.recurrent is not None else 0)
        return (attended * self.attention.kv_values_per_token + state) * bytes_per_value

    # --- counting helpers -------------------------------------------------------------------------------------------

    @property
    def _outside_layers(self) -> int:
        """Embeddings, output bias, final norms and position tables."""
        norms = self.num_final_norms * self.norm_width * self.hidden_size
        return self.embedding_parameters + norms + self.vocab_size * int(self.head_bias) + self.other_parameters

    def _mlp(self, width: int, *, bias: bool) -> int:
        """Return the parameters of one MLP of `width`, with or without its biases."""
        into = 2 if self.gated else 1
        return (into + 1) * self.hidden_size * width + (into * width + self.hidden_size if bias and width else 0)

    def _dense_mlp(self, is_moe: bool, *, bias: bool) -> int:
        """Return the parameters of a layer's MLPs outside routed experts."""
        if is_moe:
            return self.num_shared_experts * self._mlp(self.shared_intermediate_size, bias=bias)
        return self._mlp(self.dense_intermediate_size, bias=bias)

    def _mlp_vectors(self, is_moe: bool) -> int:
        """Return router, shared gate and MLP biases of a layer."""
        count = self._dense_mlp(is_moe, bias=self.dense_bias) - self._dense_mlp(is_moe, bias=False)
        if is_moe:
            count += self.num_experts * (self.hidden_size + int(self.router_bias)) + self.hidden_size * int(
                self.shared_gate
            )
        return count

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise InputError("layer", layer, f"not a layer of {self.name}", f"choose 0 to {self.num_layers - 1}")


def _check_model(model: ModelSpec) -> None:
    """Return nothing; raises InputError for the first field that contradicts another."""
    for name in ("hidden_size", "num_layers", "num_experts", "top_k", "expert_intermediate_size", "vocab_size"):
        if getattr(model, name) < 1:
            raise InputError(name, getattr(model, name), "below one", "check the model's configuration")
    if not model.moe_layers:
        raise InputError("moe_layers", (), "no layer has routed experts", "give a Mixture-of-Experts model")
    if model.top_k > model.num_experts:
        raise InputError(
            "top_k", model.top_k, f"more than the {model.num_experts} experts", "check the model's configuration"
        )
    for name, limit in (
        ("moe_layers", model.num_layers), ("sliding_layers", model.num_layers), ("recurrent_layers", model.num_layers),
        ("encoder_moe_layers", model.num_encoder_layers),
    ):  # fmt: skip
        layers = getattr(model, name)
        if list(layers) != sorted(set(layers)) or (layers and not 0 <= layers[0] <= layers[-1] < limit):
            raise InputError(
                name, layers, f"not distinct ascending layers below {limit}", "check the model's configuration"
            )
