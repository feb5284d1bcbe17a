"""One way to start a serving engine, and what a search asks of an engine's space of settings.

Modelled: which experts are on the card, how prompts are cut, where large passes compute the others. Ignored: which settings an engine has
(a module for each).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from ...base.errors import DoesNotFit
from ...base.units import format_bytes
from ...sim.offload.simulate import Simulation
from ...specs.card_split import CardSplit
from ...specs.schedules.offload import OffloadSchedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to start the engine."""

    schedule: OffloadSchedule
    """Resolved."""
    words: str
    """What the engine is told, in its own flags."""
    cached_experts: int
    """On the card, over all layers."""
    ubatch: int
    """Prompt tokens of a forward pass."""
    op_offload: bool
    """Passes from the engine's threshold on compute experts of host memory on the card."""
    host_layers: int = 0
    """MoE layers, the first ones (under `--fit` the last ones), whose experts stay in host memory, where whole layers are placed."""
    told_layers: int = 0
    """`host_layers` as `--n-cpu-moe` counts them: with layers without experts among the first ones."""
    experts_per_layer: int | None = None
    """Experts of each layer on the card, where single experts are placed."""
    fitted: bool = False
    """The engine chose it."""
    part_of_layer: float = 0.0
    """Share of one more layer's experts that `--fit` puts on the card."""
    split: CardSplit | None = None
    """Which layers lie on which of several cards."""
    card: bool = True
    """There is a card; else the cores compute everything and nothing is placed."""


class Space(Protocol):
    """What one engine can be told."""

    @property
    def name(self) -> str:
        """The engine's name."""

    def settings(
        self, simulation: Simulation, concurrency: int, ubatch: int | None, refused: list[DoesNotFit]
    ) -> list[Setting]:
        """Return every setting that is looked at and fits.

        ubatch: the micro-batch asked for; None: several are tried. refused: is given why others do not fit.
        """

    def defaults(
        self, simulation: Simulation, concurrency: int, ubatch: int | None, left_out: dict[str, str]
    ) -> list[Setting]:
        """Return what people start the engine with, what it does of itself first.

        left_out: is given, by name, why one of them cannot run or is not modelled.
        """

    def fuller(self, simulation: Simulation, default: Setting) -> Setting:
        """Return a default with the whole of the layer of which it has a part on the card."""


def device_bytes(simulation: Simulation, one: Setting) -> int:
    """Return what a setting takes of the card, or of all cards."""
    simulation = simulation.divided(one.split)
    return simulation.memory_breakdown(one.schedule, cached_experts=one.cached_experts).device_bytes


def check_fits(simulation: Simulation, one: Setting) -> None:
    """Return nothing; raises DoesNotFit where the card or the host cannot hold a setting."""
    check_cards(simulation, one)
    check_host(simulation, one)


def check_host(simulation: Simulation, one: Setting) -> None:
    """Return nothing; raises DoesNotFit where the host cannot hold a setting."""
    simulation.within_host(one.schedule, cached_experts=one.cached_experts)


def check_cards(simulation: Simulation, one: Setting) -> None:
    """Return nothing; raises DoesNotFit where the card, or one of several, cannot hold a setting."""
    needed = device_bytes(simulation, one)
    if one.split is not None:
        simulation.divided(one.split).require_fits(one.schedule, one.words, cached_experts=one.cached_experts)
    elif needed > simulation.budget_bytes:
        raise DoesNotFit(f"{one.words} needs {format_bytes(needed)} of device memory", needed - simulation.budget_bytes)


def fitting(
    simulation: Simulation, candidates: Iterable[Setting], refuse: Callable[[Setting, DoesNotFit], None]
) -> list[Setting]:
    """Return those of `candidates` that fit; of every other one, `refuse` is told why not."""
    found = []
    for one in candidates:
        try:
            check_fits(simulation, one)
        except DoesNotFit as reason:
            refuse(one, reason)
        else:
            found.append(one)
    return found


def passes_tried(simulation: Simulation, asked: int | None, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the tokens of a pass that are looked at: as asked, else the first of `sizes` and those that the longest request half fills."""
    if asked is not None:
        return (asked,)
    longest = int(simulation.trace.position.max()) + 1
    return (sizes[0], *(one for one in sizes[1:] if one // 2 < longest))


def has_card(simulation: Simulation) -> bool:
    """Return whether there is a card beside the cores."""
    return simulation.profile.device.kind != "cpu"
