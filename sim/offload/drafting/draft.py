"""What drafts: an n-gram look-up, the model's own MTP layer or a smaller model, with what a guess costs and what it keeps in memory.

Modelled: guesses are made one after another, one token a pass; an MTP layer is one more layer like the model's last and reads the output
matrix once more; a draft model runs whole on the first card. Ignored: what an n-gram look-up takes (microseconds on the host), MTP layers
of another shape, drafts made while the device verifies others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ....base.errors import InputError
from ....calibrate.costs.cost_model import CostModel, Estimate
from ....specs.drafting import Acceptance, share_accepted, tokens_per_step
from ....specs.models import ModelSpec, weight_format

NGRAM, MTP = "n-gram", "mtp"
KINDS = (NGRAM, MTP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """How tokens are drafted."""

    length: int
    """Guesses of a step."""
    acceptance: Acceptance
    model: ModelSpec | None = None
    """The draft model; None: n-gram or MTP."""
    mtp: bool = False

    def __post_init__(self) -> None:
        self.acceptance.up_to(self.length)  # refuses a length that it says nothing of

    @property
    def kind(self) -> str:
        """What drafts."""
        return self.model.name if self.model is not None else MTP if self.mtp else NGRAM

    @property
    def words(self) -> str:
        """The same for people."""
        mean = tokens_per_step(self.length, self.acceptance)
        return (
            f"{self.length} guesses a step by {self.kind}, accepted: {self.acceptance.words}; {mean:.3g} tokens a step"
        )

    def to_dict(self) -> dict[str, object]:
        """Return the drafting as plain values for files."""
        return {
            "length": self.length, "acceptance": self.acceptance.to_text(), "draft": self.kind,
            "tokens_per_step": tokens_per_step(self.length, self.acceptance),
            "share_accepted": share_accepted(self.length, self.acceptance),
        }  # fmt: skip

    def check(self, target: ModelSpec) -> None:
        """Return nothing; raises InputError for a draft model of another vocabulary."""
        if self.model is not None and self.model.vocab_size != target.vocab_size:
            rule = f"it has {self.model.vocab_size} words, {target.name} has {target.vocab_size}"
            raise InputError("--draft", self.model.name, rule, "draft with a model of the same vocabulary")

    def guess(
        self, costs: CostModel, target: ModelSpec, context: int, load: Callable[[ModelSpec], CostModel]
    ) -> Estimate | None:
        """Return what one guess takes at a context; None for an n-gram look-up. load: the costs of a draft model on the device."""
        if self.model is not None:
            mine = load(self.model)
            parts = [mine.dense_layer(layer, 1, context, 1) for layer in range(self.model.num_layers)]
            experts = _experts(mine, self.model) * len(self.model.moe_layers)
            return _sum([*parts, *experts, mine.head(1), mine.host_per_step()])
        if not self.mtp:
            return None
        return _sum(
            [
                costs.dense_layer(target.num_layers - 1, 1, context, 1),
                *_experts(costs, target),
                costs.head(1),
                costs.host_per_step(),
            ]
        )

    def held_bytes(self, target: ModelSpec, context: int, kv_bytes_per_value: float) -> int:
        """Return what drafting keeps on the device: weights, keys and values."""
        if self.model is not None:
            dense = weight_format(self.model.usual_dense_bits)
            experts = self.model.num_routed_experts * self.model.expert_bytes(weight_format(self.model.native_bits))
            return self.model.dense_bytes(dense) + experts + self.model.kv_bytes(context, kv_bytes_per_value)
        if not self.mtp:
            return 0
        last = target.num_layers - 1
        experts = (
            target.num_experts * target.expert_bytes(weight_format(target.native_bits))
            if last in target.moe_layers
            else 0
        )
        keys = math.ceil(target.kept_values(last, context, 0) * kv_bytes_per_value)
        return target.dense_layer_bytes(last, weight_format(target.usual_dense_bits)) + experts + keys


def _experts(costs: CostModel, model: ModelSpec) -> list[Estimate]:
    """Return what one token's experts of one layer take; nothing without experts."""
    if not model.moe_layers:
        return []
    fmt = weight_format(model.native_bits)
    return [costs.grouped_base(), *([costs.grouped_item(1, fmt)] * model.top_k)]


def _sum(parts: list[Estimate]) -> Estimate:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
