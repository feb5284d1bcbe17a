"""A study as its page sees it: rows of a grid, and how much the answer depends on each of its axes.

Modelled: figures by the levels of their run; for each axis the ratio of the best to the worst answer where all else is equal, and its share
of the spread: the total effect index, E[Var(log y | all other axes)] / Var(log y) (Homma and Saltelli, Reliability Engineering & System
Safety 52, 1996). Ignored: what the axes mean.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Levels = tuple[int, ...]
DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A figure that runs are compared by."""

    name: str
    title: str
    unit: str
    most_is_best: bool


METRICS = (
    Metric(name="decode_tokens_per_s", title="Decoding", unit="generated tokens/s", most_is_best=True),
    Metric(name="request_s", title="Time of a request", unit="s a request", most_is_best=False),
    Metric(name="prefill_tokens_per_s", title="Prompts", unit="prompt tokens/s", most_is_best=True),
    Metric(name="ttft_s", title="First token", unit="s to the first token", most_is_best=False),
    Metric(name="window_s", title="Whole window", unit="s for all passes", most_is_best=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run."""

    levels: Levels
    """The number of its level on every axis."""
    state: str
    reason: str | None
    figures: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRows:
    """A study with the runs that have answers."""

    name: str
    num_runs: int
    axes: Mapping[str, Sequence[Any]]
    """Labels of every axis's levels."""
    base: Mapping[str, Any]
    """What all runs share."""
    rows: Sequence[Row]

    def values(self, metric: Metric) -> dict[Levels, float]:
        """Return a figure by the levels of the runs that have it."""
        found = ((row.levels, row.figures.get(metric.name)) for row in self.rows if row.state == DONE)
        return {levels: float(value) for levels, value in found if isinstance(value, (int, float)) and value > 0}

    def metrics(self) -> list[Metric]:
        """Return the figures that any run has; the whole window only where there is no other, the first token only without prompts."""
        found = {metric.name: metric for metric in METRICS if self.values(metric)}
        if len(found) > 1:
            found.pop("window_s", None)
        if "prefill_tokens_per_s" in found:
            found.pop("ttft_s", None)
        return list(found.values())

    def label(self, levels: Levels, *, axes: Sequence[str] | None = None) -> str:
        """Return a run's levels in words, of all axes or of those named."""
        parts = [
            f"{name} {labels[at]}"
            for (name, labels), at in zip(self.axes.items(), levels, strict=True)
            if axes is None or name in axes
        ]
        return ", ".join(parts) or "the only run"

    def best(self, metric: Metric) -> tuple[Levels, float] | None:
        """Return the run with the best figure and the figure; the first of equals."""
        found = self.values(metric)
        if not found:
            return None
        choose = max if metric.most_is_best else min
        return choose(found.items(), key=lambda each: each[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What one axis does to one figure."""

    axis: str
    at: int
    """The axis's number."""
    ratio: float
    """From the worst level to the best where all else is equal: the median over all such groups."""
    least: float
    most: float
    best: str
    """The level that is best most often; levels that are equal share."""
    best_share: float
    """In how many of the groups it is."""
    spread_share: float
    """Total effect index: share of the variance of the logarithm; what axes do together counts for each of them."""


def effects(study: StudyRows, metric: Metric) -> list[Effect]:
    """Return the effect of every axis that has several levels with answers, the strongest first."""
    values = study.values(metric)
    if len(values) < 2:
        return []
    total = statistics.pvariance([math.log(value) for value in values.values()])
    found = []
    for at, (name, labels) in enumerate(study.axes.items()):
        groups: dict[Levels, dict[int, float]] = defaultdict(dict)
        for levels, value in values.items():
            groups[levels[:at] + levels[at + 1 :]][levels[at]] = value
        several = [group for group in groups.values() if len(group) > 1]
        if not several:
            continue
        ratios = sorted(max(group.values()) / min(group.values()) for group in several)
        # Single runs of their group vary over nothing: they count as nought, weighed as the runs they are.
        within = sum(
            statistics.pvariance([math.log(value) for value in group.values()]) * len(group) for group in several
        )
        wins: Counter[int] = Counter()
        for group in several:
            top = (max if metric.most_is_best else min)(group.values())
            wins.update(level for level, value in group.items() if value == top)
        level, count = min(wins.items(), key=lambda each: (-each[1], each[0]))
        found.append(Effect(
            axis=name, at=at, ratio=statistics.median(ratios), least=ratios[0], most=ratios[-1], best=str(labels[level]),
            best_share=count / len(several), spread_share=within / len(values) / total if total > 0 else 0.0,
        ))  # fmt: skip
    return sorted(found, key=lambda one: (-one.spread_share, one.at))


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two studies where their runs have equal labels."""

    names: tuple[str, str]
    metric: Metric
    num_runs: int
    ratio: float
    """Second over first: the median over the runs."""
    least: float
    most: float


def compare(first: StudyRows, second: StudyRows) -> list[Comparison]:
    """Return how the figures of two studies differ over runs whose labels are equal on the axes that both have.

    An axis that only one of them has must have a single level, since nothing says which level to compare.
    """
    shared = [name for name in first.axes if name in second.axes]
    if any(len(labels) > 1 for study in (first, second) for name, labels in study.axes.items() if name not in shared):
        return []
    found = []
    for metric in METRICS:
        mine, theirs = (_by_labels(study, metric, shared) for study in (first, second))
        ratios = sorted(theirs[labels] / mine[labels] for labels in mine if labels in theirs)
        if ratios:
            found.append(Comparison(names=(first.name, second.name), metric=metric, num_runs=len(ratios), least=ratios[0], most=ratios[-1],
                                    ratio=statistics.median(ratios)))  # fmt: skip
    return found


def _by_labels(study: StudyRows, metric: Metric, shared: Sequence[str]) -> dict[tuple[str, ...], float]:
    names = list(study.axes)
    places = [names.index(name) for name in shared]
    return {
        tuple(str(study.axes[names[at]][levels[at]]) for at in places): value
        for levels, value in study.values(metric).items()
    }
