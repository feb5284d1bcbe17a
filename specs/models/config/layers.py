"""Which layers have experts, which see a window, which keep a state: every way configurations have of saying so.

Modelled: lists of words or of zeros and ones, steps, offsets, intervals, first and last layers. Ignored: which layers rotate
positions, which layers draft.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .keys import Keys

_FULL = ("full_attention", "global_attention", "attention", "indexed_attention", "hybrid", "global", "full",
         "deepseek_sparse_attention", "qwen_sparse_attention")  # fmt: skip
INDEXED = ("indexed_attention", "deepseek_sparse_attention", "full_attention")
"""What layers whose attention has an index are called."""
_SLIDING = ("sliding_attention", "chunked_attention", "hybrid_sliding", "local_attention", "local", "sliding")
_RECURRENT = ("linear_attention", "mamba", "conv", "recurrent", "mamba2")
_SPARSE = ("sparse", "moe", "hash_moe")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKinds:
    """Which decoder layers mix tokens how."""

    sliding: tuple[int, ...] = ()
    window: int | None = None
    recurrent: tuple[int, ...] = ()
    words: list[str] = field(default_factory=list)
    """What the configuration calls each layer; empty where it does not."""


def find_moe_layers(keys: Keys, n: int) -> tuple[int, ...]:
    """Return the decoder layers with routed experts: every key that thins them out does so."""
    chosen = keys.integers("moe_layers", "moe_layer_indices", "moe_layer_ids")
    spread = keys.count("num_sparse_decoder_layers")
    layers = set(range(n))
    kinds = keys.per_layer("mlp_layer_types", num_layers=n, what=str)
    if kinds is not None:
        unknown = set(kinds) - {*_SPARSE, "dense", "mlp", "none"}
        if unknown:
            raise keys.refusal(
                "mlp_layer_types", sorted(unknown), "kinds of layers that are not known", "choose another model"
            )
        layers &= {layer for layer, kind in enumerate(kinds) if kind in _SPARSE}
    step = keys.size("interleave_moe_layer_step")
    if step is not None:
        layers &= set(range(step - 1, n, step))
    period, offset = keys.size("expert_layer_period"), keys.count("expert_layer_offset") or 0
    if period is not None:
        layers &= set(range(offset, n, period))
    dense_first = keys.count("first_k_dense_replace", "num_dense_layers")
    if dense_first is not None:
        layers -= set(range(min(dense_first, n)))
    layers &= _by_frequency(keys, n)
    step = keys.count("decoder_sparse_step")
    if step is not None:
        layers &= set(range(step - 1, n, step)) if step else set()
    layers -= set(keys.integers("mlp_only_layers") or ())
    start, end, interval = (
        keys.count("moe_layer_start_index"),
        keys.value("moe_layer_end_index"),
        keys.size("moe_layer_interval"),
    )
    if start is not None:
        if end is not None and (not isinstance(end, int) or isinstance(end, bool)):
            raise keys.refusal("moe_layer_end_index", end, "input should be a valid integer")
        last = n - 1 if end in (None, -1) else min(int(end), n - 1)
        layers &= {layer for layer in range(start, last + 1) if (layer + 1) % (interval or 1) == 0}
    if spread is not None:
        return _every(n, spread)
    return tuple(sorted(set(chosen))) if chosen is not None else tuple(sorted(layers))


def _by_frequency(keys: Keys, n: int) -> set[int]:
    """Return the layers that `moe_layer_freq` leaves: a step, or zeros and ones."""
    if isinstance(keys.value("moe_layer_freq"), list):
        marks = keys.per_layer("moe_layer_freq", num_layers=n, what=int) or []
        return {layer for layer, on in enumerate(marks) if on}
    step = keys.size("moe_layer_freq")
    return set(range(0, n, step or 1))


def _every(num_layers: int, num_sparse: int) -> tuple[int, ...]:
    """Return the sparse layers of a stack that spreads `num_sparse` of them evenly, as T5-like stacks do."""
    if num_sparse == 0:
        return ()
    step = max(1, num_layers // num_sparse)
    return tuple(layer for layer in range(num_layers) if step == 1 or layer % step == 1)


def encoder_moe_layers(keys: Keys, num_layers: int) -> tuple[int, ...]:
    """Return the encoder layers with routed experts."""
    spread, step = keys.count("num_sparse_encoder_layers"), keys.count("encoder_sparse_step")
    if num_layers == 0:
        return ()
    return _every(num_layers, spread) if spread is not None else tuple(range((step or 1) - 1, num_layers, step or 1))


def find_layer_kinds(keys: Keys, family: str, n: int, *, window_everywhere: bool) -> LayerKinds:
    """Return which layers have a window or a state; raises InputError for a kind of layer that is not known."""
    window = keys.count("sliding_window", "sliding_window_size", "attention_chunk_size")
    on = keys.flag("use_sliding_window", default=True)
    longest = keys.value("max_position_embeddings")
    if isinstance(longest, int) and window is not None and window >= longest:
        window = None  # no context is long enough to meet it
    window = window if on and window else None
    types = keys.per_layer("layer_types", "layers_block_type", num_layers=n, what=str)
    pattern = keys.per_layer("attn_type_list", num_layers=n, what=int)
    interval, linear_heads = keys.size("full_attention_interval"), keys.has("linear_num_key_heads")
    period, offset = keys.size("attn_layer_period"), keys.count("attn_layer_offset") or 0
    chunked, first_full = keys.size("no_rope_layer_interval"), keys.count("max_window_layers")
    every = range(n)
    if types is not None:
        return _from_words(keys, types, window)
    if pattern is not None:
        return LayerKinds(recurrent=tuple(layer for layer in every if pattern[layer] == 0))
    if interval is not None and linear_heads:
        return LayerKinds(recurrent=tuple(layer for layer in every if (layer + 1) % interval))
    if period is not None:
        return LayerKinds(recurrent=tuple(layer for layer in every if layer % period != offset))
    if window is None:
        return LayerKinds()
    if family == "gpt_oss":
        return LayerKinds(sliding=tuple(range(0, n, 2)), window=window)
    if chunked is not None:
        return LayerKinds(sliding=tuple(layer for layer in every if (layer + 1) % chunked), window=window)
    if not window_everywhere:
        rule = f"sliding_window = {window} is set, and no key says which layers have it"
        raise keys.refusal("layer_types", "(absent)", rule, "add the key")
    # Qwen's code: layers from `max_window_layers` on.
    begin = min(first_full, n) if keys.has("use_sliding_window") and first_full else 0
    return LayerKinds(sliding=tuple(range(begin, n)), window=window)


def _from_words(keys: Keys, types: list[str], window: int | None) -> LayerKinds:
    unknown: set[Any] = set(types) - {*_FULL, *_SLIDING, *_RECURRENT}
    if unknown:
        raise keys.refusal("layer_types", sorted(unknown), "kinds of layers that are not known", "choose another model")
    sliding = tuple(layer for layer, kind in enumerate(types) if kind in _SLIDING) if window else ()
    recurrent = tuple(layer for layer, kind in enumerate(types) if kind in _RECURRENT)
    return LayerKinds(sliding=sliding, window=window, recurrent=recurrent, words=types)
