"""Our placement: the one that minimises the predicted layer time on the recorded tokens themselves.

Modelled: for every layer, annealing (`annealing`) from the best of the given starting placements, over which expert sits
where, which are copied, and which copy each source rank uses; the objective is the mean of `objective` over all given
steps. Slots per rank are fixed, so memory is respected by construction. Deterministic from a seed, whatever the number of
workers. Ignored: interactions between layers (there are none in this objective) and the run-time router, which may still
deviate from the planned table. Overfitting is the main trap: plan on many tokens, compare on others (`comparison`).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError, Internal
from .annealing import MAX_CHOICES, Buckets, Rules, State, anneal, fill_state, mean_seconds
from .objective import LayerCosts
from .placement import Placement, check_topology
from .replica_choice import nearest_table
from .splits import StepTokens
from .traffic import check_range

Counts = npt.NDArray[np.int64]
LayerProgress = Callable[[int, int], None]
"""Told (layers done, of how many)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How long and how warm to anneal. Raises InputError for values out of range."""

    num_moves: int = 200_000
    """Moves proposed per layer."""
    seed: int = 0
    """Seed of every random draw."""
    hot_fraction: float = 0.004
    """First temperature, as a fraction of the starting layer time."""
    cold_fraction: float = 0.0001
    """Last temperature, as a fraction of the starting layer time."""
    first_row_weight: float = 0.02
    """Share of the price of compute that counts at the start of annealing; it grows to all of it at the end."""

    def __post_init__(self) -> None:
        if self.num_moves < 0:
            raise InputError("num_moves", self.num_moves, "must not be negative", "200000 is a good budget")
        if not 0 < self.cold_fraction <= self.hot_fraction < math.inf:
            raise InputError(
                "cold_fraction",
                (self.hot_fraction, self.cold_fraction),
                "needs 0 < cold ≤ hot",
                "the defaults suit most loads",
            )
        if not 0 <= self.first_row_weight <= 1:
            raise InputError(
                "first_row_weight", self.first_row_weight, "must be 0 to 1", "1 counts compute in full throughout"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SearchedLayer:
    """What the search found for one layer."""

    slots: npt.NDArray[np.int32]
    """int32 [num_slots]: expert in every slot."""
    target_rank: npt.NDArray[np.int32]
    """int32 [num_logical, num_ranks]: the rank each source rank sends an expert's tokens to."""
    start: str
    """Name of the starting placement that was best."""
    start_s: float
    """Mean predicted layer time of that start under its nearest-copy table, on the planning steps; of two copies on one
    rank the first does all the work."""
    best_s: float
    """The same for what was found, under its own table."""
    num_evaluated: int
    """Moves evaluated; the rest of the proposals would have changed nothing."""
    num_accepted: int
    """Moves accepted."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SearchResult:
    """Our placement and how it came about."""

    placement: Placement
    """Slots of every layer."""
    table: npt.NDArray[np.int32]
    """int32 [num_layers, num_logical, num_ranks]: the planned slot per expert and source rank, for `StaticChoice`."""
    layers: tuple[SearchedLayer, ...]
    """One record per layer."""


def search_placement(
    steps: Sequence[StepTokens],
    starts: Mapping[str, Placement],
    costs: LayerCosts,
    settings: SearchSettings | None = None,
    workers: int = 1,
    *,
    deadline_s: float | None = None,
    progress: LayerProgress | None = None,
) -> SearchResult:
    """Return our placement for the tokens of `steps`, starting every layer from the best of `starts`.

    All starts must share layers, experts, slots, ranks and nodes; the result has the same. `workers` threads share the
    layers and do not change the result. Layers begun after `deadline_s` (a reading of `time.monotonic`) keep their start. progress is
    told (layers done, of how many). Raises InputError for steps or starts that do not belong together, and for steps larger
    than `costs` reach.
    """
    chosen = settings or SearchSettings()
    _check(steps, starts)
    if costs.sharing is not None:
        costs.sharing.check_tokens(max(step.num_tokens * step.experts.shape[2] for step in steps))
    tables = {name: nearest_table(placement) for name, placement in starts.items()}

    done = itertools.count(1)

    def one(layer: int) -> SearchedLayer:
        late = deadline_s is not None and time.monotonic() > deadline_s
        found = _search_layer(steps, starts, tables, layer, costs, replace(chosen, num_moves=0) if late else chosen)
        if progress is not None:
            progress(next(done), first.num_layers)
        return found

    first = next(iter(starts.values()))
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        layers = tuple(pool.map(one, range(first.num_layers)))
    placement = Placement(
        physical_to_logical=np.stack([layer.slots for layer in layers]),
        num_logical=first.num_logical,
        num_ranks=first.num_ranks,
        num_nodes=first.num_nodes,
    )
    table = np.stack([slot_table(placement, index, layer.target_rank) for index, layer in enumerate(layers)])
    return SearchResult(placement=placement, table=table, layers=layers)


def slot_table(placement: Placement, layer: int, target_rank: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return the first slot of each expert on its target rank, int32 [num_logical, num_ranks]."""
    row = placement.physical_to_logical[layer].reshape(placement.num_ranks, -1)
    place = np.argmax(row[target_rank] == np.arange(placement.num_logical)[:, None, None], axis=2)
    table: npt.NDArray[np.int32] = (target_rank * placement.slots_per_rank + place).astype(np.int32)
    return table


def layer_buckets(steps: Sequence[StepTokens], layer: int, num_logical: int, num_ranks: int) -> tuple[Buckets, Counts]:
    """Return the tokens of one layer grouped by (expert, source rank, step), and their choices int64 [tokens, top_k]."""
    experts = np.concatenate([step.experts[:, layer] for step in steps]).astype(np.int64)
    source = np.concatenate([step.source_rank for step in steps]).astype(np.int32)
    index = np.repeat(np.arange(len(steps)), [step.num_tokens for step in steps]).astype(np.int32)
    keys = ((experts * num_ranks + source[:, None]) * len(steps) + index[:, None]).ravel()
    order = np.argsort(keys, kind="stable")
    start = np.searchsorted(keys[order], np.arange(num_logical * num_ranks * len(steps) + 1)).astype(np.int64)
    token = (order // experts.shape[1]).astype(np.int32)
    return Buckets(start=start, token=token, source=source, step=index), experts


def new_state(placement: Placement, layer: int, target_rank: Counts, num_tokens: int, num_steps: int) -> State:
    """Return the annealing state of a placement's layer with empty counts (`annealing.fill_state` fills them)."""
    slots = placement.physical_to_logical[layer].astype(np.int64)
    held = np.zeros((placement.num_logical, placement.num_ranks), dtype=np.int64)
    np.add.at(held, (slots, placement.slot_rank()), 1)
    return State(
        slots=slots,
        target=target_rank.astype(np.int64),
        held=held,
        copies=held.sum(axis=1),
        visits=np.zeros((num_tokens, placement.num_ranks + placement.num_nodes), dtype=np.uint8),
        ports=np.zeros((num_steps, 5, placement.num_ranks), dtype=np.int64),
        rows=np.zeros((num_steps, placement.num_logical, placement.num_ranks), dtype=np.int64),
    )


def layer_rules(buckets: Buckets, costs: LayerCosts, placement: Placement) -> Rules:
    """Return what the annealing of a layer holds fixed; the table of work reaches to the busiest expert of any step."""
    sizes = np.diff(buckets.start).reshape(placement.num_logical, placement.num_ranks, -1)
    return Rules(placement.ranks_per_node, costs.kind, costs.work_table(int(sizes.sum(axis=1).max(initial=0))))


def _search_layer(
    steps: Sequence[StepTokens],
    starts: Mapping[str, Placement],
    tables: Mapping[str, npt.NDArray[np.int32]],
    layer: int,
    costs: LayerCosts,
    settings: SearchSettings,
) -> SearchedLayer:
    """Anneal one layer from the start with the lowest predicted time (ties to the first given)."""
    first = next(iter(starts.values()))
    buckets, experts = layer_buckets(steps, layer, first.num_logical, first.num_ranks)
    rules, prices = layer_rules(buckets, costs, first), costs.prices()
    best: tuple[float, str, State] | None = None
    for name, placement in starts.items():
        target = (tables[name][layer] // placement.slots_per_rank).astype(np.int64)
        state = new_state(placement, layer, target, len(experts), len(steps))
        fill_state(state, buckets, experts, rules)
        seconds = float(mean_seconds(state.ports, prices, 1.0))
        if best is None or seconds < best[0]:
            best = (seconds, name, state)
    if best is None:
        raise Internal("a search without a starting placement")
    start_s, name, state = best
    slots, target = state.slots.copy(), state.target.copy()
    seed = settings.seed * first.num_layers + layer
    # A layer that takes no time (all constants zero) still needs a positive temperature.
    scale = start_s or 1.0
    hot_s, cold_s = settings.hot_fraction * scale, settings.cold_fraction * scale
    best_s, evaluated, accepted = anneal(
        state,
        buckets,
        rules,
        prices,
        settings.first_row_weight,
        settings.num_moves,
        hot_s,
        cold_s,
        seed,
        slots,
        target,
    )
    return SearchedLayer(
        slots=slots.astype(np.int32),
        target_rank=target.astype(np.int32),
        start=name,
        start_s=start_s,
        best_s=float(best_s),
        num_evaluated=int(evaluated),
        num_accepted=int(accepted),
    )


def _check(steps: Sequence[StepTokens], starts: Mapping[str, Placement]) -> None:
    """Raise InputError unless steps and starting placements belong together."""
    if not steps or not starts:
        raise InputError(
            "steps", f"{len(steps)} steps, {len(starts)} starts", "at least one of each", "record more tokens"
        )
    first = next(iter(starts.values()))
    check_topology(first.num_logical, first.num_slots, first.num_ranks, first.num_nodes)
    shape = (first.num_layers, first.num_slots, first.num_logical, first.num_ranks, first.num_nodes)
    for name, other in starts.items():
        theirs = (other.num_layers, other.num_slots, other.num_logical, other.num_ranks, other.num_nodes)
        if theirs != shape:
            raise InputError(
                f"starts[{name!r}]",
                theirs,
                f"layers, slots, experts, ranks and nodes differ from {shape}",
                "start from placements of one shape",
            )
    for step in steps:
        if step.experts.shape[1] != first.num_layers:
            raise InputError(
                "steps",
                f"{step.experts.shape[1]} layers",
                f"the placement has {first.num_layers} MoE layers",
                "use the trace of this model",
            )
        if step.experts.shape[2] > MAX_CHOICES:
            raise InputError(
                "top_k", step.experts.shape[2], f"at most {MAX_CHOICES} choices a token", "check the trace"
            )
        check_range("experts", step.experts, first.num_logical)
        check_range("source_rank", step.source_rank, first.num_ranks)
