"""LongCat-Flash (Meituan): each layer is a pair of attentions and dense MLPs beside one set of experts, some of which do nothing.

Ignored: scales of latents.
"""

from __future__ import annotations

from ..family import Draft, Family
from ..keys import Keys


def _finish(keys: Keys, draft: Draft) -> None:
    width, nothing = keys.need("ffn_hidden_size", "intermediate_size"), keys.count("zero_expert_num") or 0
    keys.known("head_dim")
    draft.fields |= {"dense_intermediate_size": width, "zero_experts": nothing}
    draft.vary(draft.all_layers, num_mixers=2, num_dense_mlps=2)
    if nothing:
        draft.remarks.append(
            f"{nothing} further choices of the router do nothing: they have no weights and none are counted (transformers' class "
            "allots some to them); a token meets top_k experts at most, fewer on average"
        )


FAMILIES = {"longcat_flash": Family(names={"expert_width": ("expert_ffn_hidden_size",)}, num_norms=4, finish=_finish)}
