"""What a Mixture-of-Experts model looks like: the numbers of its configuration, and what each of its layers has.

Modelled: decoders and encoder–decoders with routed experts in some layers; sliding windows; layers that keep a fixed state
instead of a KV cache, that have no mixer, no MLP or two of each, or an attention of their own; gated and plain MLPs, biases,
shared experts, experts that work on a narrower vector, experts that do nothing, tied embeddings. Ignored: extra heads for
multi-token prediction, vision and audio towers, layers whose experts differ in size. What all this amounts to in parameters,
bytes and operations is counted in `model`; `config` reads and validates files.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

from ...base.errors import InputError
from .mixers import AttentionSpec, LayerVariant, RecurrentSpec
from .weights import weight_format

_USUAL = LayerVariant(layers=())


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
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
        _check_shape(self)

    @property
    def num_moe_layers(self) -> int:
        """Decoder layers with routed experts."""
        return len(self.moe_layers)

    @property
    def expert_hidden(self) -> int:
        """Width of the vector that is sent to an expert and comes back."""
        return self.expert_hidden_size or self.hidden_size

    @property
    def is_file(self) -> bool:
        """Whether it was read from a file that says how each of its matrices is stored."""
        return weight_format(self.native_dense_bits).head_bits is not None

    @property
    def usual_dense_bits(self) -> str:
        """The weight format of everything but routed experts where nobody says: the checkpoint's, 16 bits at most.

        Engines serve checkpoints of 32 bits in 16; a GGUF file is run as it is.
        """
        stored = weight_format(self.native_dense_bits)
        return self.native_dense_bits if self.is_file or stored.bits_per_weight <= 16 else "16"

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

    def first_layers(self, num_layers: int) -> Self:
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

    def _has_mlp(self, layer: int) -> bool:
        """Return whether layer `layer` has an MLP of any kind."""
        return layer in self.moe_layers or self.variant(layer).num_dense_mlps != 0

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise InputError("layer", layer, f"not a layer of {self.name}", f"choose 0 to {self.num_layers - 1}")


def _check_shape(model: ModelShape) -> None:
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
