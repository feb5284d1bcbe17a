"""llama.cpp on several cards: which layers lie on which card, and which layers' experts stay in host memory.

Modelled: the experts of the first N layers in host memory (`--n-cpu-moe`) and layers in order over the cards (`-sm layer -ts`), divided by
dynamic programming: of all divisions that leave no card short of memory, the one with the least time, each layer at what its card takes for
it. Beside it the engine's own choice (`--fit`, `common/fit.cpp`): cards filled with whole layers from the front, each but for 1024 MiB; the
layers that are left lie on the last card without their experts. Ignored: parts of a layer that `--fit` puts on a card, layers without
experts that it would leave to another card than the last, rows and slices of layers (`-sm row`, `-sm tensor`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...base.errors import DoesNotFit
from ...sim.offload.simulate import Simulation
from ...specs.card_memory import break_down_cards
from ...specs.card_split import CardSplit, by_counts
from ...specs.schedules.offload import OffloadSchedule

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]
_HEAD = ("embeddings", "draft")
_OF_LAYERS = ("dense weights", "kv cache", "states", "resident experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bytes:
    """What parts of a model take on whichever card they lie."""

    layer: Whole
    """[num_layers] with the experts that stay there."""
    fixed: int
    """Of every card that holds anything: runtime and buffers."""
    head: int


def divided(simulation: Simulation, schedule: OffloadSchedule, cached_experts: int) -> CardSplit:
    """Return the division with the least predicted time of those with which every card has room for its share.

    Raises DoesNotFit where there is none: with the bytes that all cards together lack, or the largest single layer.
    """
    costs, budgets = simulation.costs.each_card, simulation.budgets
    sizes, times = _bytes_of(simulation, schedule, cached_experts), _times(simulation, schedule, cached_experts)
    layers = len(sizes.layer)
    upto = np.concatenate(([0], np.cumsum(sizes.layer)))
    best = np.full((len(budgets) + 1, layers + 1), np.inf)
    before = np.zeros((len(budgets) + 1, layers + 1), np.int64)
    best[0, 0] = 0.0
    hop = _hop_s(simulation)
    for card, budget in enumerate(budgets):
        spent = np.concatenate(([0.0], np.cumsum(times[card])))
        head_s = costs[card].head(1).seconds
        for end in range(layers + 1):
            begins = np.arange(end + 1)
            held = upto[end] - upto[begins] + sizes.fixed + (sizes.head if end == layers else 0)
            found = best[card, begins] + spent[end] - spent[begins] + np.where(begins > 0, hop, 0.0)
            found = found + (head_s if end == layers else 0.0)
            found[held > budget] = np.inf
            found[end] = best[card, end]  # nothing on this card
            before[card + 1, end] = int(np.argmin(found))
            best[card + 1, end] = found[before[card + 1, end]]
    if not np.isfinite(best[-1, layers]):
        raise DoesNotFit(f"{schedule.name} over {len(budgets)} cards", _missing(sizes, budgets))
    counts, end = [], layers
    for card in range(len(budgets), 0, -1):
        begin = int(before[card, end])
        counts.append(end - begin)
        end = begin
    return by_counts(counts[::-1])


def evenly_divided(simulation: Simulation, schedule: OffloadSchedule) -> CardSplit | None:
    """Return the division that has room for the most cached experts of every layer, as many of each; None where there is none.

    schedule: with a cache that holds experts layer by layer.
    """
    layers, most = simulation.trace.num_layers, simulation.trace.num_experts
    found: CardSplit | None = None
    low, high = 0, most + 1
    while high - low > 1:
        each = (low + high) // 2
        try:
            found, low = divided(simulation, schedule.with_options(cache__experts_per_layer=each), each * layers), each
        except DoesNotFit:
            high = each
    return found


def filled_from_the_front(
    simulation: Simulation, schedule: OffloadSchedule, margin_bytes: int
) -> tuple[CardSplit, int]:
    """Return how `--fit` divides a model over cards, and how many layers, from the first, keep their experts on them.

    schedule: with no experts on the cards. Raises DoesNotFit where the last card cannot hold the layers that are left.
    """
    targets = [budget - margin_bytes for budget in simulation.budgets]
    bare = _bytes_of(simulation, schedule, 0)
    full = bare.layer + _expert_bytes(simulation, schedule)
    layers, counts, begin = len(full), [], 0
    for card, target in enumerate(targets):
        room = target - bare.fixed - (int(bare.layer[begin:].sum()) + bare.head if card == len(targets) - 1 else 0)
        if card == len(targets) - 1:
            more = np.cumsum((full - bare.layer)[begin:])
        else:
            more = np.cumsum(full[begin:])
        whole = int(np.searchsorted(more, room, side="right"))
        if room < 0 and card == len(targets) - 1:
            raise DoesNotFit(
                "everything but experts, as --fit divides it: layers would leave the cards, which is not modelled",
                -room,
            )
        counts.append(whole)
        begin += whole
    kept = begin
    counts[-1] += layers - kept
    return by_counts(counts, head_card=len(targets) - 1), kept


def _bytes_of(simulation: Simulation, schedule: OffloadSchedule, cached_experts: int) -> _Bytes:
    """Return what a schedule's parts take, layer by layer: as on a box with a card for each layer."""
    layers = simulation.model.num_layers
    needs = simulation.needs(schedule, cached_experts=cached_experts)
    resident = simulation.resident_by_layer(schedule, cached_experts)
    cards = break_down_cards(needs, by_counts((1,) * layers), resident, layers)
    of_layer = [sum(item.num_bytes for item in one.items if item.name in _OF_LAYERS) for one in cards]
    fixed = sum(item.num_bytes for item in cards[0].items if item.name not in (*_OF_LAYERS, *_HEAD))
    head = sum(item.num_bytes for item in cards[-1].items if item.name in _HEAD)
    return _Bytes(layer=np.array(of_layer, np.int64), fixed=fixed, head=head)


def _expert_bytes(simulation: Simulation, schedule: OffloadSchedule) -> Whole:
    found = np.zeros(simulation.model.num_layers, np.int64)
    found[list(simulation.model.moe_layers)] = simulation.trace.num_experts * simulation.expert_bytes(schedule)
    return found


def _times(simulation: Simulation, schedule: OffloadSchedule, cached_experts: int) -> Floats:
    """Return [cards, layers] seconds of all passes of the recording, each as one of two kinds: a decode step, or a micro-batch."""
    model, workload = simulation.model, simulation.workload(schedule)
    fmt, resident = simulation.expert_format(schedule), dict(
        zip(model.moe_layers, simulation.resident_by_layer(schedule, cached_experts), strict=True)
    )  # fmt: skip
    found = np.zeros((len(simulation.costs.each_card), model.num_layers))
    start = schedule.kernel.upload_tokens
    for phase in (0, 1):
        mine = workload.step_phase == phase
        passes = int(mine.sum())
        if not passes:
            continue
        tokens, context = round(float(workload.step_tokens[mine].mean())), int(workload.step_context[mine].mean())
        routed = tokens * model.top_k
        used = model.num_experts * (1 - (1 - 1 / model.num_experts) ** routed)
        requests = 1 if phase == 0 else tokens
        for (card, costs), layer in itertools.product(enumerate(simulation.costs.each_card), range(model.num_layers)):
            took = costs.dense_layer(layer, tokens, context, requests).seconds
            if layer in resident:
                each = max(1, round(routed / used))
                on_card = resident[layer] > 0 or (start is not None and tokens >= start)
                if on_card:
                    took += costs.grouped_base(fmt).seconds + used * costs.grouped_item(each, fmt).seconds
                if on_card and not resident[layer]:
                    took += used * costs.host_to_device(simulation.expert_bytes(schedule)).seconds
            found[card, layer] += passes * took
    return found


def _hop_s(simulation: Simulation) -> float:
    links, workload = simulation.profile.links, simulation.trace
    return 0.0 if links is None else links.hop_s.value * workload.num_tokens


def _missing(sizes: _Bytes, budgets: Sequence[int]) -> int:
    """Return bytes that are certainly lacking; at least one."""
    every = int(sizes.layer.sum()) + sizes.head + sizes.fixed * len(budgets) - sum(budgets)
    largest = int(sizes.layer.max()) + sizes.fixed - max(budgets)
    return max(1, every, largest)
