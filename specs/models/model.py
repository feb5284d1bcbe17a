"""A Mixture-of-Experts model: how many parameters, bytes and operations its layers are.

Modelled: what `shape` says a layer has. Counts are exact for the families the reader knows (compared with instantiated models in
the tests). Ignored: the padding a packer adds at the end of a row. Everything here is a plain dataclass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from .shape import ModelShape
from .weights import FLOPS_PER_WEIGHT, WeightFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec(ModelShape):
    """A Mixture-of-Experts language model, as far as memory and time depend on it: its shape, counted."""

    # --- experts -------------------------------------------------------------------------------------------------

    @property
    def expert_matrix_parameters(self) -> int:
        """Weights of one routed expert's matrices."""
        return self._mlp(self.expert_intermediate_size, bias=False, hidden=self.expert_hidden)

    @property
    def expert_vector_parameters(self) -> int:
        """Biases of one routed expert."""
        return self.expert_parameters - self.expert_matrix_parameters

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert."""
        return self._mlp(self.expert_intermediate_size, bias=self.expert_bias, hidden=self.expert_hidden)

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

    def dense_matrix_parameters(self, layer: int) -> int:
        """Return the weights of decoder layer `layer` that a quantiser may shrink: projections, dense and shared MLPs."""
        self._check_layer(layer)
        variant = self.variant(layer)
        if self.is_recurrent(layer) and self.recurrent is not None:
            mixer = self.recurrent.matrix_parameters
        else:
            mixer = (variant.attention or self.attention).matrix_parameters(self.hidden_size) * variant.num_mixers
        if self.cross_attention:
            mixer += self.attention.matrix_parameters(self.hidden_size)
        return mixer + self._dense_mlps(layer) + variant.matrix_parameters

    def dense_vector_parameters(self, layer: int) -> int:
        """Return the rest of decoder layer `layer` outside its routed experts: router, norms, biases."""
        self._check_layer(layer)
        variant = self.variant(layer)
        if self.is_recurrent(layer) and self.recurrent is not None:
            mixer = self.recurrent.vector_parameters
        else:
            mixer = (variant.attention or self.attention).vector_parameters * variant.num_mixers
        if self.cross_attention:
            mixer += self.attention.vector_parameters
        norms = self.num_norms_per_layer + int(self.cross_attention)
        further = variant.vector_parameters + norms * self.norm_width * self.hidden_size
        mlps = self._mlp_vectors(layer in self.moe_layers) if self._has_mlp(layer) else 0
        return mixer + further + mlps

    def dense_parameters(self, layer: int) -> int:
        """Return the parameters of decoder layer `layer` that are not in a routed expert, its tables not counted."""
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

        Matrices of attention, dense and shared MLPs are stored as `fmt`, token embedding and output matrix as it says; the rest
        stays at 16 bits or more.
        """
        matrices = self.encoder_matrix_parameters
        matrices += sum(self.dense_matrix_parameters(layer) for layer in range(self.num_layers))
        tables = fmt.embedding_bytes(self.table_parameters)
        return fmt.num_bytes(matrices) + fmt.vector_bytes(self.vector_parameters) + tables + self.embedding_bytes(fmt)

    @property
    def vector_parameters(self) -> int:
        """Norms, biases, routers and the like of the whole model, those in experts not counted."""
        outside = (
            self.encoder_vector_parameters + self._outside_layers - self.embedding_parameters - self.table_parameters
        )
        return outside + sum(self.dense_vector_parameters(layer) for layer in range(self.num_layers))

    def embedding_bytes(self, fmt: WeightFormat) -> int:
        """Return the bytes of token embedding and output matrix beside matrices of `fmt`; one that is both is stored as the latter."""
        values = self.vocab_size * self.hidden_size
        return fmt.head_bytes(values) + (0 if self.tied_embeddings else fmt.embedding_bytes(values))

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole model."""
        layers = sum(self.dense_parameters(layer) for layer in range(self.num_layers))
        encoder = self.encoder_matrix_parameters + self.encoder_vector_parameters
        return layers + encoder + self._outside_layers + self.num_routed_experts * self.expert_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: all but the experts it does not choose, and but rows of tables it does not read.

        Embeddings count whole, as model cards count them.
        """
        unchosen = max(0, self.num_experts - self.top_k) * (self.num_moe_layers + len(self.encoder_moe_layers))
        mixers = (self.attention_of(layer) for layer in range(self.num_layers))
        idle = sum(mixer.idle_parameters for mixer in mixers if mixer is not None) + self.table_parameters
        return self.total_parameters - unchosen * self.expert_parameters - idle

    # --- what grows with the context --------------------------------------------------------------------------------

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> int:
        """Return the bytes that one more token of a long context takes over all layers: full windows and states take none."""
        return round(sum(self._values_per_token(layer) for layer in range(self.num_layers)) * bytes_per_value)

    def kv_bytes(
        self, context_tokens: int, bytes_per_value: float = 2, encoder_tokens: int = 0, *, window_room: int = 0
    ) -> int:
        """Return the cache bytes of one request: windows are capped, states and cross-attention included.

        encoder_tokens: input tokens of an encoder–decoder, whose keys and values every decoder layer keeps. window_room: tokens
        that a window's cache has room for beside the window. States stay at 16 bits or more, whatever keys and values are kept in.
        """
        values = sum(self.kept_values(layer, context_tokens, window_room) for layer in range(self.num_layers))
        if self.cross_attention:
            values += encoder_tokens * self.num_layers * self.attention.kv_values_per_token
        return math.ceil(values * bytes_per_value) + math.ceil(self.state_values * max(bytes_per_value, 2))

    @property
    def state_values(self) -> int:
        """Values that layers with a state keep for each request, over all layers."""
        return len(self.recurrent_layers) * (self.recurrent.state_values if self.recurrent is not None else 0)

    def window_bytes(self, bytes_per_value: int = 2) -> int:
        """Return the bytes of all full sliding windows of one request."""
        values = 0
        for layer in range(self.num_layers):
            attention, window = self.attention_of(layer), self.window_of(layer)
            if attention is not None and window is not None and self.variant(layer).keeps_cache:
                values += self.variant(layer).num_mixers * window * attention.kv_values_per_token
        return values * bytes_per_value

    def kept_values(self, layer: int, context_tokens: int, window_room: int = 0) -> int:
        """Return the values that layer `layer` keeps of one request's context, states not counted."""
        attention, variant = self.attention_of(layer), self.variant(layer)
        if attention is None or not variant.keeps_cache:
            return 0
        window, entries = self.window_of(layer), context_tokens // attention.tokens_per_entry
        if window is not None:
            entries = min(context_tokens, window + window_room) + (entries if attention.compressed else 0)
        index = context_tokens // attention.tokens_per_index * attention.index_values
        return variant.num_mixers * (entries * attention.kv_values_per_token + index)

    def _values_per_token(self, layer: int) -> Fraction:
        """Return the values that one more token takes in layer `layer` once any window is full."""
        attention, variant = self.attention_of(layer), self.variant(layer)
        if attention is None or not variant.keeps_cache:
            return Fraction(0)
        grows = self.window_of(layer) is None or attention.compressed
        entries = Fraction(attention.kv_values_per_token if grows else 0, attention.tokens_per_entry)
        return variant.num_mixers * (entries + Fraction(attention.index_values, attention.tokens_per_index))

    # --- counting helpers -------------------------------------------------------------------------------------------

    @property
    def _outside_layers(self) -> int:
        """Embeddings, output bias, final norms and position tables."""
        norms = self.num_final_norms * self.norm_width * self.hidden_size
        head = self.vocab_size * int(self.head_bias)
        return self.embedding_parameters + norms + head + self.other_parameters + self.table_parameters

    @property
    def table_parameters(self) -> int:
        """Tables of layers of which a token reads a few rows."""
        return sum(len(variant.layers) * variant.table_parameters for variant in self.layer_variants)

    def _mlp(self, width: int, *, bias: bool, hidden: int | None = None) -> int:
        """Return the parameters of one MLP of `width` on vectors of `hidden`, with or without its biases."""
        into, outer = 2 if self.gated else 1, self.hidden_size if hidden is None else hidden
        return (into + 1) * outer * width + (into * width + outer if bias and width else 0)

    def _dense_mlps(self, layer: int) -> int:
        """Return the weights of layer `layer`'s MLPs outside routed experts."""
        is_moe, variant = layer in self.moe_layers, self.variant(layer)
        count = int(not is_moe) if variant.num_dense_mlps is None else variant.num_dense_mlps
        width = (
            self.dense_intermediate_size if variant.dense_intermediate_size is None else variant.dense_intermediate_size
        )
        shared = self._dense_mlp(True, bias=False) if is_moe else 0
        return shared + count * self._mlp(width, bias=False)

    def _dense_mlp(self, is_moe: bool, *, bias: bool) -> int:
        """Return the parameters of a layer's MLPs outside routed experts."""
        if is_moe:
            return self.num_shared_experts * self._mlp(self.shared_intermediate_size, bias=bias)
        return self._mlp(self.dense_intermediate_size, bias=bias)

    def _mlp_vectors(self, is_moe: bool) -> int:
        """Return router, shared gate and MLP biases of a layer."""
        count = self._dense_mlp(is_moe, bias=self.dense_bias) - self._dense_mlp(is_moe, bias=False)
        if is_moe:
            choices = self.num_experts + self.zero_experts
            count += choices * (self.hidden_size + int(self.router_bias)) + self.hidden_size * int(self.shared_gate)
        return count
