"""A parsed `config.json` into a `ModelSpec`: nested tables flattened, the family found, its keys read, the rest looked at.

Modelled: every family whose layers are attention (or a fixed-state mixer), an MLP, routed experts of one size, or several of
these. Ignored: extra heads for multi-token prediction, vision and audio towers. A key that nobody knows and that may shape layers
is refused by name rather than passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....base.errors import InputError
from .. import LayerVariant, ModelSpec
from .families import FAMILIES, REFUSED
from .family import Draft, Family
from .keys import Keys
from .layers import encoder_moe_layers, find_layer_kinds, find_moe_layers
from .mixers import draft_attention, draft_recurrent
from .quantisation import stored_as

_TEXT = ("thinker_config", "text_config", "language_config", "llm_config")
_SIZES = ("attn_config", "ffn_config")
# Of a model with towers, what stands outside its language model and yet is about it.
_OUTSIDE = (
    "tie_word_embeddings",
    "quantization_config",
    "quantization",
    "torch_dtype",
    "dtype",
    "model_type",
    "_name_or_path",
)
NAMES: Mapping[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layers", "num_layers", "n_layer"),
    "hidden": ("hidden_size", "d_model"),
    "vocab": ("vocab_size",),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"),
    "top_k": (
        "num_experts_per_tok", "num_experts_per_token", "num_selected_experts", "moe_topk", "moe_top_k", "moe_k", "top_k_experts",
    ),
    "expert_width": ("moe_intermediate_size", "expert_ffn_hidden_size"),
    "width": ("intermediate_size", "ffn_hidden_size", "d_ff"),
    "shared_width": (
        "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim",
    ),
    "all_shared_width": ("shared_experts_intermediate_size",),
    "num_shared": (
        "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert",
    ),
    "dense_width": ("intermediate_size_mlp", "dense_intermediate_size", "prefix_dense_intermediate_size"),
}  # fmt: skip
"""What every decoder with experts has, and what configurations call it."""
_CONTEXT = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions")
"""Keys for the longest context, the usual one first."""


def read_config(data: Mapping[str, Any], name: str, where: str, beside: Mapping[str, Any] | None = None) -> ModelSpec:
    """Return the model that the parsed `config.json` in `data` describes.

    name: what the model is called; where: shown in errors; beside: the `hf_quant_config.json` of the same folder. Raises
    InputError for a missing key, a wrong type or size, keys that contradict each other, a key that may shape layers and that
    the family is not known to have, or a family whose layers this reader cannot describe.
    """
    flat = _flatten(data, where)
    family_name = flat.get("model_type")
    if not isinstance(family_name, str):
        raise InputError(
            f"{where}: model_type", family_name, "not the name of a model family", "give a Hugging Face config.json"
        )
    family_name = family_name.replace("-", "_").removesuffix("_text")
    if family_name in REFUSED:
        raise InputError(f"{where}: model_type", family_name, REFUSED[family_name], "choose another model")
    family = FAMILIES.get(family_name, Family())
    keys = Keys(flat, where)
    keys.known("model_type")
    if family.prepare is not None:
        family.prepare(keys)
    for key, value in family.defaults.items():
        if not any(keys.has(name) for name in _other_names(key)):
            keys.default(key, value)
    try:
        draft = _draft(keys, family, name, family_name)
        if family.finish is not None:
            family.finish(keys, draft)
        keys.known(*family.harmless)
        keys.check_all_known(family_name)
        stored = stored_as(flat, beside, name, draft.fields, where)
        draft.remarks += stored.remarks
        if draft_layers := keys.data.get("num_nextn_predict_layers"):
            draft.remarks.append(
                f"draft layers for multi-token prediction (num_nextn_predict_layers = {draft_layers}) are not counted"
            )
        return ModelSpec(
            **draft.fields, layer_variants=_variants(draft), longest_context=_longest_context(flat),
            native_bits=stored.experts, native_dense_bits=stored.dense,
            remarks=tuple(draft.remarks),
        )  # fmt: skip
    except InputError as error:  # a rule of the model itself
        if error.field.startswith(where):
            raise
        raise InputError(f"{where}: {error.field}", error.value, error.rule, error.remedy) from None


def _longest_context(flat: Mapping[str, Any]) -> int | None:
    """Return the tokens of context that a configuration names; None where it names none, or no size."""
    found = (flat.get(key) for key in _CONTEXT)
    return next((size for size in found if type(size) is int and size > 0), None)


def _other_names(key: str) -> tuple[str, ...]:
    """Return the names that stand for the same thing as `key`."""
    return next((names for names in NAMES.values() if key in names), (key,))


def _flatten(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the configuration with its nested tables of sizes lifted to the top; inner keys win."""
    flat = dict(data)
    for key in _TEXT:
        inner = flat.get(key)
        if inner is None:
            continue
        if not isinstance(inner, Mapping):
            raise InputError(f"{where}: {key}", inner, "not a table", "give a Hugging Face config.json")
        outside = {name: flat[name] for name in _OUTSIDE if flat.get(name) is not None}
        outside |= {name: flat[name] for name in _TEXT if name != key and isinstance(flat.get(name), Mapping)}
        flat = outside | {name: value for name, value in inner.items() if value not in (None, "")}
        if "tie_word_embeddings" in outside:
            flat["tie_word_embeddings"] = outside["tie_word_embeddings"]
    for key in _SIZES:
        inner = flat.pop(key, None)
        if inner is None:
            continue
        if not isinstance(inner, Mapping):
            raise InputError(f"{where}: {key}", inner, "not a table", "give a Hugging Face config.json")
        # A nested table may carry an empty family name; it does not rename the model.
        flat |= {name: value for name, value in inner.items() if name != "model_type"}
    return flat


def _draft(keys: Keys, family: Family, name: str, family_name: str) -> Draft:
    """Return the model that the usual keys describe."""

    def names(what: str) -> tuple[str, ...]:
        return family.names.get(what, NAMES[what])

    num_layers = keys.number_of_layers(*names("num_layers"))
    hidden, vocab = keys.need(*names("hidden")), keys.need(*names("vocab"))
    experts = keys.uniform(*names("num_experts"))
    if experts is None:
        raise keys.refusal(names("num_experts")[0], "(absent)", "the key is needed", "add the key")
    top_k = keys.uniform(*names("top_k"))
    if top_k is None:
        raise keys.refusal(names("top_k")[0], "(absent)", "the key is needed", "add the key")
    width, dense_width = keys.uniform(*names("width")), keys.size(*names("dense_width"))
    expert_width = keys.uniform(*names("expert_width")) or width
    if expert_width is None:
        raise keys.refusal(names("expert_width")[0], "(absent)", "the key is needed", "add the key")
    num_shared, shared_width = _shared(keys, names, expert_width)
    both_stacks = keys.flag("is_encoder_decoder")
    encoder_layers = 0
    if both_stacks:
        encoder_layers = keys.few("encoder_layers") or keys.few("num_layers") or num_layers
    moe_layers = find_moe_layers(keys, num_layers)
    tied, plain_bias = keys.flag("tie_word_embeddings"), keys.flag("use_bias")
    draft = Draft(
        {
            "name": name, "family": family_name, "hidden_size": hidden, "num_layers": num_layers, "moe_layers": moe_layers,
            "num_experts": experts, "top_k": top_k, "expert_intermediate_size": expert_width, "gated": family.gated,
            "vocab_size": vocab, "expert_bias": family.expert_bias, "router_bias": family.router_bias,
            "num_shared_experts": num_shared, "shared_intermediate_size": shared_width if num_shared else 0,
            "shared_gate": family.shared_gate and num_shared > 0,
            "dense_bias": family.dense_bias or plain_bias or keys.flag("mlp_bias"), "tied_embeddings": tied,
            "head_bias": keys.flag("lm_head_bias") or (plain_bias and family_name == "ernie4_5_moe"),
            "num_norms_per_layer": family.num_norms, "norm_width": family.norm_width, "num_final_norms": 2 if both_stacks else 1,
            "num_encoder_layers": encoder_layers, "encoder_moe_layers": encoder_moe_layers(keys, encoder_layers),
            "cross_attention": both_stacks,
        }
    )  # fmt: skip
    kinds = find_layer_kinds(keys, family_name, num_layers, window_everywhere=family.window_everywhere)
    draft.fields |= {"sliding_layers": kinds.sliding, "sliding_window": kinds.window if kinds.sliding else None}
    draft.fields["recurrent_layers"] = kinds.recurrent
    draft_attention(keys, family, draft, kinds)
    if kinds.recurrent:
        draft.fields["recurrent"] = draft_recurrent(keys, family, draft, kinds)
    buckets = keys.count("relative_attention_num_buckets") or 0
    if both_stacks:
        draft.fields["other_parameters"] = 2 * buckets * draft.fields["attention"].num_heads
    _dense_width(keys, family, draft, dense_width or width)
    return draft


def _shared(keys: Keys, names: Any, expert_width: int) -> tuple[int, int]:
    """Return (shared experts, width of one)."""
    num_shared = keys.value(*names("num_shared"))
    count = (
        keys.uniform(*names("num_shared")) if isinstance(num_shared, list) else keys.count(*names("num_shared"))
    ) or 0
    width, together = keys.count(*names("shared_width")), keys.count(*names("all_shared_width"))
    if together:
        return 1, together
    if width:
        return max(count, 1), width
    return (0, 0) if width == 0 else (count, expert_width)


def _dense_width(keys: Keys, family: Family, draft: Draft, width: int | None) -> None:
    """Set the width of dense MLPs; raises InputError where some layer has one and no width is given."""
    fields = draft.fields
    kinds_without = family.finish is not None and family.names.get("dense") == ()
    has_dense = len(fields["moe_layers"]) < fields["num_layers"] or fields["cross_attention"]
    if has_dense and width is None and not kinds_without:
        rule = "some layers are dense but their width is not given"
        raise keys.refusal("intermediate_size", "(absent)", rule, "add the key")
    fields["dense_intermediate_size"] = (width or 0) if has_dense else 0


def _variants(draft: Draft) -> tuple[LayerVariant, ...]:
    """Return what differs in single layers, alike layers together."""
    together: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for layer in sorted(draft.differ):
        together.setdefault(tuple(sorted(draft.differ[layer].items(), key=lambda item: item[0])), []).append(layer)
    return tuple(LayerVariant(layers=tuple(layers), **dict(changes)) for changes, layers in together.items() if changes)
