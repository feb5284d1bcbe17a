"""What a plan for no engine chooses among: micro-batches, types of keys and values, and all that its machine's engine can be told.

Modelled: divisions over several cards, each searched as one card is; the micro-batches of the engine whose constants the machine has, or
one that was asked for; types of keys and values that the user allows, in that order. Whatever the engine can be told is a candidate too, so
that a plan for no engine is never worse than the plan for that one. Ignored: engines with other constants: a plan for each is a question of
its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...sim.offload.simulate import Simulation
from ...specs.card_split import LAYER, CardSplit
from ...specs.machines.engines import load_engine
from ...specs.schedules.offload import OffloadSchedule
from ...specs.schedules.presets import load_preset
from ..offload.variants import Variant, Variants
from .cards import evenly_divided
from .ktransformers import CHUNKS
from .llamacpp import UBATCHES
from .plan import ENGINES
from .setting import passes_tried

_SIZES: Mapping[str, tuple[int, ...]] = {"ktransformers": CHUNKS}
"""Prompt tokens of a pass by engine, where they are not llama.cpp's."""


def variants_of(
    simulations: Mapping[str, Simulation], ubatch: int | None, *, fixed: bool, concurrency: int = 1
) -> Variants:
    """Return the variants to choose from.

    simulations: by type of keys and values, the preferred one first. ubatch: prompt tokens of a pass; fixed: it was asked for. concurrency:
    requests decoded together.
    """
    every: list[Variant] = []
    for rank, (kv_type, simulation) in enumerate(simulations.items()):
        engine = simulation.profile.engine
        sizes: tuple[int | None, ...] = (ubatch,)
        if engine is not None and not fixed:
            own = load_engine(engine.name).prompt_chunk(simulation.profile.device.memory_bytes.value)
            sizes = passes_tried(simulation, None, tuple(sorted({own, *_SIZES.get(engine.name, UBATCHES)})))
        for size in sizes:
            every += [
                Variant(simulation=simulation.divided(split), kv_type=kv_type, ubatch=size, rank=rank)
                for split in _splits(simulation, size, concurrency)
            ]
    return Variants(every=tuple(every), told=_told)


def _splits(simulation: Simulation, ubatch: int | None, concurrency: int) -> list[CardSplit | None]:
    """Return how a model may lie on several cards: as the engine divides it, with room for the most experts of every layer, and as its
    engine's settings would; None alone for one card.
    """
    if simulation.split is None or simulation.split.mode != LAYER:
        return [None]
    found = [simulation.split]
    base = load_preset("mixtral-offloading-code").with_options(
        workload__concurrency=concurrency,
        workload__prefill_chunk_tokens=ubatch,
        experts__bits=simulation.model.native_bits,
    )
    even = evenly_divided(simulation, base)
    engine = simulation.profile.engine
    space = None if engine is None else ENGINES.get(engine.name)
    told = [] if space is None or ubatch is None else space.settings(simulation, concurrency, ubatch, [])
    found += [split for split in (even, *(one.split for one in told)) if split is not None]
    return list(dict.fromkeys(found))


def _told(variant: Variant, concurrency: int) -> Sequence[tuple[OffloadSchedule, int]]:
    """Return what the machine's engine can be told with a variant's micro-batch, its own defaults included, where those are its own."""
    engine = variant.simulation.profile.engine
    space = None if engine is None else ENGINES.get(engine.name)
    if space is None or variant.ubatch is None:
        return ()
    found = [
        *space.settings(variant.simulation, concurrency, variant.ubatch, []),
        *space.defaults(variant.simulation, concurrency, variant.ubatch, {}),
    ]
    mine = variant.simulation.split
    return [(one.schedule, one.cached_experts) for one in found if one.split is None or one.split == mine]
