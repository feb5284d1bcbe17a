"""The keys of a configuration, read by type and remembered: what nobody has read at the end is what a family does not know.

Modelled: values of the wrong type or size, one thing under two names with two values, keys that carry a size, a count, a rank, a
pattern or a list of layers and that no one has read. Ignored: keys that change neither sizes nor counts (rotary scaling, dropout,
losses, special tokens, generation defaults), whatever they hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from ....base.errors import InputError

_MOST_SIZE, _MOST_LAYERS = 2**31, 4096
T = TypeVar("T")

# Names of keys that shape layers, and names that look like it but do not.
_SHAPING = re.compile(
    r"(size|dims?|width|rank|heads?|layers?|experts?|nums?|count|list|types?|pattern|layout|freq|frequency|interval|period|"
    r"steps?|stride|ratios?|rates?|expand|kernel|windows?|topk|groups?|channels|blocks?|chunk|latent|hidden|ffn|mlp|intermediate|n|kv|depth|"
    r"share|shared|sharing|reuse|every|slots|expansion|mult)"
)
_HARMLESS = re.compile(
    r".*_token_ids?|.*_token_index|.*_token_type.*|(max|original_max|original_seq|model_max|train_max)_.*|seq_length|n_positions|"
    r"chunk_size_feed_forward|num_labels|num_beams|num_beam_groups|num_return_sequences|no_repeat_ngram_size|encoder_no_repeat_.*|"
    r"min_length|top_k|.*_dropout.*|initializer_.*|transformers_version|pretraining_tp|ep_size|tp_size|num_logits_to_keep|"
    r"n_group|topk_group|num_expert_group|topk_method|scoring_func|n_groups_router|moe_layer_id|router_.*(loss|coef|noise|factor|dtype).*|"
    r"(no_)?rope_.*|.*rope_(theta|scaling|parameters|type|layers|layout|interleave|base).*|.*rotary.*|.*mrope.*|nope_layer_interval|"
    r"num_(nextn_predict|mtp|mtp_hidden)_?.*|mtp_.*|.*_mtp_.*|n_mtp_.*|"
    r"(vision|visual|image|video|audio|mm|projector|media)_.*|.*_(image|video|audio|vision)_.*|spatial_merge_size|"
    r"hidden_act|hidden_activation|mlp_hidden_act|.*_activation.*|expert_capacity|.*_batch_size|position_embedding_type|"
    r"(use_)?mamba_kernels|mamba_.*_dtype|time_step_.*|chunk_size|mamba_chunk_size|quantization_config|quantization|"
    r"dtype|torch_dtype|auto_map|architectures|id2label|label2id|task_specific_params|pruned_heads|sinkhorn.*|hc_sinkhorn_iters|"
    r"log_scaling_n_floor|.*_loss_.*|.*_(alpha|beta)(_factor)?|seed|bad_words_ids|tokenizer_class|yarn_.*|model_type|problem_type|keys_to_ignore_.*|"
    r"use_return_dict|output_.*|norm_type|.*_norm_type|qk_head_dim|expert_selection_fn|shared_expert_combination_strategy|"
    r"moe_router_.*|router_type|fa_.*|.*softcap.*|.*_mup_.*|.*_multiplier|.*_threshold|.*_limits?|.*_scaling_factor|attn_implementation|_.*"
)


def _refuse(where: str, key: str, value: object, rule: str, remedy: str = "correct the file") -> InputError:
    return InputError(f"{where}: {key}", value, rule, remedy)


class Keys:
    """A flat configuration that remembers which of its keys were read."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = {key: value for key, value in data.items() if value is not None}
        self.where = where
        self._read: set[str] = set()
        self._over: Mapping[str, Any] = {}

    # --- reading by type --------------------------------------------------------------------------------------------

    def value(self, *names: str) -> Any:
        """Return what the configuration holds under one of `names`, None where it has none; raises where two differ."""
        self._read.update(names)
        for name in names:
            if name in self._over:
                return self._over[name]
        found = [(name, self.data[name]) for name in names if name in self.data]
        for name, value in found[1:]:
            if value != found[0][1]:
                raise self.refusal(name, value, f"contradicts {found[0][0]} = {str(found[0][1])[:40]}")
        return found[0][1] if found else None

    def size(self, *names: str) -> int | None:
        """Return an integer above zero, None where absent."""
        return self._integer(names, 1, _MOST_SIZE)

    def need(self, *names: str) -> int:
        """Return an integer above zero; raises InputError where absent."""
        found = self.size(*names)
        if found is None:
            raise self.refusal(names[0], "(absent)", "the key is needed", "add the key")
        return found

    def count(self, *names: str) -> int | None:
        """Return an integer from zero, None where absent."""
        return self._integer(names, 0, _MOST_SIZE)

    def few(self, *names: str) -> int | None:
        """Return a number of layers, None where absent."""
        return self._integer(names, 1, _MOST_LAYERS)

    def number_of_layers(self, *names: str) -> int:
        """Return how many layers there are."""
        found = self.few(*names)
        if found is None:
            raise self.refusal(names[0], "(absent)", "the key is needed", "add the key")
        return found

    def flag(self, *names: str, default: bool = False) -> bool:
        """Return a truth value."""
        found = self.value(*names)
        if found is None:
            return default
        if not isinstance(found, bool):
            raise self.refusal(self._held(names), found, "input should be a valid boolean")
        return found

    def word(self, *names: str) -> str | None:
        """Return a string, None where absent."""
        found = self.value(*names)
        if found is not None and not isinstance(found, str):
            raise self.refusal(self._held(names), found, "input should be a valid string")
        return found

    def words(self, *names: str) -> list[str] | None:
        """Return a list of strings, None where absent."""
        return self._list(names, str, "strings")

    def integers(self, *names: str) -> list[int] | None:
        """Return a list of integers, None where absent."""
        return self._list(names, int, "integers")

    def table(self, *names: str) -> Mapping[str, Any]:
        """Return a table, empty where absent."""
        found = self.value(*names)
        if found is None:
            return {}
        if not isinstance(found, Mapping):
            raise self.refusal(self._held(names), found, "not a table")
        return found

    def uniform(self, *names: str) -> int | None:
        """Return an integer above zero that may be given per layer; raises InputError where layers differ."""
        found = self.value(*names)
        if not isinstance(found, list):
            return self.size(*names)
        values = self.integers(*names) or []
        key = self._held(names)
        if not values or len(values) > _MOST_LAYERS:
            raise self.refusal(key, found, "a list without values, or of too many")
        if len(set(values)) != 1:
            raise self.refusal(key, found, "differs between layers, which is not supported", "choose another model")
        if not 1 <= values[0] <= _MOST_SIZE:
            raise self.refusal(key, found, "input should be greater than or equal to 1")
        return values[0]

    def per_layer(self, *names: str, num_layers: int, what: type[T]) -> list[T] | None:
        """Return a list with one entry for each layer (longer ones are cut: draft layers), None where absent."""
        found = self._list(names, what, "entries")
        if found is None:
            return None
        if len(found) < num_layers:
            rule = f"{len(found)} entries for {num_layers} layers"
            raise self.refusal(self._held(names), found, rule)
        return found[:num_layers]

    def _integer(self, names: tuple[str, ...], least: int, most: int) -> int | None:
        found = self.value(*names)
        if found is None:
            return None
        if not isinstance(found, int) or isinstance(found, bool):
            raise self.refusal(self._held(names), found, "input should be a valid integer")
        if found < least:
            raise self.refusal(self._held(names), found, f"input should be greater than or equal to {least}")
        if found > most:
            raise self.refusal(self._held(names), found, f"input should be less than or equal to {most}")
        return found

    def _list(self, names: tuple[str, ...], what: type[T], kind: str) -> list[T] | None:
        found = self.value(*names)
        if found is None:
            return None
        if not isinstance(found, list) or len(found) > _MOST_LAYERS:
            raise self.refusal(self._held(names), found, f"not a list of at most {_MOST_LAYERS} {kind}")
        for one in found:
            if not isinstance(one, what) or (what is int and isinstance(one, bool)):
                raise self.refusal(self._held(names), found, f"not a list of {kind}")
        return found

    def _held(self, names: tuple[str, ...]) -> str:
        return next((name for name in names if name in self._over or name in self.data), names[0])

    # --- rewriting --------------------------------------------------------------------------------------------------

    def put(self, key: str, value: Any) -> None:
        """Set `key`: a family's own spelling under the usual name."""
        self.data[key] = value

    def default(self, key: str, value: Any) -> None:
        """Set `key` where it is absent."""
        self.data.setdefault(key, value)

    def has(self, key: str) -> bool:
        """Return whether the configuration holds `key`; does not count as reading it."""
        return key in self.data

    def known(self, *names: str) -> None:
        """Count keys as read: they are known, and change no size."""
        self._read.update(names)

    @contextmanager
    def over(self, values: Mapping[str, Any]) -> Iterator[None]:
        """Read with `values` in place of the configuration's own, for layers that differ."""
        self._over = values
        try:
            yield
        finally:
            self._over = {}

    def refusal(self, key: str, value: object, rule: str, remedy: str = "correct the file") -> InputError:
        """Return the one line that names `key`."""
        return _refuse(self.where, key, value, rule, remedy)

    # --- what nobody has read ---------------------------------------------------------------------------------------

    def check_all_known(self, family: str) -> None:
        """Return nothing; raises InputError for the first key that may shape layers and that was not read."""
        for key, value in self.data.items():
            if key not in self._read and shapes_layers(key, value):
                rule = f"{family} models are not known to have this key, and it may change their size"
                raise self.refusal(key, value, rule, "remove it if it changes no size, or choose another model")


def shapes_layers(key: str, value: object) -> bool:
    """Return whether a key nobody knows may carry a size, a count, a rank, a pattern or a list of layers."""
    if isinstance(value, bool) or not value or _HARMLESS.fullmatch(key):
        return False
    words = re.split(r"[_\d]+", key.lower())
    named = any(_SHAPING.fullmatch(word) for word in words)
    if isinstance(value, int):
        return named and value > 0
    if isinstance(value, float):
        return named and any(word in ("expand", "ratio", "mlp", "ffn", "width", "intermediate", "hidden") for word in words) and \
            "act" not in words  # fmt: skip
    if isinstance(value, str):
        return named and any(word in ("pattern", "layout", "types", "layers", "list") for word in words)
    if isinstance(value, list):
        return named and all(isinstance(one, int | str) for one in value)
    if isinstance(value, Mapping):
        return any(shapes_layers(f"{inner}", one) for inner, one in value.items() if not isinstance(one, Mapping))
    return False
