"""A Mixture-of-Experts model: what its layers consist of, and how many parameters, bytes and operations that is.

Modelled: decoders and encoder–decoders with routed experts in some layers; sliding windows; layers that keep a fixed state
instead of a KV cache, that have no mixer, no MLP or two of each, or an attention of their own; gated and plain MLPs, biases,
shared experts, experts that work on a narrower vector, experts that do nothing, tied embeddings. Counts are exact for the
families the reader knows (compared with instantiated models in the tests). Ignored: extra heads for multi-token prediction,
vision and audio towers, layers whose experts differ in size, the padding a packer adds at the end of a row. Everything here is
a plain dataclass: `config` reads and validates files.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from fractions import Fraction

from ...base.errors import InputError
from .mixers import AttentionSpec, LayerVariant, RecurrentSpec
from .weights import FLOPS_PER_WEIGHT, WeightFormat, weight_format

_USUAL = LayerVariant(layers=())


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
    longest_context: int | None = None
    """Tokens of context that it was made for; None where its configuration does not say."""
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
    native_dense_bits: str = "16"
    """Weight format in which the checkpoint stores attention projections, by name."""
    expert_hidden_size: int = 0
    """Width of the vector that experts take and give, where they work on a narrower one (latent experts); 0: `hidden_size`."""
    zero_experts: int = 0
    """Further choices of the router that pass a token on unchanged: no weights, no work."""
    layer_variants: tuple[LayerVariant, ...] = ()
    """What differs in some decoder layers."""
    remarks: tuple[str, ...] = ()
    """What a person should know about how the configuration was read: what is left out, what was taken from elsewhere."""

    def __post_init__(self) -> None:
        _check_model(self)

    # --- experts -------------------------------------------------------------------------------------------------

    @property
    def usual_dense_bits(self) -> str:
        """The weight format of everything but routed experts where nobody says: the checkpoint's, 16 bits at most.

        Engines serve checkpoints of 32 bits in 16; a GGUF file is run as it is.
        """
        stored = weight_format(self.native_dense_bits)
        return self.native_dense_bits if stored.head_bits is not None or stored.bits_per_weight <= 16 else "16"

    @property
    def num_moe_layers(self) -> int:
        """Decoder layers with routed experts."""
        return len(self.moe_layers)

    @property
    def expert_hidden(self) -> int:
        """Width of the vector that is sent to an expert and comes back."""
        return self.expert_hidden_size or self.hidden_size

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

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's self-attention."""
        return self.attention.matrix_parameters(self.hidden_size) + self.attention.vector_parameters

    def is_recurrent(self, layer: int) -> bool:
        """Return whether decoder layer `layer` keeps a state instead of a KV cache."""
        return layer in self.recurrent_layers

    def variant(self, layer: int) -> LayerVariant:
        """Return what differs in decoder layer `layer`; the usual layer where nothing does."""
        return next((one for one in self.layer_variants if layer in one.layers), _USUAL)

    def attention_of(self, layer: int) -> AttentionSpec | None:
        """Return the attention of decoder layer `layer`; None where it has a state or no mixer at all."""
        variant = self.variant(layer)
        if self.is_recurrent(layer) or variant.num_mixers == 0:
            return None
        return variant.attention or self.attention

    def window_of(self, layer: int) -> int | None:
        """Return how many of the last tokens decoder layer `layer` sees; None: all."""
        return self.sliding_window if layer in self.sliding_layers else None

    def kind_of(self, layer: int) -> tuple[bool, bool, bool, int]:
        """Return a mark that layers of one make share: they cost the same, whatever is routed in them."""
        at = next((at for at, one in enumerate(self.layer_variants) if layer in one.layers), -1)
        return layer in self.moe_layers, self.is_recurrent(layer), layer in self.sliding_layers, at

    def attended_tokens(self, layer: int, context_tokens: int, num_requests: int = 1) -> int:
        """Return how many of `context_tokens` (summed over requests) layer `layer` reads: entries, where they are compressed."""
        attention = self.attention_of(layer)
        if attention is None:
            return 0
        entries = context_tokens // attention.tokens_per_entry
        if attention.selected is not None:
            entries = min(entries, attention.selected * num_requests)
        if self.sliding_window is None or layer not in self.sliding_layers:
            return entries * self.variant(layer).num_mixers
        seen = min(context_tokens, self.sliding_window * num_requests) + (entries if attention.compressed else 0)
        return seen * self.variant(layer).num_mixers

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

    def first_layers(self, num_layers: int) -> ModelSpec:
        """Return the model's first `num_layers` decoder layers."""
        variants = []
        for variant in self.layer_variants:
            kept = tuple(layer for layer in variant.layers if layer < num_layers)
            variants += [dataclasses.replace(variant, layers=kept)] if kept else []
        return dataclasses.replace(
            self, num_layers=num_layers, layer_variants=tuple(variants),
            moe_layers=tuple(layer for layer in self.moe_layers if layer < num_layers),
            sliding_layers=tuple(layer for layer in self.sliding_layers if layer < num_layers),
            recurrent_layers=tuple(layer for layer in self.recurrent_layers if layer < num_layers),
        )  # fmt: skip

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

    def _has_mlp(self, layer: int) -> bool:
        """Return whether layer `layer` has an MLP of any kind."""
        return layer in self.moe_layers or self.variant(layer).num_dense_mlps != 0

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
    if model.top_k > model.num_experts + model.zero_experts:
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
    varied = [layer for variant in model.layer_variants for layer in variant.layers]
    if len(varied) != len(set(varied)) or any(not 0 <= layer < model.num_layers for layer in varied):
        rule = f"not distinct layers below {model.num_layers}"
        raise InputError("layer_variants", varied, rule, "check the model's configuration")
