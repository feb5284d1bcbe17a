"""What drafts: an n-gram look-up, the model's own MTP layer or a smaller model, with what a guess costs and what it keeps in memory.

Modelled: guesses are made one after another, one token of every request a pass; an MTP layer is one more layer like the model's last and
reads the output matrix once more; a draft model runs whole on the card of the output matrix. Ignored: what an n-gram look-up takes
(microseconds on the host), MTP layers of another shape, drafts made while the device verifies others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from ....base.errors import InputError
from ....calibrate.costs.cost_model import CostModel
from ....calibrate.costs.estimate import Estimate
from ....specs.drafting import Acceptance, read_acceptance, share_accepted, tokens_per_step
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

    def provenance(self) -> dict[str, object]:
        """Return what `drafting_from_dict` reads as the same, a draft model whole."""
        return {
            "length": self.length, "acceptance": self.acceptance.to_text(), "draft": self.kind,
            "model": None if self.model is None else dataclasses.asdict(self.model),
        }  # fmt: skip

    def check(self, target: ModelSpec) -> None:
        """Return nothing; raises InputError for a draft model of another vocabulary."""
        if self.model is not None and self.model.vocab_size != target.vocab_size:
            rule = f"it has {self.model.vocab_size} words, {target.name} has {target.vocab_size}"
            raise InputError("--draft", self.model.name, rule, "draft with a model of the same vocabulary")

    def guess(
        self, costs: CostModel, target: ModelSpec, context: int, requests: int, load: Callable[[ModelSpec], CostModel]
    ) -> tuple[Estimate, ...]:
        """Return what one guess for each of 1, 2, … `requests` takes at a context; () for an n-gram look-up.

        load: the costs of a draft model on the device.
        """
        if self.model is not None:
            mine = load(self.model)
            return tuple(_whole_model(mine, self.model, context, each) for each in range(1, requests + 1))
        if not self.mtp:
            return ()
        last = target.num_layers - 1
        found = []
        for each in range(1, requests + 1):
            layer = [costs.dense_layer(last, each, context * each, each), *_experts(costs, target, each)]
            found.append(_sum([*layer, costs.head(each), costs.host_per_step()]))
        return tuple(found)

    def held_bytes(self, target: ModelSpec, context: int, kv_bytes_per_value: float, requests: int = 1) -> int:
        """Return what drafting keeps on the device: weights, and keys and values of all requests."""
        if self.model is not None:
            dense = weight_format(self.model.usual_dense_bits)
            experts = self.model.num_routed_experts * self.model.expert_bytes(weight_format(self.model.native_bits))
            return self.model.dense_bytes(dense) + experts + requests * self.model.kv_bytes(context, kv_bytes_per_value)
        if not self.mtp:
            return 0
        last = target.num_layers - 1
        experts = (
            target.num_experts * target.expert_bytes(weight_format(target.native_bits))
            if last in target.moe_layers
            else 0
        )
        keys = math.ceil(target.kept_values(last, context, 0) * kv_bytes_per_value)
        return target.dense_layer_bytes(last, weight_format(target.usual_dense_bits)) + experts + requests * keys


def drafting_from_dict(data: object) -> Drafting | None:
    """Return the drafting that `provenance` wrote, None for None; raises InputError where it is none."""
    if data is None:
        return None
    remedy = "give a plan.json written by moeplan plan"
    if not isinstance(data, dict) or not isinstance(data.get("acceptance"), str):
        raise InputError("plan.provenance.drafting", data, "not a way to draft", remedy)
    from ....specs.provenance import (
        model_from_values,
    )  # checks values, which a machine that only measures may be unable to

    length, model = data.get("length"), data.get("model")
    if type(length) is not int or length < 1:
        raise InputError("plan.provenance.drafting.length", length, "not a number of guesses", remedy)
    return Drafting(
        length=length, acceptance=read_acceptance(data["acceptance"], "plan.provenance.drafting.acceptance"),
        model=model_from_values(model) if isinstance(model, dict) else None, mtp=data.get("draft") == MTP,
    )  # fmt: skip


def _whole_model(costs: CostModel, model: ModelSpec, context: int, requests: int) -> Estimate:
    """Return what a draft model takes for one token of each request."""
    layers = [costs.dense_layer(layer, requests, context * requests, requests) for layer in range(model.num_layers)]
    experts = _experts(costs, model, requests) * len(model.moe_layers)
    return _sum([*layers, *experts, costs.head(requests), costs.host_per_step()])


def _experts(costs: CostModel, model: ModelSpec, requests: int) -> list[Estimate]:
    """Return what one layer's experts take for one token of each request, routed evenly; nothing without experts."""
    if not model.moe_layers:
        return []
    fmt = weight_format(model.native_bits)
    routed = requests * model.top_k
    used = max(model.top_k, round(model.num_experts * (1 - (1 - model.top_k / model.num_experts) ** requests)))
    return [costs.grouped_base(fmt), *([costs.grouped_item(max(1, round(routed / used)), fmt)] * used)]


def _sum(parts: list[Estimate]) -> Estimate:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
