"""Placements, steps and loads for the tests of the placement room: strategies and one synthetic recording with affinity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from moeplan.planner.placement.objective import LayerCosts
from moeplan.planner.placement.placement import Placement
from moeplan.planner.placement.splits import StepTokens, source_ranks

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"

COSTS = LayerCosts(
    token_bytes_dispatch=4096.0,
    token_bytes_combine=4096.0,
    intra_bytes_per_s=200e9,
    inter_bytes_per_s=25e9,
    row_s=77e-9,
)


def clustered_step(
    seed: int, *, num_tokens: int = 512, num_layers: int = 2, num_logical: int = 16, top_k: int = 3, num_ranks: int = 4
) -> StepTokens:
    """Return tokens that draw most experts from one of four hidden groups per layer, with uneven popularity."""
    rng = np.random.default_rng(seed)
    experts = np.empty((num_tokens, num_layers, top_k), dtype=np.int32)
    for layer in range(num_layers):
        # The hidden groups belong to the layer, not to the seed: other tokens of the same "model" share them.
        order = np.random.default_rng(layer).permutation(num_logical)
        group = rng.choice(4, num_tokens, p=[0.4, 0.3, 0.2, 0.1])
        weight = np.full((num_tokens, num_logical), 0.15)
        for place, expert in enumerate(order):
            weight[:, expert] += (group == place % 4) * (1 + place / num_logical)
        keys = rng.random((num_tokens, num_logical)) ** (1 / weight)
        experts[:, layer] = np.argsort(-keys, axis=1)[:, :top_k]
    return StepTokens(experts=experts, source_rank=source_ranks(num_tokens, num_ranks))


def drawn_row(rng: np.random.Generator, num_logical: int, num_ranks: int, per_rank: int) -> npt.NDArray[np.int64]:
    """Return the experts of every slot of a layer: dealt at random, then every rank takes others that it lacks."""
    dealt = [part.tolist() for part in np.array_split(rng.permutation(num_logical), num_ranks)]
    more = [rng.permutation(np.setdiff1d(np.arange(num_logical), held))[: per_rank - len(held)] for held in dealt]
    return np.concatenate([rng.permutation([*held, *extra]) for held, extra in zip(dealt, more, strict=True)]).astype(
        np.int64
    )


@st.composite
def topologies(draw: st.DrawFn, *, max_layers: int = 1) -> Placement:
    """Return a random valid placement: 1–3 nodes × 1–3 ranks, up to 3 spare slots a rank, experts anywhere."""
    num_nodes = draw(st.integers(1, 3))
    num_ranks = num_nodes * draw(st.integers(1, 3))
    num_logical = draw(st.integers(num_ranks, num_ranks * 3))
    per_rank = min(num_logical, -(-num_logical // num_ranks) + draw(st.integers(0, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = []
    for _ in range(draw(st.integers(1, max_layers))):
        rows.append(drawn_row(rng, num_logical, num_ranks, per_rank))
    return Placement(
        physical_to_logical=np.array(rows, dtype=np.int32),
        num_logical=num_logical,
        num_ranks=num_ranks,
        num_nodes=num_nodes,
    )


@st.composite
def tokens_for(
    draw: st.DrawFn, placement: Placement, *, max_tokens: int = 40
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return `(experts [tokens, top_k], source_rank [tokens])`: distinct experts per token, any source."""
    num_tokens = draw(st.integers(0, max_tokens))
    top_k = draw(st.integers(1, min(4, placement.num_logical)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts = np.argsort(rng.random((num_tokens, placement.num_logical)), axis=1)[:, :top_k]
    return experts.astype(np.int64), rng.integers(0, placement.num_ranks, num_tokens).astype(np.int64)
