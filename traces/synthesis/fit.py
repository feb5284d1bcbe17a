"""Setting the dials so that synthetic routing resembles a recording.

Modelled: what can be read off a recording is read off (shape, request lengths, domains, recall of guesses, popularity
by rank); the seven dials of repetition, affinity and request shift are found by damped Gauss–Newton steps on the
difference of statistics between an excerpt of the recording and a synthetic one with the same requests, always drawn
from the same seed, so that the difference is a function of the dials alone. Popularity is corrected between rounds,
because drawing without replacement and repeating flatten it. Ignored: differences between layers; the fit is to their
mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..counting import add_loads
from ..domains import decode_domains
from ..recording import PREFILL, RoutingTrace
from ..stats import TraceStats, trace_stats
from ..validate import release_pages, row_chunks
from .dial import Dials
from .synthesise import RequestPlan, base_popularity, synth_trace

Vector = npt.NDArray[np.float64]

_EXCERPT_TOKENS = 1 << 15
_FIT_LAYERS = 6  # layers are alike in synthesis, so a few of them tell the mean
# Several draws of every request's shift, so that the dials do not fit one of them.
_FIT_SEEDS = (1 << 40, (1 << 40) + 1, (1 << 40) + 2)
_ROUNDS, _STEPS, _CORRECTIONS = 4, 3, 3
_PROBE = 0.15  # step in the unbounded dials for difference quotients; large against the noise of sampling
_LENGTH_QUANTILES = 21
_LRU_SHARES = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
_START: Vector = np.array([-1.5, 0.5, -0.5, -1.0, 1.0, -1.0, 0.0])


def fit_like(trace: RoutingTrace, progress: Callable[[float], None] | None = None) -> Dials:
    """Return dials whose synthetic recordings resemble `trace`.

    Deterministic; reads all of it once, then fits an excerpt, which takes half a minute or so. `progress` is told the share
    done, from 0 to 1.
    """
    excerpt = _excerpt(trace)
    target = trace_stats(excerpt)
    prompts, totals = _request_lengths(trace)
    _, domain = decode_domains(trace.metadata, excerpt.request[_starts(excerpt)])
    _, order = decode_domains(trace.metadata, trace.request[_starts(trace)])
    runs = 1 + int(np.count_nonzero(np.diff(order)))
    plan = _plan(excerpt, domain)
    shares = _mean_loads_by_rank(excerpt)
    shape = Dials(
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        layer_ids=trace.layer_ids,
        popularity=tuple(np.maximum(shares, 1e-6).tolist()),
        domain_share=_domain_share(excerpt, domain),
        num_domains=max(1, len(set(order.tolist()))),
        requests_per_domain=max(1, round(len(order) / runs)),
        prompt_tokens=_quantiles(prompts),
        decode_tokens=_quantiles(totals - prompts),
    )
    fitted = _fit(shape, target, plan, shares, progress)
    return dataclasses.replace(fitted, guess_recall=_reachable_recall(target, trace))


def _fit(
    shape: Dials, target: TraceStats, plan: RequestPlan, shares: Vector, progress: Callable[[float], None] | None
) -> Dials:
    """Return `shape` with the repetition, affinity and shift dials set and popularity corrected."""
    small = dataclasses.replace(shape, num_layers=min(_FIT_LAYERS, shape.num_layers), layer_ids=())
    wanted = _features(target, target)
    at = _START

    def gap(x: Vector) -> Vector:
        turned = _turned(small, x)
        seen = [_features(trace_stats(synth_trace(turned, plan=plan, seed=seed)), target) for seed in _FIT_SEEDS]
        difference: Vector = np.mean(seen, axis=0) - wanted
        return difference

    for done in range(_ROUNDS):
        if progress is not None:
            progress(done / _ROUNDS)
        for _ in range(_CORRECTIONS):
            small = _corrected(_turned(small, at), plan, shares)
        at = _gauss_newton(gap, at)
    small = _corrected(_turned(small, at), plan, shares)
    return dataclasses.replace(small, num_layers=shape.num_layers, layer_ids=shape.layer_ids)


def _turned(dials: Dials, x: Vector) -> Dials:
    """Return dials at a point of the unbounded space that the search moves in."""
    weight = np.exp(np.array([x[0], x[2], 0.0]) - max(x[0], x[2], 0.0))
    weight /= weight.sum()
    return dataclasses.replace(
        dials,
        reuse_short=float(weight[0]),
        short_span=float(1.0 + np.exp(np.clip(x[1], -20.0, 5.0))),
        reuse_long=float(weight[1]),
        long_decay=float(2.0 / (1.0 + np.exp(-x[3]))),
        affinity=float(1.0 / (1.0 + np.exp(-x[4]))),
        affinity_spread=float(0.5 / (1.0 + np.exp(-x[5]))),
        request_shift=float(np.exp(np.clip(x[6], -20.0, 1.0))),
    )


def _corrected(dials: Dials, plan: RequestPlan, shares: Vector) -> Dials:
    """Return dials with popularity moved so that loads by rank come closer to `shares` [num_experts], descending."""
    seen = [_mean_loads_by_rank(synth_trace(dials, plan=plan, seed=seed)) for seed in _FIT_SEEDS]
    observed = np.maximum(np.mean(seen, axis=0), 1e-4)
    popularity = np.sort(base_popularity(dials))[::-1] * (np.maximum(shares, 1e-4) / observed) ** 0.8
    popularity = np.maximum(np.sort(popularity)[::-1] / popularity.max(), 1e-6)
    return dataclasses.replace(dials, popularity=tuple(popularity.tolist()))


def _gauss_newton(gap: Callable[[Vector], Vector], start: Vector) -> Vector:
    """Return a point with a smaller sum of squares of `gap`, after a few damped Gauss–Newton steps (Levenberg 1944)."""
    at, here, damping = start, gap(start), 0.1
    for _ in range(_STEPS):
        probes = _PROBE * np.eye(len(at))
        slope = np.stack([(gap(at + probe) - gap(at - probe)) / (2 * _PROBE) for probe in probes], axis=1)
        normal, downhill = slope.T @ slope, -slope.T @ here
        for _ in range(4):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-4), downhill)
            there = at + np.clip(step, -1.5, 1.5)
            after = gap(there)
            if after @ after < here @ here:
                at, here, damping = there, after, damping * 0.3
                break
            damping *= 4.0
        else:
            break
    return at


def _features(stats: TraceStats, target: TraceStats) -> Vector:
    """Return the statistics the fit looks at, weighted; those `target` cannot give are left out."""
    capacities = [max(1, round(share * stats.num_experts)) - 1 for share in _LRU_SHARES]
    rows: list[tuple[float, float]] = [(3.0, stats.lru_hit_fraction_reset[c]) for c in capacities]
    rows += [(1.2, stats.lru_hit_fraction_persistent[c]) for c in capacities]
    rows += [(1.2, stats.overlap_fraction.get(d, 0.0)) for d in target.overlap_fraction]
    rows += [(1.0, stats.active_fraction[b]) for b in (2, 8, 32, 128) if b in target.active_fraction]
    rows += [(1.2, stats.reuse_chance_fraction), (1.2, stats.load_gini), (0.15, stats.load_max_over_mean)]
    if target.affinity_recall_fraction is not None:
        rows += [(1.2, stats.affinity_recall_fraction or 0.0), (1.2, stats.affinity_recall_2k_fraction or 0.0)]
    return np.array([weight * value for weight, value in rows])


def _excerpt(trace: RoutingTrace) -> RoutingTrace:
    """Return whole requests, evenly spaced, of about 32 thousand tokens in all; overlong ones are cut."""
    if trace.num_tokens <= _EXCERPT_TOKENS:
        return trace
    starts = _starts(trace)
    stops = np.append(starts[1:], trace.num_tokens)
    count = max(1, int(len(starts) * _EXCERPT_TOKENS / trace.num_tokens))
    chosen = np.unique(np.linspace(0, len(starts) - 1, count).astype(np.int64))
    rows = np.concatenate([np.arange(starts[i], stops[i]) for i in chosen])[: 2 * _EXCERPT_TOKENS]
    optional = {
        name: None if column is None else column[rows]
        for name, column in (
            ("weights", None),
            ("predicted", trace.predicted),
            ("predicted_prob", trace.predicted_prob),
        )
    }
    excerpt = dataclasses.replace(
        trace,
        experts=trace.experts[rows],
        request=trace.request[rows],
        position=trace.position[rows],
        phase=trace.phase[rows],
        **optional,  # type: ignore[arg-type]
    )
    release_pages(trace.experts)
    return excerpt


def _starts(trace: RoutingTrace) -> npt.NDArray[np.int64]:
    """Return the first row of every request."""
    return np.flatnonzero(np.diff(trace.request, prepend=np.int32(-1)))


def _request_lengths(trace: RoutingTrace) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (recorded prompt tokens, recorded tokens) of every request."""
    starts = _starts(trace)
    totals = np.diff(np.append(starts, trace.num_tokens))
    prompts = np.add.reduceat((np.asarray(trace.phase) == PREFILL).astype(np.int64), starts)
    return prompts, totals


def _plan(trace: RoutingTrace, domain: npt.NDArray[np.int64]) -> RequestPlan:
    """Return the requests of a recording as a plan; `domain`: [num_requests]."""
    prompts, totals = _request_lengths(trace)
    return RequestPlan(prompt=prompts, total=totals, domain=domain)


def _quantiles(lengths: npt.NDArray[np.int64]) -> tuple[int, ...]:
    """Return evenly spaced quantiles of lengths."""
    quantiles = np.quantile(lengths, np.linspace(0, 1, min(_LENGTH_QUANTILES, len(lengths))))
    return tuple(int(length) for length in np.rint(quantiles))


def _loads(trace: RoutingTrace) -> npt.NDArray[np.int64]:
    """Return tokens per expert [num_layers, num_experts]."""
    loads = np.zeros((trace.num_layers, trace.num_experts), dtype=np.int64)
    for start, stop in row_chunks(trace.num_tokens, trace.num_layers * trace.top_k * trace.experts.itemsize):
        add_loads(np.array(trace.experts[start:stop]), loads)
    return loads


def _mean_loads_by_rank(trace: RoutingTrace) -> Vector:
    """Return the share of tokens that use a layer's most popular expert, its second, ….

    Mean over layers [num_experts].
    """
    ranked = np.sort(_loads(trace), axis=1)[:, ::-1]
    shares: Vector = ranked.mean(axis=0) / trace.num_tokens
    return shares


def _domain_share(trace: RoutingTrace, domain: npt.NDArray[np.int64]) -> float:
    """Return how much of what makes requests differ their domain explains, from the chance of a common expert.

    Two tokens drawn from one request share experts more often than two of its domain, and those more often than any
    two.
    """
    starts = _starts(trace)
    request = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, trace.num_tokens)))
    anywhere, in_domain, in_request = (
        _chance(trace, groups) for groups in (np.zeros_like(request), domain[request], request)
    )
    if in_request <= anywhere:
        return 0.0
    return float(np.clip((in_domain - anywhere) / (in_request - anywhere), 0.0, 1.0))


def _chance(trace: RoutingTrace, group: npt.NDArray[np.int64]) -> float:
    """Return the share of experts that two different tokens of one group have in common, mean over groups by tokens."""
    total = pairs = 0.0
    for number in np.unique(group):
        rows = np.flatnonzero(group == number)
        if len(rows) < 2:
            continue
        loads = _loads(dataclasses.replace(trace, experts=trace.experts[rows])).astype(np.float64)
        common = (loads * (loads - 1)).sum(axis=1).mean() / (len(rows) * (len(rows) - 1) * trace.top_k)
        total += len(rows) * float(common)
        pairs += len(rows)
    return total / pairs if pairs else 0.0


def _reachable_recall(target: TraceStats, trace: RoutingTrace) -> tuple[tuple[float, ...], ...]:
    """Return the recall of early guesses by distance and width, as far as synthesis can give it."""
    if target.guess_recall_fraction is None:
        return ()
    width = trace.num_experts - trace.top_k
    return tuple(tuple(row[:width]) for row in target.guess_recall_fraction if width)
