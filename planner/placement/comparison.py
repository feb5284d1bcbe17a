"""Judging placements on tokens they were not made for, and keeping the best.

Modelled: every candidate, with its run-time router, replays the same steps; each layer's prediction and what explains it
(rows, node and rank traffic) are kept. The final choice may differ from layer to layer, since layers do not interact in
the objective. Ignored: significance; give many tokens, and report on a further split, never on the one chosen by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from .objective import LayerCosts, layer_time
from .placement import Placement
from .replica_choice import ReplicaChoice
from .splits import StepTokens
from .traffic import Traffic, count_traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A placement and the router it runs under."""

    placement: Placement
    """Where experts are."""
    router: ReplicaChoice
    """Which copy a token takes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluation:
    """Predictions for one candidate, mean over steps, one entry per layer."""

    layer_s: npt.NDArray[np.float64]
    """float64 [num_layers]: predicted layer time."""
    compute_s: npt.NDArray[np.float64]
    """float64 [num_layers]: compute of the slowest rank."""
    max_over_mean_rows: npt.NDArray[np.float64]
    """float64 [num_layers]: rows of the fullest rank over the mean."""
    inter_node_tokens: npt.NDArray[np.float64]
    """float64 [num_layers]: tokens crossing between nodes in the dispatch, all ranks."""
    intra_node_tokens: npt.NDArray[np.float64]
    """float64 [num_layers]: tokens forwarded inside nodes in the dispatch, all ranks."""

    @property
    def mean_layer_s(self) -> float:
        """Mean predicted layer time over layers."""
        return float(self.layer_s.mean())


def replay_layer(candidate: Candidate, steps: Sequence[StepTokens], layer: int) -> list[Traffic]:
    """Return the traffic of one layer in every step under the candidate's router."""
    placement, router = candidate.placement, candidate.router
    return [
        count_traffic(
            router.slots(step.experts[:, layer], step.source_rank, placement, layer, index), step.source_rank, placement
        )
        for index, step in enumerate(steps)
    ]


def evaluate(candidate: Candidate, steps: Sequence[StepTokens], costs: LayerCosts) -> Evaluation:
    """Return the candidate's predictions on `steps`; raises InputError when the steps have other layers or ids."""
    return judge(replay(candidate, steps), costs)


def replay(candidate: Candidate, steps: Sequence[StepTokens]) -> list[list[Traffic]]:
    """Return the traffic of every layer in every step; raises InputError when the steps have other layers or ids."""
    layers = candidate.placement.num_layers
    for step in steps:
        if step.experts.shape[1] != layers:
            raise InputError(
                "steps",
                f"{step.experts.shape[1]} layers",
                f"the placement has {layers} MoE layers",
                "use the trace of this model",
            )
    if not steps:
        raise InputError("steps", 0, "at least one step is needed", "hold back more requests")
    return [replay_layer(candidate, steps, layer) for layer in range(layers)]


def judge(replayed: Sequence[Sequence[Traffic]], costs: LayerCosts) -> Evaluation:
    """Return the predictions of what was replayed, [layers][steps]: one replay serves all kinds of exchange."""
    found = np.empty((5, len(replayed)))
    for layer, traffics in enumerate(replayed):
        times = [layer_time(traffic, costs) for traffic in traffics]
        found[:, layer] = (
            np.mean([time.total_s for time in times]),
            np.mean([time.compute_s for time in times]),
            np.mean([traffic.rows.max() / traffic.rows.mean() for traffic in traffics]),
            np.mean([traffic.inter_node.sum() for traffic in traffics]),
            np.mean([traffic.intra_node.sum() for traffic in traffics]),
        )
    return Evaluation(
        layer_s=found[0],
        compute_s=found[1],
        max_over_mean_rows=found[2],
        inter_node_tokens=found[3],
        intra_node_tokens=found[4],
    )


def choose_per_layer(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Return the name of the candidate with the lowest layer time in every layer; ties go to the first given."""
    names = list(evaluations)
    table = np.stack([evaluations[name].layer_s for name in names])
    return [names[place] for place in table.argmin(axis=0)]


def assemble(placements: Mapping[str, Placement], chosen: Sequence[str]) -> Placement:
    """Return the placement whose layer l is that of `placements[chosen[l]]`; raises InputError when shapes differ."""
    first = placements[chosen[0]]
    for name in set(chosen):
        other = placements[name]
        if (other.num_slots, other.num_logical, other.num_ranks, other.num_nodes) != (
            first.num_slots,
            first.num_logical,
            first.num_ranks,
            first.num_nodes,
        ):
            raise InputError(
                "placements", name, "slots, experts, ranks or nodes differ", "choose among placements of one shape"
            )
    rows = np.stack([placements[name].physical_to_logical[layer] for layer, name in enumerate(chosen)])
    return Placement(
        physical_to_logical=rows, num_logical=first.num_logical, num_ranks=first.num_ranks, num_nodes=first.num_nodes
    )
