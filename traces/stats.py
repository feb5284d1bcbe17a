"""What a recording's routing is like: loads, reuse between tokens, affinity between layers, working sets, LRU hits.

Modelled: every figure is a mean over MoE layers, with lists by layer where layers differ much; `docs/metrics.md` has
the formulas. All are exact over the whole recording, except the affinity of very long ones, which is scored on evenly
spaced tokens (their number is in the result). Rows are read in chunks, so memory does not grow with the recording.
Ignored: time.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .counting import add_co_occurrence, add_guess_hits, add_loads, add_overlaps, affinity_hits
from .recording import PREFILL, LoadProfile, RoutingTrace
from .stack_distance import lru_curve
from .validate import release_pages, row_chunks

OVERLAP_DISTANCES = (1, 2, 4, 8, 16, 32, 64)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MAX_AFFINITY_TOKENS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStats:
    """Figures of one recording; shares are 0 to 1, and a figure that the recording cannot give is None."""

    num_tokens: int
    num_layers: int
    num_experts: int
    top_k: int
    num_requests: int
    num_prefill_tokens: int
    num_decode_tokens: int
    max_tokens_per_request: int
    load_max_over_mean: float
    """Tokens of a layer's busiest expert over the mean of its experts."""
    load_max_over_mean_by_layer: list[float]
    load_gini: float
    """Gini coefficient of a layer's loads: 0 all equal, towards 1 all on one expert."""
    load_gini_by_layer: list[float]
    reuse_fraction: float | None
    """Share of a token's experts that the request's token before it used too."""
    reuse_fraction_by_layer: list[float] | None
    reuse_chance_fraction: float
    """The same share for two tokens drawn independently with the layer's loads."""
    overlap_fraction: dict[int, float]
    """Distance in tokens → share of a token's experts that the request's token so far back used."""
    affinity_recall_fraction: float | None
    """Share of a token's experts in a layer among the top_k that co-occurred most with its experts one layer before."""
    affinity_recall_2k_fraction: float | None
    """The same among the 2 × top_k that co-occurred most."""
    affinity_partner_fraction: float | None
    """Share of the tokens that use an expert which also use its most frequent partner in the next layer."""
    num_affinity_tokens: int
    """Tokens the two recalls were scored on."""
    active_fraction: dict[int, float]
    """Batch size → expected share of a layer's experts used by that many tokens drawn at random from the recording."""
    lru_hit_fraction_reset: list[float]
    """LRU hit rate with 1, 2, … num_experts experts cached per layer, the cache empty at the start of each request."""
    lru_hit_fraction_persistent: list[float]
    """The same with one cache that lives through the whole recording, requests one after another."""
    guess_recall_fraction: list[list[float]] | None
    """[distance − 1][width − 1].

    Share of a token's experts among the first `width` guesses made `distance` layers earlier.
    """

    def lru_hit_at(self, share: float) -> float:
        """Return the LRU hit rate with `share` of the experts cached (whole experts), the cache emptied per request."""
        capacity = round(share * self.num_experts)
        return self.lru_hit_fraction_reset[capacity - 1] if capacity >= 1 else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the figures as plain dictionaries, lists and numbers, ready for JSON."""
        return asdict(self)


def trace_stats(trace: RoutingTrace) -> TraceStats:
    """Return the figures of a recording, read in chunks: once for loads, reuse and affinity, once per LRU scope."""
    loads = np.zeros((trace.num_layers, trace.num_experts), dtype=np.int64)
    pairs = np.zeros((trace.num_layers - 1, trace.num_experts, trace.num_experts), dtype=np.uint32)
    distances = np.array(OVERLAP_DISTANCES, dtype=np.int64)
    shared = np.zeros((len(distances), trace.num_layers), dtype=np.int64)
    compared = np.zeros(len(distances), dtype=np.int64)
    prefill = requests = longest = 0
    run_request, run_length = -1, 0
    halo = max(OVERLAP_DISTANCES)
    for start, stop in _chunks(trace):
        first = max(0, start - halo)
        experts = np.array(trace.experts[first:stop])
        request, position = np.array(trace.request[first:stop]), np.array(trace.position[first:stop])
        add_loads(experts[start - first :], loads)
        add_co_occurrence(experts[start - first :], pairs)
        add_overlaps(experts, request, position, start - first, distances, shared, compared)
        prefill += int(np.count_nonzero(np.asarray(trace.phase[start:stop]) == PREFILL))
        borders = np.flatnonzero(np.diff(request[start - first :], prepend=np.int32(run_request)))
        requests += len(borders)
        lengths = np.diff(np.concatenate(([-run_length], borders, [stop - start])))
        longest = max(longest, int(lengths.max()))
        run_request, run_length = int(request[-1]), int(lengths[-1])
        release_pages(trace.experts)
    hits, scored = _affinity(trace, pairs)
    overlap = {
        d: int(s.sum()) / (int(n) * trace.num_layers * trace.top_k) for d, s, n in _zip(distances, shared, compared)
    }
    shares = loads / trace.num_tokens
    chosen = scored * trace.top_k * (trace.num_layers - 1)
    skew, gini = max_over_mean(loads), gini_coefficient(loads)
    return TraceStats(
        num_tokens=trace.num_tokens,
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        num_requests=requests,
        num_prefill_tokens=prefill,
        num_decode_tokens=trace.num_tokens - prefill,
        max_tokens_per_request=longest,
        load_max_over_mean=float(skew.mean()),
        load_max_over_mean_by_layer=skew.tolist(),
        load_gini=float(gini.mean()),
        load_gini_by_layer=gini.tolist(),
        reuse_fraction=overlap.get(1),
        reuse_fraction_by_layer=(shared[0] / (compared[0] * trace.top_k)).tolist() if compared[0] else None,
        reuse_chance_fraction=float((shares**2).sum(axis=1).mean() / trace.top_k),
        overlap_fraction=overlap,
        affinity_recall_fraction=int(hits[0]) / chosen if chosen else None,
        affinity_recall_2k_fraction=int(hits[1]) / chosen if chosen else None,
        affinity_partner_fraction=_partner_fraction(pairs, loads) if chosen else None,
        num_affinity_tokens=scored,
        active_fraction=active_fractions(loads, trace.num_tokens),
        lru_hit_fraction_reset=lru_curve(trace, "request").hit_rates(),
        lru_hit_fraction_persistent=lru_curve(trace, "never").hit_rates(),
        guess_recall_fraction=guess_recall(trace),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStats:
    """Figures of a load profile: all that counts alone can tell."""

    num_layers: int
    num_experts: int
    num_windows: int
    load_max_over_mean: float
    load_max_over_mean_by_layer: list[float]
    load_gini: float
    load_gini_by_layer: list[float]

    def as_json(self) -> dict[str, Any]:
        """Return the figures as plain dictionaries, lists and numbers, ready for JSON."""
        return asdict(self)


def load_stats(profile: LoadProfile) -> LoadStats:
    """Return the figures of a load profile."""
    skew, gini = max_over_mean(profile.counts), gini_coefficient(profile.counts)
    return LoadStats(
        num_layers=profile.num_layers,
        num_experts=profile.num_experts,
        num_windows=0 if profile.windows is None else len(profile.windows),
        load_max_over_mean=float(skew.mean()),
        load_max_over_mean_by_layer=skew.tolist(),
        load_gini=float(gini.mean()),
        load_gini_by_layer=gini.tolist(),
    )


def max_over_mean(loads: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return [num_layers].

    The largest of each row of `loads` [num_layers, num_experts] over its mean (1 for an empty row).
    """
    mean = loads.mean(axis=1)
    skew = np.ones(len(loads))
    np.divide(loads.max(axis=1), mean, out=skew, where=mean > 0)
    return skew


def gini_coefficient(loads: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return [num_layers].

    The Gini coefficient of each row, half the mean absolute difference of two experts over the mean.
    """
    num_experts = loads.shape[1]
    ordered = np.sort(loads, axis=1).astype(np.float64)
    total = ordered.sum(axis=1)
    lean = ordered @ (2.0 * np.arange(1, num_experts + 1) - num_experts - 1)
    gini = np.zeros(len(loads))
    np.divide(lean, num_experts * total, out=gini, where=total > 0)
    return gini


def active_fractions(loads: npt.NDArray[np.int64], num_tokens: int) -> dict[int, float]:
    """Return batch size → expected share of a layer's experts that so many different tokens, drawn at random, use.

    Exact: an expert that n of T tokens use stays unused by B of them with probability C(T − n, B) / C(T, B).
    """
    result = {}
    unused = np.ones(loads.shape)
    drawn = 0
    for batch in BATCH_SIZES:
        if batch > num_tokens:
            break
        for drawn_before in range(drawn, batch):
            unused *= np.maximum(num_tokens - loads - drawn_before, 0) / (num_tokens - drawn_before)
        drawn = batch
        result[batch] = float(1.0 - unused.mean())
    return result


def guess_recall(trace: RoutingTrace) -> list[list[float]] | None:
    """Return [distance − 1][width − 1]: share of experts used that were among the first `width` guesses.

    None without guesses. Only layers that have a layer so far before them count.
    """
    if trace.predicted is None:
        return None
    _, num_layers, num_distances, width = trace.predicted.shape
    hits = np.zeros((num_distances, width), dtype=np.int64)
    for start, stop in _chunks(trace):
        add_guess_hits(np.array(trace.experts[start:stop]), np.array(trace.predicted[start:stop]), hits)
        release_pages(trace.experts)
    layers = num_layers - np.arange(1, num_distances + 1)
    wanted = np.maximum(layers, 1) * trace.num_tokens * trace.top_k
    return [[float(cell) for cell in row] for row in np.cumsum(hits, axis=1) / wanted[:, None]]


def _affinity(trace: RoutingTrace, pairs: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.int64], int]:
    """Return (hits among the best top_k and 2 × top_k, tokens scored) when co-occurrence predicts each next layer."""
    hits = np.zeros(2, dtype=np.int64)
    if trace.num_layers < 2:
        return hits, 0
    stride = math.ceil(trace.num_tokens / _MAX_AFFINITY_TOKENS)
    scored = 0
    for start, stop in _chunks(trace):
        rows = np.array(trace.experts[start + (-start) % stride : stop : stride])
        affinity_hits(rows, pairs, hits)
        scored += len(rows)
        release_pages(trace.experts)
    return hits, scored


def _partner_fraction(pairs: npt.NDArray[np.uint32], loads: npt.NDArray[np.int64]) -> float:
    """Return the share of choices whose token also uses the chosen expert's most frequent partner one layer later."""
    strongest = pairs.max(axis=2).sum(axis=1, dtype=np.int64)
    return float((strongest / loads[:-1].sum(axis=1)).mean())


def _chunks(trace: RoutingTrace) -> list[tuple[int, int]]:
    """Return row ranges small enough to copy."""
    row_bytes = trace.num_layers * trace.top_k * trace.experts.itemsize
    if trace.predicted is not None:
        row_bytes += 2 * int(np.prod(trace.predicted.shape[1:]))
    return list(row_chunks(trace.num_tokens, row_bytes))


def _zip(
    distances: npt.NDArray[np.int64], shared: npt.NDArray[np.int64], compared: npt.NDArray[np.int64]
) -> list[tuple[int, npt.NDArray[np.int64], int]]:
    """Return the distances at which any two tokens could be compared, each with its counts."""
    return [(int(d), s, int(n)) for d, s, n in zip(distances, shared, compared, strict=True) if n > 0]
