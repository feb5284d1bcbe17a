"""What work costs on several cards in one box: layers handed from card to card, or every layer divided over all of them.

    layers over cards    a layer costs what its card costs; where the next layer lies on another card, a hand-over: a fixed time, and
                         the hidden state over the link between cards
    tensors over cards   each card has 1/n of a layer's heads and of every expert's width; the slowest card's time, and two reductions a
                         layer, as measured between such modules, else steps over the links (`gpu.exchanges`)
    rows over cards      (older builds of llama.cpp) products of dense weights take their share of each card, and after each of them its
                         rows are collected; experts stay with their layer's card

Modelled: unequal cards, engines in which passes of a prompt follow each other over them, experts that come over the link of the card
that needs them, uploads of all cards at once that share a port or one
writer. Ignored: which cards of a box stand behind which socket, peer access that is switched off, reductions that overlap with products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...base.errors import InputError
from ...specs.card_split import ROW, TENSOR, CardSplit
from ...specs.machines.gpu_kernels import INSIDE, ExchangeKernel
from ...specs.machines.profile import MODULES, PCIE, SET_BY_USER, CardLinks, Profile
from ...specs.models import ModelSpec, WeightFormat
from ...specs.models.divided import divided
from .cost_model import CostModel
from .estimate import Estimate, Times, merge_sources, rate_term
from .gpu.exchanges import ALL_GATHER, ALL_REDUCE, kernels_of, quickest_s, reductions_of
from .gpu.layer import layer_matrices

_STATE_BYTES = {"ggml": 4}
_OTHER_STATE_BYTES = 2
"""Of one value of the hidden state as it goes from card to card: 32 bits in engines built on ggml, 16 in others."""
_ROW_PRODUCT_S = 50e-6
_ROW_UNCERTAINTY = 0.6
"""Collecting the rows of one product: Llama 8B in Q4_0 at 67 tokens/s by rows and 175 by layers on 2 RTX 4090, of 224 products a token
(github.com/ggml-org/llama.cpp/pull/19378)."""


def cost_of_cards(
    profile: Profile, model: ModelSpec, split: CardSplit, load: Callable[..., CostModel], **options: Any
) -> CostModel:
    """Return the cost model of a model that `split` lays over a profile's cards; load: makes that of one card.

    Raises InputError where a division does not come out even, or nothing says what joins the cards.
    """
    if split.mode == TENSOR:
        if options.pop("layers_off", 0):
            raise InputError(
                "split", TENSOR, "layers that are off the cards as a whole are no slices", "divide by layers"
            )
        return TensorCosts.over(profile, model, load, **options)
    kind = RowCosts if split.mode == ROW else LayerCosts
    cards = tuple(load(profile.of_card(card), model, **options) for card in range(profile.num_cards))
    options.pop("layers_off", None)  # cards know which of their layers the cores compute
    return kind(profile.of_card(0), model, parts=cards, split=split, links=_links(profile), **options)


def _links(profile: Profile) -> CardLinks:
    if profile.links is None:
        raise InputError("cards", profile.num_cards, "nothing says what joins them", "name the machine by its parts")
    return profile.links


@dataclass(frozen=True, slots=True)
class LayerCosts(CostModel):
    """Layers over cards."""

    parts: tuple[CostModel, ...] = field(kw_only=True)
    """The costs of each card alone."""
    split: CardSplit = field(kw_only=True)
    links: CardLinks = field(kw_only=True)

    @property
    def each_card(self) -> Sequence[CostModel]:
        """The cost model of every card."""
        return self.parts

    def card_of(self, layer: int) -> int:
        """Return which card decoder layer `layer` lies on."""
        return self.split.layer_card[layer]

    @property
    def head_card(self) -> int:
        """The card of the output matrix."""
        return self.split.head_card

    @property
    def most_passes(self) -> int:
        """How many passes of a prompt may be under way at once: one, or as many as there are cards, as the engine does it."""
        engine = self.profile.engine
        return len(self.parts) if engine is not None and engine.follows_over_cards else 1

    def dense_layer(self, layer: int, tokens: int, context_tokens: int, num_requests: int = 1) -> Estimate:
        """Return the time of decoder layer `layer` without its routed experts, the way to its card included."""
        mine = self.parts[self.card_of(layer)].dense_layer(layer, tokens, context_tokens, num_requests)
        before = self.card_of(layer - 1) if layer else self.card_of(layer)
        return mine + self._hop(tokens) if before != self.card_of(layer) else mine

    def head(self, tokens: int) -> Estimate:
        """Return the time of the final norm and the output matrix on their card."""
        mine = self.parts[self.split.head_card].head(tokens)
        return mine if self.split.head_card == self.split.layer_card[-1] else mine + self._hop(tokens)

    def _hop(self, tokens: int) -> Estimate:
        """Return what handing a pass over to another card takes."""
        fixed = rate_term(self.links.hop_s.value, "link", self.links.hop_s)
        return fixed + _moved(self.links, float(tokens * self.model.hidden_size * _state_bytes(self.profile)))

    # What is the host's, or asked of no card in particular, is the first card's.

    def grouped_base(self, fmt: WeightFormat | None = None) -> Estimate:
        """Return what a grouped launch costs besides its experts."""
        return self.parts[0].grouped_base(fmt)

    def grouped_item(self, tokens: int, fmt: WeightFormat) -> Estimate:
        """Return what one expert with `tokens` tokens adds to a grouped launch, on the first card."""
        return self.parts[0].grouped_item(tokens, fmt)

    def expert_kernel(self, tokens: int, fmt: WeightFormat) -> Estimate:
        """Return the time of one routed expert in a launch of its own, on the first card."""
        return self.parts[0].expert_kernel(tokens, fmt)

    def cpu_expert(self, tokens: int, fmt: WeightFormat) -> Estimate:
        """Return the time of one expert on the host's cores."""
        return self.parts[0].cpu_expert(tokens, fmt)

    def host_per_fetching_layer(self) -> Estimate:
        """Return the host's time for a layer whose misses are fetched."""
        return self.parts[0].host_per_fetching_layer()


@dataclass(frozen=True, slots=True)
class RowCosts(LayerCosts):
    """Rows of dense products over cards."""

    @property
    def most_passes(self) -> int:
        """Every pass needs all cards."""
        return 1

    def dense_layer(self, layer: int, tokens: int, context_tokens: int, num_requests: int = 1) -> Estimate:
        """Return the time of decoder layer `layer`: its products' share of every card, then their rows collected."""
        alone = LayerCosts.dense_layer(self, layer, tokens, context_tokens, num_requests)
        products = [matrix for matrix in layer_matrices(self.model, layer) if matrix.role != "router"]
        rate = [part.profile.device.memory_bytes_per_s.value for part in self.parts]
        mine = self.parts[self.card_of(layer)]
        share = rate[self.card_of(layer)] / sum(rate)
        saved = mine.dense_products(layer, tokens).seconds * (1 - share)
        each = Estimate(
            seconds=_ROW_PRODUCT_S * len(products),
            source="published",
            bound="link",
            relative_uncertainty=_ROW_UNCERTAINTY,
        )
        width = sum(matrix.width for matrix in products) * tokens * _state_bytes(self.profile)
        less = dataclasses.replace(alone, seconds=max(alone.seconds - saved, alone.launch_s))
        return less + each + _moved(self.links, width * (1 - share))


@dataclass(frozen=True, slots=True)
class TensorCosts(CostModel):
    """Every layer over all cards."""

    parts: tuple[CostModel, ...] = field(kw_only=True)
    """The costs of each card with its part of the model."""
    whole: CostModel = field(kw_only=True)
    """The costs of the first card with the whole model: for what the host's cores do."""
    links: CardLinks = field(kw_only=True)
    num_cards: int = field(kw_only=True)

    @classmethod
    def over(cls, profile: Profile, model: ModelSpec, load: Callable[..., CostModel], **options: Any) -> TensorCosts:
        """Return the costs of a model divided over a profile's cards."""
        links, count = _links(profile), profile.num_cards
        if links.card_bytes_per_s is None:
            raise InputError("split", TENSOR, "no figure of a link between the cards", "name one, e.g. nvlink:56GB/s")
        part = divided(model, count)
        distinct: list[Profile] = []
        for card in range(count):
            if profile.of_card(card) not in distinct:
                distinct.append(profile.of_card(card))
        return cls(
            profile.of_card(0), model, parts=tuple(load(one, part, **options) for one in distinct),
            whole=load(profile.of_card(0), model, **options), links=links, num_cards=count, **options,
        )  # fmt: skip

    def dense_layer(self, layer: int, tokens: int, context_tokens: int, num_requests: int = 1) -> Estimate:
        """Return the time of decoder layer `layer` without its routed experts: the slowest card's part, and two reductions."""
        mine = self._slowest(lambda part: part.dense_layer(layer, tokens, context_tokens, num_requests))
        reduced = self._exchange(ALL_REDUCE, 2.0 * tokens * self.model.hidden_size * _state_bytes(self.profile))
        return mine + reduced + reduced

    def head(self, tokens: int) -> Estimate:
        """Return the time of the final norm and the output matrix: a card's part of the vocabulary, and the logits collected."""
        mine = self._slowest(lambda part: part.head(tokens))
        return mine + self._exchange(ALL_GATHER, float(tokens * self.model.vocab_size * _state_bytes(self.profile)))

    def grouped_base(self, fmt: WeightFormat | None = None) -> Estimate:
        """Return what a grouped launch costs besides its experts."""
        return self._slowest(lambda part: part.grouped_base(fmt))

    def grouped_item(self, tokens: int, fmt: WeightFormat) -> Estimate:
        """Return what one expert with `tokens` tokens adds to a grouped launch: a slice of it on every card."""
        return self._slowest(lambda part: part.grouped_item(tokens, fmt))

    def expert_kernel(self, tokens: int, fmt: WeightFormat) -> Estimate:
        """Return the time of one routed expert in a launch of its own."""
        return self._slowest(lambda part: part.expert_kernel(tokens, fmt))

    def expert_times(self, most_tokens: int, fmt: WeightFormat, *, grouped: bool) -> Times:
        """Return what one expert with 1 to `most_tokens` tokens takes on the card that takes longest."""
        found = [part.expert_times(most_tokens, fmt, grouped=grouped) for part in self.parts]
        return max(found, key=lambda times: float(times.seconds.sum()))

    def host_to_device(self, num_bytes: int, pinned: bool = True) -> Estimate:
        """Return the time of an expert's way to the cards: each takes its slice, at once, unless one port or one writer serves all."""
        one = CostModel.host_to_device(self, num_bytes, pinned)
        engine = self.profile.engine
        if engine is not None and engine.one_writer:
            return one
        lanes = float(self.num_cards)
        if self.links.shared_bytes_per_s is not None:
            link = self.profile.host_to_device
            alone = (link.pinned_bytes_per_s if pinned else link.pageable_bytes_per_s).value
            lanes = min(lanes, max(1.0, self.links.shared_bytes_per_s.value / alone))
        latency = self.profile.host_to_device.latency_s.value
        return dataclasses.replace(one, seconds=latency + max(0.0, one.seconds - latency) / lanes)

    def cpu_expert(self, tokens: int, fmt: WeightFormat) -> Estimate:
        """Return the time of one expert on the host's cores."""
        return self.whole.cpu_expert(tokens, fmt)

    def host_per_fetching_layer(self) -> Estimate:
        """Return the host's time for a layer whose misses are fetched."""
        return self.whole.host_per_fetching_layer()

    def _slowest(self, ask: Callable[[CostModel], Estimate]) -> Estimate:
        return max((ask(part) for part in self.parts), key=lambda each: each.seconds)

    def _exchange(self, operation: str, num_bytes: float) -> Estimate:
        """Return the time of a reduction or gather over all cards, of which each link carries (n-1)/n of `num_bytes`."""
        kernels, source = self.remembered("exchanges", self._exchanges)
        moved = num_bytes * (self.num_cards - 1) / self.num_cards
        return Estimate(
            seconds=float(quickest_s(kernels[operation], moved)), source=source, bound="link",
            relative_uncertainty=max(kernel.relative_uncertainty for kernel in kernels[operation]),
        )  # fmt: skip

    def _exchanges(self) -> tuple[dict[str, tuple[ExchangeKernel, ...]], str]:
        """Return kernels of exchanges between cards as they are joined here, by operation, and where they come from."""
        links, own = self.links, self.parts[0].profile.kernels
        step, rate = links.reduce_step_s, links.card_bytes_per_s
        assert rate is not None  # noqa: S101
        # Other links than the modules' own, stated or set, are not what exchanges were measured on.
        as_built = len(self.parts) == 1 and links.kind == MODULES and SET_BY_USER not in (step.source, rate.source)
        measured = kernels_of(own, INSIDE, self.num_cards) if own is not None and as_built else {}
        source = own.source if own is not None and measured else merge_sources(step.source, rate.source)
        return reductions_of(measured, self.num_cards, step, rate, ring=links.kind == PCIE), source


def _moved(links: CardLinks, num_bytes: float) -> Estimate:
    """Return the time of `num_bytes` between two cards."""
    rate = links.card_bytes_per_s
    if rate is None:
        raise InputError("cards", "split", "no figure of a link between them", "name one, e.g. nvlink:56GB/s")
    return rate_term(num_bytes / rate.value, "link", rate)


def _state_bytes(profile: Profile) -> int:
    layout = "plain" if profile.engine is None else profile.engine.memory_layout
    return _STATE_BYTES.get(layout.partition("-")[0], _OTHER_STATE_BYTES)
