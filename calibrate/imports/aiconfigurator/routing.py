"""Rows of each expert in AIConfigurator's measurements, drawn as its collector draws them.

Modelled: its balanced routing (exact) and its power law, whose draws have no seed: several are drawn here and averaged. The rank
that is measured is the one with most rows. Source: `collector/helper.py` of ai-dynamo/aiconfigurator (commit 095f58a5),
`balanced_logits`, `_generate_power_law_distribution`. Ignored: which token chose which expert.
"""

from __future__ import annotations

import heapq
import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ...costs.gpu.experts import TILE_HEIGHTS

Counts = npt.NDArray[np.int64]
DRAWS = 6
# Where few tokens choose, weights are drawn between these ends; else between one and this share of all tokens.
_FEW, _SHARE = (0.01, 2.0), 0.8


def balanced_counts(tokens: int, experts: int, top_k: int) -> Counts:
    """Return the rows of each expert where choices are spread evenly."""
    stride = math.ceil(experts / top_k)
    step = 1 if tokens >= stride else stride / tokens
    chosen = np.arange(tokens)[:, None] * step + np.arange(top_k)[None, :] * stride
    return np.bincount((chosen % experts).astype(np.int64).ravel(), minlength=experts)


def power_law_counts(
    tokens: int, experts: int, top_k: int, ranks: int, alpha: float, rng: np.random.Generator
) -> Counts:
    """Return the rows of each expert of one draw whose popularity follows a power law."""
    least, most = (1.0, tokens * _SHARE) if tokens * top_k > experts else _FEW
    low, high = least ** (1 - alpha), most ** (1 - alpha)
    weight = ((high - low) * rng.random(experts) + low) ** (1 / (1 - alpha))
    target = tokens * top_k
    counts = np.rint(weight / weight.sum() * target).astype(np.int64)
    over = int(np.maximum(counts - tokens, 0).sum())
    counts = _adjusted(np.minimum(counts, tokens), over, ranks, tokens, 1)
    missing = target - int(counts.sum())
    return _adjusted(counts, abs(missing), ranks, tokens, 1 if missing > 0 else -1)


def _adjusted(counts: Counts, remaining: int, ranks: int, most: int, step: int) -> Counts:
    """Return counts with `remaining` single steps made, rank by rank in turn, at the rank's least (or, downwards, fullest) expert."""
    if remaining == 0:
        return counts
    rows = counts.reshape(ranks, -1).copy()
    heaps = [
        [(step * int(value), at) for at, value in enumerate(row) if (value < most if step > 0 else value > 0)]
        for row in rows
    ]
    for heap in heaps:
        heapq.heapify(heap)
    while remaining and any(heaps):
        for rank, heap in enumerate(heaps):
            if not heap or not remaining:
                continue
            _, at = heapq.heappop(heap)
            rows[rank, at] += step
            remaining -= 1
            value = int(rows[rank, at])
            if value < most if step > 0 else value > 0:
                heapq.heappush(heap, (step * value, at))
    return rows.reshape(-1)


def entering_tokens(counts: Counts, mine: Counts, top_k: int) -> int:
    """Return how many tokens have a choice among the experts (or slots) `mine`, where the collector deals choices out to tokens.

    Sorted by rows, experts fill the first choice of all tokens, then the second (`_assign_experts_from_counts`).
    """
    order = np.argsort(-counts, kind="stable")
    choices = np.repeat(order, counts[order]).reshape(top_k, -1)
    return int(np.isin(choices, mine).any(axis=0).sum())


@lru_cache(maxsize=1 << 16)
def heaviest_rank(
    tokens: int, experts: int, top_k: int, ranks: int, distribution: str, others: bool = False
) -> tuple[float, ...]:
    """Return (active experts, rows, tiles of each height, tokens that enter) on the fullest rank, the mean of several draws where there are
    draws.

    others: only tokens with a choice there enter, and their choices elsewhere are rows of its first expert too; else all tokens enter.
    """
    if distribution == "balanced":
        return _features(balanced_counts(tokens, experts, top_k), ranks, tokens, top_k, others)
    alpha = float(distribution.removeprefix("power_law_"))
    rng = np.random.default_rng([tokens, experts, top_k, ranks, round(alpha * 100)])
    drawn = [
        _features(power_law_counts(tokens, experts, top_k, ranks, alpha, rng), ranks, tokens, top_k, others)
        for _ in range(DRAWS)
    ]
    return tuple(float(value) for value in np.mean(drawn, axis=0))


def _features(counts: Counts, ranks: int, tokens: int, top_k: int, others: bool) -> tuple[float, ...]:
    rows = counts.reshape(ranks, -1)
    fullest = int(rows.sum(axis=1).argmax())
    mine, enter = rows[fullest], tokens
    if others and ranks > 1:
        width = rows.shape[1]
        enter = entering_tokens(counts, np.arange(fullest * width, (fullest + 1) * width), top_k)
        mine = mine.copy()
        mine[0] += max(0, enter * top_k - int(mine.sum()))
    tiles = [float(np.ceil(mine / height).sum()) for height in TILE_HEIGHTS]
    return float((mine > 0).sum()), float(mine.sum()), *tiles, float(enter)
