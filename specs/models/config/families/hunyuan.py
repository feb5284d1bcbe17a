"""Hunyuan (Tencent).

Ignored: vision parts, clamps of activations.
"""

from __future__ import annotations

from ..family import Draft, Family
from ..keys import Keys
from .deepseek import add_hyper_connections


def _v1(keys: Keys, draft: Draft) -> None:
    """Layers may share keys and values, by a factor that counts only where this is switched on."""
    if keys.flag("use_cla"):
        raise keys.refusal(
            "use_cla", True, "layers share keys and values, which is not counted yet", "choose another model"
        )
    if skipped := keys.count("moe_layer_num_skipped"):
        draft.fields["moe_layers"] = tuple(layer for layer in draft.fields["moe_layers"] if layer >= skipped)


def _v4(keys: Keys, draft: Draft) -> None:
    """Residual streams."""
    add_hyper_connections(keys, draft, rows=2 * keys.need("hc_mult"), head=True)


FAMILIES = {
    "hunyuan_v1_moe": Family(
        defaults={"num_shared_experts": 1},
        qk_norm="head",
        finish=_v1,
        harmless=(
            "anyres_pooling_size",
            "class_num",
            "dense_list",
            "org_vocab_size",
            "num_media_embeds",
            "cla_share_factor",
            "moe_layer_num_skipped",
        ),
    ),
    "hy_v3": Family(qk_norm="head"),
    "hy_v4": Family(sinks=True, gate="full", finish=_v4),
}
