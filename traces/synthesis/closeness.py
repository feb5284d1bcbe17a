"""Two recordings side by side: every statistic of one beside the other's.

Modelled: the figures of `stats`, one row each, and LRU hit rates at five capacities; `worst_lru_difference` is the one
number to look at when a synthetic recording shall stand for a real one in cache studies. Ignored: significance; two
recordings of one model differ too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..recording import RoutingTrace
from ..stats import TraceStats, trace_stats

# Shares of the experts that the five compared caches hold per layer.
LRU_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
# Hit rates that differ by less than this share of all lookups make a synthetic recording stand for the original.
ALLOWED_LRU_DIFFERENCE = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedFigure:
    """One statistic of two recordings; None where a recording cannot give it."""

    name: str
    original: float | None
    synthetic: float | None

    @property
    def difference(self) -> float | None:
        """Synthetic minus original."""
        return None if self.original is None or self.synthetic is None else self.synthetic - self.original


@dataclass(frozen=True, slots=True, kw_only=True)
class Closeness:
    """How alike two recordings are."""

    figures: list[ComparedFigure]
    """Every statistic but the hit rates."""
    lru_hit_fractions: list[ComparedFigure]
    """LRU hit rates at the five capacities, the cache emptied at each request."""

    @property
    def worst_lru_difference(self) -> float:
        """The largest difference of LRU hit rates, as a share of all lookups (0.03 is three points)."""
        return max(abs(row.difference) for row in self.lru_hit_fractions if row.difference is not None)

    @property
    def is_close(self) -> bool:
        """Whether all five hit rates are within `ALLOWED_LRU_DIFFERENCE`."""
        return self.worst_lru_difference <= ALLOWED_LRU_DIFFERENCE

    def as_json(self) -> dict[str, Any]:
        """Return both tables as plain dictionaries, ready for JSON."""
        return {
            "figures": [asdict(row) | {"difference": row.difference} for row in self.figures],
            "lru_hit_fractions": [asdict(row) | {"difference": row.difference} for row in self.lru_hit_fractions],
            "worst_lru_difference": self.worst_lru_difference,
            "is_close": self.is_close,
        }


def closeness(original: RoutingTrace, synthetic: RoutingTrace) -> Closeness:
    """Return the statistics of two recordings side by side."""
    return compare_stats(trace_stats(original), trace_stats(synthetic))


def compare_stats(original: TraceStats, synthetic: TraceStats) -> Closeness:
    """Return two recordings' statistics side by side; hit rates are compared at equal shares of each one's experts."""
    a, b = figures_of(original), figures_of(synthetic)
    names = [*a, *(name for name in b if name not in a)]
    lru = [
        ComparedFigure(
            name=f"lru_hit_fraction at {share:.1%} of the experts",
            original=original.lru_hit_at(share),
            synthetic=synthetic.lru_hit_at(share),
        )
        for share in LRU_SHARES
    ]
    rows = [ComparedFigure(name=name, original=a.get(name), synthetic=b.get(name)) for name in names]
    return Closeness(figures=rows, lru_hit_fractions=lru)


def figures_of(stats: TraceStats) -> dict[str, float | None]:
    """Return every single-number statistic by name; hit rates with a cache that persists are at the five shares."""
    decode = stats.num_decode_tokens / stats.num_tokens
    figures: dict[str, float | None] = {
        "num_tokens": float(stats.num_tokens),
        "num_requests": float(stats.num_requests),
        "tokens_per_request": stats.num_tokens / stats.num_requests,
        "max_tokens_per_request": float(stats.max_tokens_per_request),
        "decode_fraction": decode,
        "load_max_over_mean": stats.load_max_over_mean,
        "load_gini": stats.load_gini,
        "reuse_chance_fraction": stats.reuse_chance_fraction,
        "affinity_recall_fraction": stats.affinity_recall_fraction,
        "affinity_recall_2k_fraction": stats.affinity_recall_2k_fraction,
        "affinity_partner_fraction": stats.affinity_partner_fraction,
    }
    # The fit aims at means over layers; how far single layers lie from them shows here.
    for name, by_layer in (
        ("load_max_over_mean", stats.load_max_over_mean_by_layer),
        ("load_gini", stats.load_gini_by_layer),
        ("reuse_fraction", stats.reuse_fraction_by_layer or []),
    ):
        if by_layer:
            figures |= {f"{name}, least layer": min(by_layer), f"{name}, most layer": max(by_layer)}
    figures |= {f"overlap_fraction at {d} tokens": share for d, share in stats.overlap_fraction.items()}
    figures |= {f"active_fraction at batch {batch}": share for batch, share in stats.active_fraction.items()}
    for share in LRU_SHARES:
        capacity = max(1, round(share * stats.num_experts))
        name = f"lru_hit_fraction_persistent at {share:.1%} of the experts"
        figures[name] = stats.lru_hit_fraction_persistent[capacity - 1]
    for distance, row in enumerate(stats.guess_recall_fraction or [], 1):
        for width, recall in enumerate(row, 1):
            figures[f"guess_recall_fraction at distance {distance}, width {width}"] = recall
    return figures
