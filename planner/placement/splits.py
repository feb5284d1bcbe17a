"""Splitting a recording by request, and cutting whole requests into steps.

Modelled: a plan is made on some requests, chosen on others and reported on a third part, so that nothing is judged by
tokens it has seen; a step is a batch of whole requests in shuffled order, cut every `batch_tokens` tokens (a request may
straddle two steps, as in chunked prefill). Tokens live on ranks round-robin, or in blocks so that a request mostly stays on
one rank. Ignored: arrival times and the real scheduler's batching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from .counter_hash import shuffled

IntArray = npt.NDArray[np.integer]
SourceRule = Literal["token", "request"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepTokens:
    """The tokens of one step."""

    experts: npt.NDArray[np.int32]
    """int32 [tokens, num_layers, top_k]: logical experts."""
    source_rank: npt.NDArray[np.int32]
    """int32 [tokens]: the rank each token lives on."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return int(self.experts.shape[0])


def split_requests(request: IntArray, fractions: Sequence[float], seed: int = 0) -> list[npt.NDArray[np.int64]]:
    """Return disjoint sets of request ids, in hashed order, holding about `fractions` of all tokens each.

    `request: [tokens]` names the request of every token. Requests go one by one to the part that lacks most of its share, so
    long requests do not unbalance the parts. Raises InputError when fractions do not sum to 1 or a part stays empty.
    """
    if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise InputError("fractions", list(fractions), "must be positive and sum to 1", "for instance 0.55, 0.15, 0.3")
    ids, lengths = np.unique(np.asarray(request), return_counts=True)
    want = np.array(fractions) * lengths.sum()
    have = np.zeros(len(fractions))
    parts: list[list[int]] = [[] for _ in fractions]
    for place in shuffled(len(ids), seed, 0):
        part = int(np.argmax((want - have) / want))
        parts[part].append(int(ids[place]))
        have[part] += lengths[place]
    if not all(parts):
        raise InputError(
            "request", f"{len(ids)} requests", f"too few for {len(fractions)} parts", "record more requests"
        )
    return [np.array(part, dtype=np.int64) for part in parts]


def request_batches(
    experts: IntArray,
    request: IntArray,
    requests: IntArray,
    *,
    batch_tokens: int,
    num_ranks: int,
    seed: int = 0,
    shuffles: int = 1,
    source: SourceRule = "token",
    together: int = 1,
) -> list[StepTokens]:
    """Return steps of exactly `batch_tokens` tokens made of whole `requests`, in `shuffles` different orders.

    `experts: [tokens, num_layers, top_k]`, `request: [tokens]`. What is left over at the end of an order is dropped; when all
    the requests together are shorter than one step, each order gives one shorter step. Raises InputError when no token
    belongs to the requests or sizes are not positive. together: consecutive tokens that live on one rank.
    """
    if batch_tokens < num_ranks or shuffles < 1:
        raise InputError(
            "batch_tokens", batch_tokens, f"at least one token for each of {num_ranks} ranks", "use a larger step"
        )
    request = np.asarray(request)
    rows_of = {int(r): np.flatnonzero(request == r) for r in requests}
    num_tokens = sum(len(rows) for rows in rows_of.values())
    if num_tokens == 0:
        raise InputError(
            "requests", len(rows_of), "none of them has a token in this recording", "use its own request ids"
        )
    size = min(batch_tokens, num_tokens)
    ids = [int(r) for r in requests]
    steps = []
    for order in range(shuffles):
        rows = np.concatenate([rows_of[ids[place]] for place in shuffled(len(ids), seed, 1 + order)])
        for first in range(0, num_tokens - size + 1, size):
            chunk = np.ascontiguousarray(experts[rows[first : first + size]], dtype=np.int32)
            steps.append(StepTokens(experts=chunk, source_rank=source_ranks(size, num_ranks, source, together)))
    return steps


def source_ranks(
    num_tokens: int, num_ranks: int, source: SourceRule = "token", together: int = 1
) -> npt.NDArray[np.int32]:
    """Return the rank each of a step's tokens lives on, int32 [tokens]; equally many on every rank, give or take one.

    "token": round-robin, `together` consecutive tokens at a time. "request": consecutive blocks, so that consecutive tokens of a request
    share a rank.
    """
    index = np.arange(num_tokens)
    ranks = index // together % num_ranks if source == "token" else index * num_ranks // num_tokens
    return ranks.astype(np.int32)


def expert_load(steps: Sequence[StepTokens], num_logical: int) -> npt.NDArray[np.int64]:
    """Return tokens per expert summed over steps, int64 [num_layers, num_logical]; raises InputError for ids out of range."""
    num_layers = steps[0].experts.shape[1]
    load = np.zeros(num_layers * num_logical, dtype=np.int64)
    for step in steps:
        if step.experts.size and int(step.experts.max()) >= num_logical:
            raise InputError(
                "experts", int(step.experts.max()), f"ids are 0 to {num_logical - 1}", "use the trace of this model"
            )
        keys = step.experts + np.arange(num_layers)[None, :, None] * num_logical
        load += np.bincount(keys.ravel(), minlength=num_layers * num_logical)
    return load.reshape(num_layers, num_logical)
