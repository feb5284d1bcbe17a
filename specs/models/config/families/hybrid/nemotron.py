"""Nemotron-H and Nemotron-3 (NVIDIA): each layer is one thing, a Mamba-2 state, attention, an MLP or experts.

Ignored: draft layers, the precision of states, limits of time steps.
"""

from __future__ import annotations

from ...family import Draft, Family
from ...keys import Keys

_LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_WORDS = {"mamba": "linear_attention", "attention": "full_attention", **{word: word for word in _LETTERS.values()}}


def _prepare(keys: Keys) -> None:
    pattern = keys.word("hybrid_override_pattern")
    words = keys.words("layers_block_type", "layer_types") if pattern is None else None
    keys.known("layers_block_type", "layer_types", "num_hidden_layers")
    if pattern is not None:
        unknown = sorted(set(pattern) - set(_LETTERS))
        if unknown or not pattern:
            raise keys.refusal("hybrid_override_pattern", pattern, "letters are M, *, - and E")
        words = [_LETTERS[letter] for letter in pattern]
    if not words or set(words) - set(_WORDS):
        raise keys.refusal(
            "layers_block_type",
            words or "(absent)",
            "not kinds of layers that are known",
            "add hybrid_override_pattern",
        )
    words = [_WORDS[word] for word in words]
    keys.put("_blocks", words)
    keys.put("num_hidden_layers", len(words))
    keys.data.pop("layers_block_type", None)
    keys.put("layer_types", [word if word == "linear_attention" else "full_attention" for word in words])
    keys.put("mlp_layer_types", ["sparse" if word == "moe" else "dense" for word in words])


def _finish(keys: Keys, draft: Draft) -> None:
    hidden, narrow = draft.fields["hidden_size"], keys.size("moe_latent_size")
    for layer, word in enumerate(keys.words("_blocks") or ()):
        if word in ("moe", "mlp"):
            draft.vary((layer,), num_mixers=0)
        else:
            draft.vary((layer,), num_dense_mlps=0)
    if narrow is not None:
        draft.fields["expert_hidden_size"] = narrow
        draft.vary(draft.fields["moe_layers"], matrix_parameters=2 * hidden * narrow)


FAMILIES = {
    "nemotron_h": Family(
        gated=False,
        num_norms=1,
        linear="mamba2",
        harmless=("mlp_hidden_act", "expand"),
        prepare=_prepare,
        finish=_finish,
    ),
}
