"""Hugging Face `config.json` into a `ModelSpec`: one reader driven by the names that model families give the same thing.

Modelled: the sizes of every transformers family whose layers are attention (or a fixed-state mixer) plus an MLP or routed
experts of one size; keys that a family omits because they equal its defaults. Ignored: everything that changes neither sizes nor
counts (rotary scaling, dropout, router losses), extra heads for multi-token prediction, vision and audio towers. Families whose
layers do not fit this shape are refused by name rather than misread.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from .errors import InputError
from .specs import AttentionSpec, ModelSpec, RecurrentSpec

Size = Annotated[int, Field(ge=1, le=2**31)]
Count = Annotated[int, Field(ge=0, le=2**20)]
Layers = Annotated[int, Field(ge=1, le=4096)]
Uniform = Annotated[int, Field(ge=1, le=2**31)] | Annotated[list[Size], Field(min_length=1, max_length=4096)]
LayerList = Annotated[list[int], Field(max_length=4096)]
KindList = Annotated[list[str], Field(max_length=4096)]


def _names(*names: str) -> Any:
    """Return an optional field that takes the first of `names` that a configuration has."""
    return Field(default=None, validation_alias=AliasChoices(*names))


class HubConfig(BaseModel):
    """The keys of a `config.json` that sizes and counts depend on; all others are allowed and ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    model_type: str
    """Family."""
    vocab_size: Size
    hidden_size: Size = Field(validation_alias=AliasChoices("hidden_size", "d_model"))
    num_layers: Layers = Field(
        validation_alias=AliasChoices(
            "num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layers", "num_layers"
        )
    )
    """Decoder layers."""
    num_experts: Uniform = Field(
        validation_alias=AliasChoices(
            "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"
        )
    )
    top_k: Uniform = Field(
        validation_alias=AliasChoices(
            "num_experts_per_tok",
            "num_experts_per_token",
            "num_selected_experts",
            "moe_topk",
            "moe_top_k",
            "moe_k",
            "top_k_experts",
        )
    )
    expert_width: Uniform | None = _names("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size")
    """Width of a routed expert; the width of every MLP where absent."""
    width: Size | None = _names("intermediate_size", "d_ff", "decoder_ffn_dim")
    mlp_width: Size | None = _names("intermediate_size_mlp")
    """Width of dense layers where `intermediate_size` is that of experts (Llama 4)."""
    shared_width: Count | None = _names(
        "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"
    )
    num_shared: Uniform | Count | None = _names(
        "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"
    )
    num_heads: Size = Field(
        validation_alias=AliasChoices("num_attention_heads", "n_heads", "num_heads", "decoder_attention_heads")
    )
    num_kv_heads: Size | None = _names("num_key_value_heads", "kv_n_heads")
    head_dim: Size | None = _names("head_dim", "d_kv")
    kv_lora_rank: Size | None = None
    q_lora_rank: Size | None = None
    qk_rope_head_dim: Count | None = None
    qk_nope_head_dim: Count | None = None
    v_head_dim: Size | None = None
    attention_bias: bool = False
    qkv_bias: bool = False
    use_bias: bool = False
    lm_head_bias: bool = False
    use_qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_window: Count | None = _names("sliding_window", "attention_chunk_size")
    use_sliding_window: bool = True
    layer_types: KindList | None = None
    mlp_layer_types: KindList | None = None
    first_k_dense_replace: Count | None = _names("first_k_dense_replace", "num_dense_layers")
    moe_layer_freq: Size | LayerList | None = None
    decoder_sparse_step: Count | None = None
    encoder_sparse_step: Count | None = None
    mlp_only_layers: LayerList | None = None
    num_sparse_decoder_layers: Count | None = None
    num_sparse_encoder_layers: Count | None = None
    encoder_layers: Layers | None = None
    num_encoder_layers: Layers | None = _names("num_layers")
    """The encoder's where the decoder has a key of its own (T5 and its kin)."""
    expert_layer_period: Size | None = None
    expert_layer_offset: Count = 0
    attn_layer_period: Size | None = None
    attn_layer_offset: Count = 0
    full_attention_interval: Size | None = None
    interleave_moe_layer_step: Size | None = None
    moe_layers: LayerList | None = None
    moe_layer_start_index: Count | None = None
    moe_layer_end_index: int | None = None
    moe_layer_interval: Size = 1
    no_rope_layer_interval: Size | None = None
    attn_type_list: LayerList | None = None
    relative_attention_num_buckets: Count = 0
    is_encoder_decoder: bool = False
    linear_num_key_heads: Size | None = None
    linear_num_value_heads: Size = 1
    linear_key_head_dim: Size = 1
    linear_value_head_dim: Size = 1
    linear_conv_kernel_dim: Size = 4
    mamba_d_state: Size | None = None
    mamba_d_conv: Size = 4
    mamba_expand: Size = 2
    mamba_dt_rank: Size | str = "auto"
    mamba_n_heads: Size | None = None
    mamba_n_groups: Size = 1
    mamba_conv_bias: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the code of a model family fixes and its configuration does not say."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Keys a configuration may omit because they equal the family's own default."""
    gated: bool = True
    expert_bias: bool = False
    dense_bias: bool = False
    router_bias: bool = False
    shared_gate: bool = False
    norm_width: int = 1
    num_norms: int = 2
    bias: str = "qkvo"
    """Projections that have a bias where the configuration asks for one."""
    qk_norm: str = "none"
    """Norms of queries and keys: none, head (one head wide), full (all heads wide) or option (as `use_qk_norm` says)."""
    sinks: bool = False
    gated_attention: bool = False


_NO_WINDOW = {"use_sliding_window": False}
FAMILIES: Mapping[str, Family] = {
    "mixtral": Family(),
    "gpt_oss": Family(defaults={"attention_bias": True}, expert_bias=True, router_bias=True, sinks=True),
    "deepseek_v2": Family(),
    "deepseek_v3": Family(),
    "qwen2_moe": Family(defaults=_NO_WINDOW | {"qkv_bias": True}, bias="qkv", shared_gate=True),
    "qwen3_moe": Family(defaults=_NO_WINDOW, qk_norm="head"),
    "qwen3_next": Family(defaults={"full_attention_interval": 4}, qk_norm="head", gated_attention=True, shared_gate=True),
    "qwen3_5_moe": Family(
        defaults={"full_attention_interval": 4}, qk_norm="head", gated_attention=True, shared_gate=True
    ),
    "qwen3_vl_moe": Family(defaults=_NO_WINDOW, qk_norm="head"),
    "olmoe": Family(qk_norm="full"),
    "flex_olmo": Family(qk_norm="full"),
    "switch_transformers": Family(
        defaults={"num_experts_per_tok": 1, "tie_word_embeddings": True, "relative_attention_num_buckets": 32}, gated=False
    ),
    "nllb_moe": Family(
        defaults={"num_experts_per_tok": 2, "tie_word_embeddings": True, "attention_bias": True},
        gated=False, expert_bias=True, dense_bias=True, norm_width=2,
    ),
    "dbrx": Family(),
    "phimoe": Family(norm_width=2),
    "granitemoe": Family(),
    "granitemoeshared": Family(defaults={"num_shared_experts": 1}),
    "granitemoehybrid": Family(defaults={"num_shared_experts": 1}),
    "glm4_moe": Family(bias="qkv", qk_norm="option"),
    "dots1": Family(qk_norm="head"),
    "exaone_moe": Family(qk_norm="head"),
    "ernie4_5_moe": Family(
        defaults={"tie_word_embeddings": True, "moe_layer_start_index": 1, "moe_num_shared_experts": 2}, router_bias=True
    ),
    "minimax": Family(),
    "minimax_m2": Family(qk_norm="full"),
    "hunyuan_v1_moe": Family(defaults={"num_shared_experts": 1}, qk_norm="head"),
    "jamba": Family(defaults={"expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 8, "attn_layer_offset": 4}),
    "llama4": Family(defaults={"interleave_moe_layer_step": 1, "num_shared_experts": 1, "no_rope_layer_interval": 4}),
}  # fmt: skip
"""Families whose counts were compared with instantiated models. Others are read like mixtral: of 24 more in transformers
5.23 the totals come within 1.5 % (extra norms, indexers and gates are missed)."""

# Families whose layers are not "a mixer, then an MLP or uniform experts": reading them would give wrong sizes silently.
_REFUSED = (
    "longcat_flash",
    "jetmoe",
    "nemotron_h",
    "gemma4",
    "deepseek_v4",
    "arctic",
    "doge",
    "zamba",
    "lfm2_moe",
    "muse_spark",
)
_NESTED = ("thinker_config", "text_config", "language_config", "llm_config", "attn_config", "ffn_config")


def read_config(data: Mapping[str, Any], name: str, where: str) -> ModelSpec:
    """Return the model that the parsed `config.json` in `data` describes.

    name: what the model is called; where: shown in errors. Raises InputError for a missing key, a wrong type or size, keys
    that contradict each other, or a family whose layers this reader cannot describe.
    """
    flat = _flatten(data, where)
    family_name = flat.get("model_type")
    if not isinstance(family_name, str):
        raise InputError(
            f"{where}: model_type", family_name, "not the name of a model family", "give a Hugging Face config.json"
        )
    family_name = family_name.replace("-", "_").removesuffix("_text")
    if family_name in _REFUSED:
        raise InputError(
            f"{where}: model_type",
            family_name,
            "this family's layers are not of the supported shape",
            "choose another model",
        )
    family = FAMILIES.get(family_name, Family())
    merged = {**family.defaults, **flat, "model_type": family_name}
    try:
        config = HubConfig.model_validate({key: value for key, value in merged.items() if value is not None})
    except ValidationError as error:
        raise _as_input_error(error, where) from None
    return dataclasses.replace(_build(config, family, name, where), native_bits=_native_bits(flat))


def _native_bits(flat: Mapping[str, Any]) -> str:
    """Return the weight format a checkpoint stores experts in: its quantisation if it states one we know, else its dtype."""
    quantisation = flat.get("quantization_config")
    method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else None
    if method in ("mxfp4", "fp8"):
        return {"mxfp4": "mxfp4", "fp8": "8"}[method]
    return "32" if "float32" in (flat.get("torch_dtype"), flat.get("dtype")) else "16"


def _flatten(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the configuration with its nested tables of sizes lifted to the top, one level deep; inner keys win."""
    flat = dict(data)
    for key in _NESTED:
        inner = flat.pop(key, None)
        if inner is None:
            continue
        if not isinstance(inner, Mapping):
            raise InputError(f"{where}: {key}", inner, "not a table", "give a Hugging Face config.json")
        # A nested table may carry an empty family name; it does not rename the model.
        flat |= {name: value for name, value in inner.items() if name != "model_type" or value}
    return flat


def _as_input_error(error: ValidationError, where: str) -> InputError:
    """Return the first complaint of a validation as one line."""
    first = error.errors(include_url=False)[0]
    field_name = ".".join(str(part) for part in first["loc"]) or "(top level)"
    value = "(absent)" if first["type"] == "missing" else first.get("input")
    return InputError(f"{where}: {field_name}", value, first["msg"].lower(), "correct the file")


def _build(c: HubConfig, family: Family, name: str, where: str) -> ModelSpec:
    """Return the model described by validated keys."""
    expert_width = _uniform(c.expert_width if c.expert_width is not None else c.width, "moe_intermediate_size", where)
    moe_layers = _moe_layers(c)
    sliding, recurrent_layers = _layer_kinds(c)
    num_shared = _uniform(c.num_shared, "num_shared_experts", where) if c.num_shared else 0
    shared_width = c.shared_width if c.shared_width is not None else (expert_width if num_shared else 0)
    if c.shared_width:
        num_shared = max(num_shared, 1)
    has_dense = len(moe_layers) < c.num_layers or c.is_encoder_decoder
    dense_width = (c.mlp_width or c.width or 0) if has_dense else 0
    if has_dense and dense_width == 0:
        raise InputError(
            f"{where}: intermediate_size",
            "(absent)",
            "some layers are dense but their width is not given",
            "add the key",
        )
    encoder_layers = (c.encoder_layers or c.num_encoder_layers or c.num_layers) if c.is_encoder_decoder else 0
    return ModelSpec(
        name=name, family=c.model_type, hidden_size=c.hidden_size, num_layers=c.num_layers, moe_layers=moe_layers,
        num_experts=_uniform(c.num_experts, "num_experts", where), top_k=_uniform(c.top_k, "num_experts_per_tok", where),
        expert_intermediate_size=expert_width, gated=family.gated, vocab_size=c.vocab_size, attention=_attention(c, family, where),
        expert_bias=family.expert_bias, router_bias=family.router_bias, num_shared_experts=num_shared,
        shared_intermediate_size=shared_width if num_shared else 0, shared_gate=family.shared_gate and num_shared > 0,
        dense_intermediate_size=dense_width, dense_bias=family.dense_bias or c.use_bias, tied_embeddings=c.tie_word_embeddings,
        head_bias=c.lm_head_bias or (c.use_bias and c.model_type == "ernie4_5_moe"), num_norms_per_layer=family.num_norms,
        norm_width=family.norm_width, num_final_norms=2 if c.is_encoder_decoder else 1,
        other_parameters=2 * c.relative_attention_num_buckets * c.num_heads if c.is_encoder_decoder else 0,
        sliding_layers=sliding, sliding_window=c.sliding_window if sliding else None,
        recurrent=_recurrent(c, where) if recurrent_layers else None, recurrent_layers=recurrent_layers,
        num_encoder_layers=encoder_layers, encoder_moe_layers=_encoder_moe_layers(c, encoder_layers),
        cross_attention=c.is_encoder_decoder,
    )  # fmt: skip


def _uniform(value: int | list[int] | None, key: str, where: str) -> int:
    """Return the one value of a key that may be given per layer; raises InputError where layers differ."""
    if value is None:
        raise InputError(f"{where}: {key}", "(absent)", "the key is needed", "add the key")
    if isinstance(value, int):
        return value
    if len(set(value)) != 1:
        raise InputError(f"{where}: {key}", value, "differs between layers, which is not supported", "give one value")
    return value[0]


def _attention(c: HubConfig, family: Family, where: str) -> AttentionSpec:
    """Return the attention of the model's attention layers."""
    heads, kv_heads = c.num_heads, c.num_kv_heads or c.num_heads
    if heads % kv_heads:
        raise InputError(
            f"{where}: num_key_value_heads", kv_heads, f"does not divide the {heads} heads", "correct the file"
        )
    if c.kv_lora_rank is not None:
        rope, nope = c.qk_rope_head_dim or 0, c.qk_nope_head_dim or 0
        if rope + nope == 0:
            raise InputError(
                f"{where}: qk_nope_head_dim",
                nope,
                "latent attention without a head width",
                "add qk_nope_head_dim and qk_rope_head_dim",
            )
        vectors = c.kv_lora_rank + (c.q_lora_rank or 0)  # norms of the latents
        if c.attention_bias:
            vectors += (c.q_lora_rank or 0) + c.kv_lora_rank + rope + c.hidden_size
        return AttentionSpec(
            kind="mla", num_heads=heads, num_kv_heads=heads, head_dim=rope + nope, v_head_dim=c.v_head_dim or nope,
            q_lora_rank=c.q_lora_rank, kv_lora_rank=c.kv_lora_rank, qk_rope_head_dim=rope, qk_nope_head_dim=nope,
            vector_parameters=vectors,
        )  # fmt: skip
    head_dim = c.head_dim or c.hidden_size // heads
    if head_dim == 0:
        raise InputError(
            f"{where}: num_attention_heads",
            heads,
            f"more heads than the {c.hidden_size} hidden values",
            "correct the file",
        )
    v_dim = c.v_head_dim or head_dim
    widths = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * v_dim, "o": c.hidden_size}
    vectors = sum(widths[part] for part in family.bias) if c.attention_bias or c.qkv_bias or c.use_bias else 0
    if family.qk_norm == "head" or (family.qk_norm == "option" and c.use_qk_norm):
        vectors += 2 * head_dim
    elif family.qk_norm == "full":
        vectors += widths["q"] + widths["k"]
    return AttentionSpec(
        kind="mha" if kv_heads == heads else "gqa", num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, v_head_dim=v_dim,
        gated=family.gated_attention, vector_parameters=vectors + (heads if family.sinks else 0),
    )  # fmt: skip


def _moe_layers(c: HubConfig) -> tuple[int, ...]:
    """Return the decoder layers with routed experts: every key that thins them out does so."""
    n = c.num_layers
    if c.moe_layers is not None:
        return tuple(sorted(set(c.moe_layers)))
    if c.num_sparse_decoder_layers is not None:
        return _every(n, c.num_sparse_decoder_layers)
    layers = set(range(n))
    if c.mlp_layer_types is not None:
        layers &= {layer for layer, kind in enumerate(c.mlp_layer_types) if kind in ("sparse", "moe")}
    if c.interleave_moe_layer_step is not None:
        layers &= set(range(c.interleave_moe_layer_step - 1, n, c.interleave_moe_layer_step))
    if c.expert_layer_period is not None:
        layers &= set(range(c.expert_layer_offset, n, c.expert_layer_period))
    if c.first_k_dense_replace is not None:
        layers -= set(range(min(c.first_k_dense_replace, n)))
    if isinstance(c.moe_layer_freq, int):
        layers &= set(range(0, n, c.moe_layer_freq))
    elif c.moe_layer_freq is not None:
        layers &= {layer for layer, on in enumerate(c.moe_layer_freq) if on}
    if c.decoder_sparse_step is not None:
        step = c.decoder_sparse_step
        layers &= set(range(step - 1, n, step)) if step else set()
    layers -= set(c.mlp_only_layers or ())
    if c.moe_layer_start_index is not None:
        end = n - 1 if c.moe_layer_end_index in (None, -1) else int(c.moe_layer_end_index or 0)
        interval = c.moe_layer_interval
        layers &= {
            layer for layer in range(c.moe_layer_start_index, min(end, n - 1) + 1) if (layer + 1) % interval == 0
        }
    return tuple(sorted(layers))


def _every(num_layers: int, num_sparse: int) -> tuple[int, ...]:
    """Return the sparse layers of a stack that spreads `num_sparse` of them evenly, as T5-like stacks do."""
    if num_sparse == 0:
        return ()
    step = max(1, num_layers // num_sparse)
    return tuple(layer for layer in range(num_layers) if step == 1 or layer % step == 1)


def _encoder_moe_layers(c: HubConfig, num_layers: int) -> tuple[int, ...]:
    """Return the encoder layers with routed experts."""
    if num_layers == 0:
        return ()
    if c.num_sparse_encoder_layers is not None:
        return _every(num_layers, c.num_sparse_encoder_layers)
    step = c.encoder_sparse_step or 1
    return tuple(range(step - 1, num_layers, step))


def _layer_kinds(c: HubConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (layers with a sliding window, layers with a fixed state instead of attention)."""
    n, window = c.num_layers, bool(c.sliding_window) and c.use_sliding_window
    if c.layer_types is not None:
        kinds = list(enumerate(c.layer_types[:n]))
        sliding = tuple(layer for layer, kind in kinds if kind in ("sliding_attention", "chunked_attention"))
        return sliding if window else (), tuple(layer for layer, kind in kinds if kind in ("linear_attention", "mamba"))
    if c.attn_type_list is not None:
        return (), tuple(layer for layer, kind in enumerate(c.attn_type_list[:n]) if kind == 0)
    if c.full_attention_interval is not None and c.linear_num_key_heads is not None:
        return (), tuple(layer for layer in range(n) if (layer + 1) % c.full_attention_interval)
    if c.attn_layer_period is not None:
        return (), tuple(layer for layer in range(n) if layer % c.attn_layer_period != c.attn_layer_offset)
    if not window:
        return (), ()
    if c.model_type == "gpt_oss":
        return tuple(range(0, n, 2)), ()
    if c.no_rope_layer_interval is not None:
        return tuple(layer for layer in range(n) if (layer + 1) % c.no_rope_layer_interval), ()
    return tuple(range(n)), ()


def _recurrent(c: HubConfig, where: str) -> RecurrentSpec:
    """Return the mixer of layers that keep a fixed state; raises InputError where its sizes are not given."""
    hidden = c.hidden_size
    if c.linear_num_key_heads is not None:
        keys, values = (
            c.linear_num_key_heads * c.linear_key_head_dim,
            c.linear_num_value_heads * c.linear_value_head_dim,
        )
        channels = 2 * keys + values
        return RecurrentSpec(
            kind="gated_delta_net",
            matrix_parameters=hidden * (2 * keys + 2 * values + 2 * c.linear_num_value_heads) + values * hidden,
            vector_parameters=channels * c.linear_conv_kernel_dim
            + 2 * c.linear_num_value_heads
            + c.linear_value_head_dim,
            state_values=c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim
            + channels * (c.linear_conv_kernel_dim - 1),
        )
    if c.model_type == "minimax":
        head_dim = c.head_dim or hidden // c.num_heads
        wide = c.num_heads * head_dim
        return RecurrentSpec(
            kind="lightning_attention",
            matrix_parameters=5 * hidden * wide,
            vector_parameters=wide,
            state_values=wide * head_dim,
        )
    if c.mamba_d_state is None:
        raise InputError(
            f"{where}: layer_types",
            c.layer_types,
            "layers with a fixed state of an unknown kind",
            "choose another model",
        )
    wide, state, conv = c.mamba_expand * hidden, c.mamba_d_state, c.mamba_d_conv
    if c.mamba_n_heads is not None:
        channels = wide + 2 * c.mamba_n_groups * state
        return RecurrentSpec(
            kind="mamba2", matrix_parameters=hidden * (wide + channels + c.mamba_n_heads) + wide * hidden,
            vector_parameters=channels * (conv + int(c.mamba_conv_bias)) + 3 * c.mamba_n_heads + wide,
            state_values=wide * state + channels * (conv - 1),
        )  # fmt: skip
    rank = math.ceil(hidden / 16) if isinstance(c.mamba_dt_rank, str) else c.mamba_dt_rank
    return RecurrentSpec(
        kind="mamba", matrix_parameters=hidden * 2 * wide + wide * (rank + 2 * state) + rank * wide + wide * hidden,
        vector_parameters=wide * (conv + int(c.mamba_conv_bias)) + wide + wide * state + wide + rank + 2 * state,
        state_values=wide * state + wide * (conv - 1),
    )  # fmt: skip
