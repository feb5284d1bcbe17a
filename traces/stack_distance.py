"""Hit rates of least-recently-used caches of every capacity, from one pass over a recording.

Modelled: one cache per layer. All experts of a token are looked up before any of them is inserted; then they are
touched or inserted one by one, in recorded order. What such a cache of C experts holds is then always the C experts
used most recently, so an expert's depth in one recency stack says for every C at once whether it was a hit (depth <
C). Ignored: batches (a token is a step here), pooled caches and every policy that is not a stack algorithm: those are
simulated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..base.errors import UnknownName
from ..base.jit import jit
from .recording import RoutingTrace
from .validate import release_pages, row_chunks

CacheScope = Literal["request", "never"]
_COLD = 0xFFFF  # depth of an expert that is not in the stack; recordings have at most 65535 experts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LruCurve:
    """Hits of every LRU capacity, exactly."""

    hits: npt.NDArray[np.int64]
    """int64 [num_layers, num_experts]: lookups of a layer that hit with 1, 2, … experts of capacity."""
    lookups: int
    """Lookups per layer (tokens × top_k)."""

    def hit_rate(self, capacity: int) -> float:
        """Return the share of all lookups that hit when every layer caches `capacity` experts (0 caches none)."""
        if capacity <= 0:
            return 0.0
        column = self.hits[:, min(capacity, self.hits.shape[1]) - 1]
        return float(int(column.sum()) / (self.lookups * self.hits.shape[0]))

    def hit_rates(self) -> list[float]:
        """Return the hit rate for capacities 1 to num_experts."""
        return [self.hit_rate(capacity) for capacity in range(1, self.hits.shape[1] + 1)]


def lru_curve(trace: RoutingTrace, reset: CacheScope = "request") -> LruCurve:
    """Return the exact hits of LRU caches of every capacity, emptied at the start of each request or never.

    Memory: one chunk of rows and a stack of num_experts entries per layer, whatever the length of the recording.
    Raises UnknownName for another `reset`.
    """
    if reset not in ("request", "never"):
        raise UnknownName("reset", reset, ("request", "never"))
    depth = np.full((trace.num_layers, trace.num_experts), _COLD, dtype=np.uint16)
    seen = np.zeros((trace.num_layers, trace.num_experts + 1), dtype=np.int64)
    previous = -1
    for start, stop in row_chunks(trace.num_tokens, trace.num_layers * trace.top_k * trace.experts.itemsize):
        request = np.array(trace.request[start:stop])
        fresh = np.diff(request, prepend=np.int32(previous)) != 0
        previous = int(request[-1])
        if reset == "never":
            fresh[:] = False
        add_depths(np.array(trace.experts[start:stop]), fresh, depth, seen)
        release_pages(trace.experts)
    return LruCurve(hits=np.cumsum(seen[:, :-1], axis=1), lookups=trace.num_tokens * trace.top_k)


@jit
def add_depths(
    experts: npt.NDArray[np.unsignedinteger],
    fresh: npt.NDArray[np.bool_],
    depth: npt.NDArray[np.uint16],
    seen: npt.NDArray[np.int64],
) -> None:
    """Add the depth at which each choice was found to `seen`, and leave `depth` as the stacks are afterwards.

    experts: [num_tokens, num_layers, top_k]; fresh: [num_tokens], true where the cache is emptied first; depth:
    [num_layers, num_experts], place of each expert in its layer's recency stack (0 = most recent, 65535 = absent);
    seen: [num_layers, num_experts + 1], choices found at each depth, the last column for those not found.
    """
    num_tokens, num_layers, top_k = experts.shape
    num_experts = depth.shape[1]
    for layer in range(num_layers):
        stack = depth[layer]
        for t in range(num_tokens):
            if fresh[t]:
                stack[:] = 0xFFFF
            for j in range(top_k):
                seen[layer, min(num_experts, stack[experts[t, layer, j]])] += 1
            for j in range(top_k):
                chosen = experts[t, layer, j]
                above = stack[chosen]
                for other in range(num_experts):  # everything above the chosen one moves down by one place
                    stack[other] += stack[other] < above
                stack[chosen] = 0
