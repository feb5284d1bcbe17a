"""A model as one of several cards sees it that divide every layer among them (tensor parallel).

Modelled: heads, widths of MLPs and experts, and the vocabulary by the number of cards; key–value heads as long as there are enough, then
one each; latents, norms and routers whole on every card. Ignored: padding where a vocabulary does not divide.
"""

from __future__ import annotations

import dataclasses

from ...base.errors import InputError
from .mixers import AttentionSpec, LayerVariant, RecurrentSpec
from .model import ModelSpec


def divided(model: ModelSpec, num_cards: int, *, evenly: bool = True) -> ModelSpec:
    """Return the part of `model` that each of `num_cards` cards computes; raises InputError where heads or experts do not divide.

    evenly: False rounds up instead, where whatever does not divide is padded.
    """
    attentions = [model.attention, *(variant.attention for variant in model.layer_variants if variant.attention)]
    for name, size in (
        ("heads", max(one.num_heads for one in attentions)),
        ("expert width", model.expert_intermediate_size),
    ):
        if evenly and size % num_cards:
            raise InputError("tensor split", f"{num_cards} cards", f"{model.name} has {name} {size}, which they do not divide",
                             "use as many cards as divide it, or split layers")  # fmt: skip
    return dataclasses.replace(
        model, attention=_attention(model.attention, num_cards), expert_intermediate_size=_part(model.expert_intermediate_size, num_cards),
        shared_intermediate_size=_part(model.shared_intermediate_size, num_cards),
        dense_intermediate_size=_part(model.dense_intermediate_size, num_cards), vocab_size=_part(model.vocab_size, num_cards),
        recurrent=_recurrent(model.recurrent, num_cards),
        layer_variants=tuple(_variant(one, num_cards) for one in model.layer_variants),
    )  # fmt: skip


def _part(size: int, num_cards: int) -> int:
    return -(-size // num_cards)


def _attention(spec: AttentionSpec, num_cards: int) -> AttentionSpec:
    return dataclasses.replace(
        spec, num_heads=_part(spec.num_heads, num_cards), num_kv_heads=_part(spec.num_kv_heads, num_cards),
        projections=None if spec.projections is None else _part(spec.projections, num_cards),
        extra_matrix_parameters=_part(spec.extra_matrix_parameters, num_cards),
    )  # fmt: skip


def _recurrent(spec: RecurrentSpec | None, num_cards: int) -> RecurrentSpec | None:
    if spec is None:
        return None
    return dataclasses.replace(
        spec,
        matrix_parameters=_part(spec.matrix_parameters, num_cards),
        state_values=_part(spec.state_values, num_cards),
        projections=(),
    )


def _variant(variant: LayerVariant, num_cards: int) -> LayerVariant:
    width = variant.dense_intermediate_size
    return dataclasses.replace(
        variant, attention=None if variant.attention is None else _attention(variant.attention, num_cards),
        dense_intermediate_size=None if width is None else _part(width, num_cards),
        matrix_parameters=_part(variant.matrix_parameters, num_cards),
    )  # fmt: skip
