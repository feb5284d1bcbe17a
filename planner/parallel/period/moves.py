"""What one rearrangement of experts costs a server: planning, the moving of weights, and how engines spread it.

    planning   seconds for each slot of each layer, on the host
    moving     seconds for each expert that the busiest rank fetches (sends, receives, copies of indices) + its bytes over its links

    at-once          the server stands still for planning and moving (vLLM's synchronous mode, SGLang without chunks)
    layer-by-layer   the same in pauses of a layer each, between steps (SGLang's layers per chunk)
    background       both beside serving: steps run at the speed that kernels keep beside exchanges (vLLM's default since 2026)

Modelled: figures of vLLM's synchronous rearrangement of one server, scaled by slots, layers and experts moved. Ignored: ranks that wait for
one another, transports that go through the host's memory (which make a rearrangement tens of times as long).
"""

from __future__ import annotations

from dataclasses import dataclass

from ....base.errors import UnknownName
from ....sim.parallel.tiers import EpConstants
from ....specs.models import ModelSpec
from ...placement.placement import Placement
from ..migration import migration

AT_ONCE, LAYER_BY_LAYER, BACKGROUND = "at-once", "layer-by-layer", "background"
WAYS = (AT_ONCE, LAYER_BY_LAYER, BACKGROUND)
WAY_WORDS = {AT_ONCE: "at once", LAYER_BY_LAYER: "layer by layer", BACKGROUND: "in the background"}
PLANNING_S_PER_SLOT = 0.010 / (26 * 64)
"""vLLM's `rebalance_experts`: 10 ms for DeepSeek-V2-Lite's 26 layers of 64 slots (github.com/vllm-project/vllm/pull/28369)."""
MOVING_S_PER_EXPERT = (0.260 - 0.010) / (26 * 8)
"""Of that rearrangement's 260 ms on 8 H100, what planning leaves, for each of the 8 experts of a rank in each layer (the same place)."""
STALL_UNCERTAINTY = 0.9
"""Rearrangements of one server took 0.65 to 1.70 s around a mean of 0.91 s (github.com/vllm-project/vllm/pull/43219)."""
COUNTING_S_PER_LAYER = 3e-6
"""A small kernel that adds up choices in each layer: 3 us inside a captured graph (AIConfigurator, systems/*.yaml at 095f58a5)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rearrangement:
    """What coming from one placement to another costs."""

    num_experts: int
    """(Layer, expert) weights fetched by all ranks."""
    num_bytes: int
    planning_s: float
    moving_s: float

    @property
    def whole_s(self) -> float:
        """Both, one after the other."""
        return self.planning_s + self.moving_s


def rearrangement(
    model: ModelSpec, before: Placement, after: Placement, expert_bytes: int, constants: EpConstants
) -> Rearrangement:
    """Return what coming from `before` to `after` costs, where every rank fetches what it lacks."""
    moved = migration(before, after, expert_bytes=expert_bytes, constants=constants, before_s=0.0, after_s=0.0)
    busiest = 0
    for rank in range(after.num_ranks):
        first = rank * after.slots_per_rank
        mine = slice(first, first + after.slots_per_rank)
        old = slice(rank * before.slots_per_rank, (rank + 1) * before.slots_per_rank)
        fetched = sum(
            len(
                set(after.physical_to_logical[layer, mine].tolist())
                - set(before.physical_to_logical[layer, old].tolist())
            )
            for layer in range(after.num_layers)
        )
        busiest = max(busiest, fetched)
    planning = PLANNING_S_PER_SLOT * after.num_layers * after.num_slots
    return Rearrangement(
        num_experts=moved.num_experts, num_bytes=moved.num_bytes, planning_s=planning,
        moving_s=MOVING_S_PER_EXPERT * busiest + moved.stall_s,
    )  # fmt: skip


def stall_s(way: str, move: Rearrangement, shared_speed: float) -> float:
    """Return the seconds of serving that a rearrangement costs; shared_speed: of steps beside transfers. Raises UnknownName."""
    if way not in WAYS:
        raise UnknownName("--moves", way, WAYS)
    if way == BACKGROUND:
        return move.moving_s * (1 / shared_speed - 1)
    return move.whole_s


def longest_pause_s(way: str, move: Rearrangement, num_layers: int) -> float:
    """Return the longest time for which no step runs."""
    if way == BACKGROUND:
        return 0.0
    return move.whole_s if way == AT_ONCE else max(move.planning_s, move.moving_s / num_layers)
