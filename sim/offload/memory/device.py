"""What a schedule takes of the device's memory, card by card where there are several.

Modelled: everything but experts, the experts that a cache holds and where its rule puts them, which card lacks how much. Ignored: what
the host holds (`host`).
"""

from __future__ import annotations

import bisect
import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from ....base.errors import DoesNotFit, InputError
from ....base.units import format_bytes
from ....specs.card_memory import CardMemory, break_down_cards, lacking_most, require_cards_fit, together
from ....specs.card_split import LAYER, TENSOR, CardSplit
from ....specs.memory import PLAIN, MemoryBreakdown, MemoryNeeds, break_down_memory
from ....specs.models import WeightFormat, weight_format
from ....specs.schedules.offload import OffloadSchedule
from ...policies.state import order_of_places
from ..drafting.draft import Drafting
from .host import HostMemory

if TYPE_CHECKING:
    from ..workload import Workload

# A static cache's misses pass through this many slots (see policies.state.make_state).
STREAM_SLOTS = 2


class DeviceMemory(HostMemory):
    """The half of a `Simulation` that knows what cards hold."""

    __slots__ = ()
    memory_bytes: int | None
    card_budgets: tuple[int, ...]
    dense_format: WeightFormat | None
    kv_bytes_per_value: float
    split: CardSplit | None
    drafting: Drafting | None
    _context: int
    if TYPE_CHECKING:

        def workload(self, schedule: OffloadSchedule) -> Workload:
            """Return the forward passes of the recording under the schedule's batching."""

    def memory_breakdown(
        self, schedule: OffloadSchedule, *, cached_experts: int, transient_experts: int = 0
    ) -> MemoryBreakdown:
        """Return the itemised memory of a schedule whose cache holds `cached_experts` over all layers; of several cards together."""
        needs = self.needs(schedule, cached_experts=cached_experts, transient_experts=transient_experts)
        whole = break_down_memory(needs, cached_experts=cached_experts, offloaded=cached_experts < self.num_experts)
        if self.split is None:
            return whole
        return together(
            self.card_memory(schedule, cached_experts=cached_experts, transient_experts=transient_experts), whole
        )

    def card_memory(
        self, schedule: OffloadSchedule, *, cached_experts: int, transient_experts: int = 0
    ) -> tuple[CardMemory, ...]:
        """Return what each card of a box of several holds; nothing for one card."""
        if self.split is None:
            return ()
        needs = self.needs(schedule, cached_experts=cached_experts, transient_experts=transient_experts)
        resident = self.resident_by_layer(schedule, cached_experts)
        names, budgets, count = self.profile.card_names, self.budgets, self.profile.num_cards
        copies = self._input_copies if sum(resident) >= self.num_experts else 1
        cards = break_down_cards(needs, self.split, resident, count, input_copies=copies)
        if copies > 1 and lacking_most(cards, budgets)[1] > 0:  # the engine then does without
            cards = break_down_cards(needs, self.split, resident, count)
        return tuple(dataclasses.replace(one, name=names[one.card], budget_bytes=budgets[one.card]) for one in cards)

    def resident_by_layer(self, schedule: OffloadSchedule, cached_experts: int) -> list[int]:
        """Return how many experts of each MoE layer a cache of `cached_experts` holds.

        Raises InputError for one pool of changing experts over cards that each hold layers: a slot lies on one card, and may be wanted on
        another.
        """
        layers, each, cache = self.trace.num_layers, self.trace.num_experts, schedule.cache
        if cached_experts >= self.num_experts:
            return [each] * layers
        pooled = cache.pooled_experts is not None or cache.bytes is not None or cache.host_layers is not None
        if cache.policy == "static" and (pooled or cache.placement in ("front", "back")):
            popularity = self.workload(schedule).popularity
            order = order_of_places(popularity, cache.placement, pooled=True)[0]
            found = np.bincount(order[:cached_experts] // each, minlength=layers)
            return [int(count) for count in found]
        if pooled and self.split is not None and self.split.mode != TENSOR:
            raise InputError("cache.pooled_experts", cached_experts, "one pool for all layers, which lie on several cards",
                             "give cache.experts_per_layer, or cache.policy=static")  # fmt: skip
        if cache.experts_per_layer is not None and cached_experts == cache.slots(layers):
            return list(cache.slots_by_cache(layers))
        share, more = divmod(cached_experts, layers)
        return [share + (layer < more) for layer in range(layers)]

    def needs(self, schedule: OffloadSchedule, *, cached_experts: int, transient_experts: int = 0) -> MemoryNeeds:
        """Return what a schedule holds beside its cache."""
        stream = STREAM_SLOTS if schedule.cache.policy == "static" and cached_experts < self.num_experts else 0
        layout, tokens = self._layout, int(self.workload(schedule).step_tokens.max())
        if layout != PLAIN:  # made for the largest micro-batch, whether or not a prompt fills it
            tokens = max(tokens, min(schedule.workload.prefill_chunk_tokens or 0, self._context))
        uploads = layout != PLAIN and self._uploads(schedule, cached_experts, tokens)
        return MemoryNeeds(
            model=self.model,
            expert_format=self.expert_format(schedule),
            dense_format=self.dense_format or weight_format("16"),
            context_tokens=self._context,
            kv_bytes_per_value=self.kv_bytes_per_value,
            concurrency=schedule.workload.concurrency,
            pass_tokens=tokens,
            # What an engine copies matrix by matrix passes through its buffers.
            staging_experts=schedule.predictor.staging + (0 if uploads else stream + transient_experts),
            host_experts=self._held_by_host(schedule, cached_experts),
            host_expert_bytes=self.host_expert_bytes(schedule),
            below_host=schedule.copy.host_experts is not None,
            on_cores=schedule.kernel.miss == "cpu" and not uploads,
            runtime_bytes=int(self.profile.device.runtime_bytes.value),
            layout=layout,
            uploads=uploads,
            draft_bytes=0
            if self.drafting is None
            else self.drafting.held_bytes(
                self.model, self._context, self.kv_bytes_per_value, schedule.workload.concurrency
            ),
        )

    @property
    def _input_copies(self) -> int:
        """How many times each card keeps a pass's inputs where everything lies on cards layer by layer."""
        engine = self.profile.engine
        over_cards = engine is not None and self.split is not None and self.split.mode == LAYER
        return engine.input_copies if engine is not None and over_cards else 1

    @property
    def _layout(self) -> str:
        """How the serving engine lays memory out; cores alone have one memory for everything."""
        engine = self.profile.engine
        return PLAIN if engine is None or self.profile.device.kind == "cpu" else engine.memory_layout

    def _uploads(self, schedule: OffloadSchedule, cached_experts: int, tokens: int) -> bool:
        """Return whether the largest pass copies experts that lie in host memory to the device, matrix by matrix."""
        start = 1 if schedule.kernel.miss == "fetch" else schedule.kernel.upload_tokens
        return cached_experts < self.num_experts and start is not None and tokens >= start

    @property
    def budget_bytes(self) -> int:
        """The whole device budget, of all cards together."""
        return sum(self.budgets)

    @property
    def budgets(self) -> tuple[int, ...]:
        """The budget of each card."""
        if self.card_budgets:
            return self.card_budgets
        if self.memory_bytes is not None:
            return (self.memory_bytes,) * (1 if self.split is None else self.profile.num_cards)
        return self.profile.card_bytes if self.split is not None else (self.profile.memory_bytes,)

    def lacking_bytes(self, schedule: OffloadSchedule, *, cached_experts: int, transient_experts: int = 0) -> int:
        """Return the bytes that the device, or the card that lacks the most, is short of; 0 or less where it fits."""
        if self.split is None:
            breakdown = self.memory_breakdown(
                schedule, cached_experts=cached_experts, transient_experts=transient_experts
            )
            return breakdown.device_bytes - self.budget_bytes
        cards = self.card_memory(schedule, cached_experts=cached_experts, transient_experts=transient_experts)
        return lacking_most(cards, self.budgets)[1]

    def require_fits(
        self, schedule: OffloadSchedule, what: str, *, cached_experts: int, transient_experts: int = 0
    ) -> None:
        """Return nothing; raises DoesNotFit where the device cannot hold `what`, with the card's name and bytes where there are several."""
        needed = self.memory_breakdown(schedule, cached_experts=cached_experts, transient_experts=transient_experts)
        if self.split is None:
            if needed.device_bytes > self.budget_bytes:
                room = format_bytes(self.budget_bytes)
                raise DoesNotFit(f"{what} needs {format_bytes(needed.device_bytes)} of the {room} of device memory that may be filled",
                                 needed.device_bytes - self.budget_bytes)  # fmt: skip
            return
        cards = self.card_memory(schedule, cached_experts=cached_experts, transient_experts=transient_experts)
        require_cards_fit(cards, self.budgets, self.profile.card_names, what)

    def slots_that_fit(self, schedule: OffloadSchedule, *, least: int = 1) -> int:
        """Return how many cached experts, over all layers, the budget holds beside everything else of the schedule.

        Raises DoesNotFit when those are fewer than the `least` that the schedule works with.
        """
        if self.split is not None:
            return self._slots_over_cards(schedule, least)
        needed = self.memory_breakdown(schedule, cached_experts=least).device_bytes
        if needed > self.budget_bytes:
            what = f"{schedule.name} needs {format_bytes(needed)} of device memory with the fewest experts it can keep there, {least}"
            raise DoesNotFit(what, needed - self.budget_bytes)
        room = self.budget_bytes - self.memory_breakdown(schedule, cached_experts=0).device_bytes
        return max(least, min(self.num_experts, room // self.expert_bytes(schedule)))

    def _slots_over_cards(self, schedule: OffloadSchedule, least: int) -> int:
        """Return the most cached experts with which every card has room for its share; raises DoesNotFit as `slots_that_fit` does."""
        if self.lacking_bytes(schedule, cached_experts=self.num_experts) <= 0:
            return self.num_experts
        what = f"{schedule.name} with the fewest experts it can keep on the cards, {least},"
        self.require_fits(schedule, what, cached_experts=least)
        counts = range(least + 1, self.num_experts)
        found = bisect.bisect_left(
            counts, True, key=lambda count: self.lacking_bytes(schedule, cached_experts=count) > 0
        )
        return least + found
