"""All-to-alls into what expert-parallel predictions need: latency and bandwidths, tables by size, and how wrong they are.

    seconds = (latency + busiest port / bandwidth + all ports / shared bandwidth) · residual(all ports)

Modelled: a point is the mean of the middle half of its repetitions: a step adds exchanges up, and short ones on shared cores have
two modes, between which a median jumps. The busiest port is the larger of what a rank sends and receives; what the ranks share
shows in skewed traffic, so without any (another tool's balanced times) a port is its own. Uncertainty is what leaving out whole
sizes, and whole patterns of traffic, got wrong nine times in ten. Beside it the fit says how far the rule of the busiest port
alone would be off under skew. How much exchanges and products slow each other down are medians over sizes, each size predicted
from the others. Ignored: products that read more than caches hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...base.errors import InputError
from ...specs.machines.profile import Curve
from ..all_to_all_matrices import busiest_port, matrix_from_text, port_bytes
from ..costs.all_to_all_table import (
    BETWEEN_RANKS,
    OF_COMPUTE,
    OF_EXCHANGE,
    ExchangeTable,
    between_sizes,
    curve_name,
    is_shared,
    read_table,
)
from ..costs.forms import exchange_form
from ..costs.surface import Array, Columns, Form, fit_surface, nine_in_ten
from ..samples import Sample, SampleSet

_MIN_SIZES, _MIN_PATTERNS = 4, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How well points that were left out are predicted."""

    num_points: int
    errors: Array
    parameters: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeFit:
    """What all samples of exchanges say of a machine."""

    curves: Mapping[str, Curve]
    """Tables by backend and number of ranks, and the slow-down of ranks that compute at once."""
    quality: Mapping[str, Quality]
    speeds: Mapping[str, tuple[float, float]]
    """"exchange/compute" and "compute/exchange": (speed beside the other relative to alone, error nine times in ten)."""
    num_ranks: int
    """The most that were measured; latency, bandwidth and speeds are of that many."""
    latency_s: float
    bytes_per_s: float
    """What one rank gets of a large balanced exchange, with its part of what all share."""
    relative_uncertainty: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Points:
    """Exchanges of one number of ranks: [points] each."""

    columns: Columns
    seconds: Array
    size: Array
    pattern: Array

    def keep(self, mask: Array) -> _Points:
        """Return some of the points."""
        columns = {axis: column[mask] for axis, column in self.columns.items()}
        return _Points(columns=columns, seconds=self.seconds[mask], size=self.size[mask], pattern=self.pattern[mask])


def fit_exchanges(samples: SampleSet, citation: str) -> ExchangeFit | None:
    """Return the fit of all exchanges, None where none were measured; raises InputError for one that is not complete."""
    found = samples.of("all_to_all", companion="none")
    if not found:
        return None
    curves: dict[str, Curve] = {}
    quality: dict[str, Quality] = {}
    together: list[_Together] = []
    kinds = sorted({(s.labels["backend"], int(s.arguments["ranks"])) for s in found})
    for backend, ranks in kinds:
        mine = [s for s in found if (s.labels["backend"], s.arguments["ranks"]) == (backend, ranks)]
        name = curve_name(backend, ranks)
        curves[name], quality[name], skewed = _table(name, [_point(s) for s in mine], citation)
        if skewed is not None:
            quality[f"{name}.skewed"] = skewed
        together.append(_together(samples, backend, read_table(name, ranks, curves)))
        for pair, one in together[-1].quality.items():
            quality[f"{name}.{pair}"] = one
    backend, ranks = kinds[-1]  # NCCL's after gloo's, many after few
    name = curve_name(backend, ranks)
    parameters = quality[name].parameters
    curves |= _slowdowns([one for one in together if one.backend == backend], citation)
    each = 1 / parameters["bandwidth"]
    if "shared_bandwidth" in parameters:
        each += ranks / parameters["shared_bandwidth"]
    return ExchangeFit(
        curves=curves,
        quality=quality,
        speeds={pair: (one.parameters["speed"], nine_in_ten(one.errors)) for pair, one in together[-1].quality.items()},
        num_ranks=ranks,
        latency_s=parameters["latency_s"],
        bytes_per_s=1 / each,
        relative_uncertainty=curves[name].relative_uncertainty,
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def _point(sample: Sample) -> tuple[dict[str, float], float, float, str]:
    """Return (columns, seconds, size, pattern) of an exchange; raises InputError where a skewed one does not say its traffic."""
    ranks, pattern = int(sample.arguments["ranks"]), sample.labels["pattern"]
    if ranks < 2:
        raise InputError("samples: all_to_all.ranks", ranks, "an exchange needs two", "measure again")
    if "matrix" in sample.labels:
        matrix = matrix_from_text(sample.labels["matrix"], ranks)
        larger, total = busiest_port(matrix)[0], int(port_bytes(matrix)[0].sum())
    elif pattern == "balanced":
        larger = int(sample.arguments["bytes"])
        total = ranks * larger
    else:
        raise InputError("samples: all_to_all.matrix", "(absent)", f"{pattern} traffic needs it", "measure again")
    if larger <= 0:
        raise InputError("samples: all_to_all.bytes", larger, "nothing is sent to another rank", "measure again")
    columns = {"bytes": float(larger), "total_bytes": float(total)}
    return columns, sample.midmean_s, float(sample.arguments.get("per_rank_bytes", larger)), pattern


def _table(
    name: str, rows: Sequence[tuple[dict[str, float], float, float, str]], citation: str
) -> tuple[Curve, Quality, Quality | None]:
    """Return (points as a curve, how sizes left out are predicted, how patterns left out are)."""
    points = _Points(
        columns={axis: np.array([row[0][axis] for row in rows]) for axis in ("bytes", "total_bytes")},
        seconds=np.array([row[1] for row in rows]),
        size=np.array([row[2] for row in rows]),
        pattern=np.array([row[3] for row in rows]),
    )
    form = exchange_form(shared=is_shared(points.columns))
    surface = fit_surface(name, form, points.columns, points.seconds)
    errors = [_error(form, points, out) for out in _inner_sizes(points)]
    skewed = [_error(form, points, out) for out in _skewed_patterns(points)]
    sizes = (
        np.concatenate(errors)
        if errors
        else np.abs(form.seconds(points.columns, surface.parameters) / points.seconds - 1)
    )
    parameters = {key: surface.parameter(key) for key in form.parameters}
    quality = Quality(num_points=len(rows), errors=sizes, parameters=parameters)
    found = None
    if skewed:
        found = _against_plain(points, np.concatenate(skewed))
    curve = Curve(
        arguments={axis: tuple(column.tolist()) for axis, column in points.columns.items()},
        seconds=tuple(points.seconds.tolist()),
        relative_uncertainty=nine_in_ten(np.concatenate([sizes, *skewed])),
        citation=citation,
    )
    return curve, quality, found


def _inner_sizes(points: _Points) -> Iterator[Array]:
    """Yield masks of one size each, but the smallest and the largest, beyond which nothing was measured."""
    sizes = sorted(set(points.size.tolist()))
    if len(sizes) >= _MIN_SIZES:
        for size in sizes[1:-1]:
            yield points.size == size


def _skewed_patterns(points: _Points) -> Iterator[Array]:
    """Yield masks of one skewed pattern each, where others are left to learn from."""
    patterns = sorted(set(points.pattern.tolist()) - {"balanced"})
    if len(patterns) >= _MIN_PATTERNS:
        for pattern in patterns:
            yield points.pattern == pattern


def _error(form: Form, points: _Points, out: Array) -> Array:
    """Return |predicted / measured - 1| of the points left `out`, from the others."""
    rest, asked = points.keep(~out), points.keep(out)
    surface = fit_surface("rest", form, rest.columns, rest.seconds)
    predicted = [
        surface.predict({axis: float(column[at]) for axis, column in asked.columns.items()})[0]
        for at in range(len(asked.seconds))
    ]
    return np.abs(np.array(predicted) / asked.seconds - 1)


def _against_plain(points: _Points, errors: Array) -> Quality:
    """Return how skewed patterns that were left out are predicted, beside what the busiest port alone says of them."""
    balanced = points.pattern == "balanced"
    parameters = {}
    if balanced.sum() >= _MIN_SIZES:
        plain = _error(exchange_form(shared=False), _by_port(points), ~balanced)
        parameters = {
            "busiest_port_alone_median": float(np.median(plain)),
            "busiest_port_alone_p90": nine_in_ten(plain),
        }
    return Quality(num_points=len(errors), errors=errors, parameters=parameters)


def _by_port(points: _Points) -> _Points:
    """Return the points as if only the busiest port's bytes were known."""
    columns = {"bytes": points.columns["bytes"], "total_bytes": points.columns["bytes"]}
    return _Points(columns=columns, seconds=points.seconds, size=points.size, pattern=points.pattern)


# --- exchanges and products together ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Together:
    """What exchanges and products cost each other between one number of ranks."""

    backend: str
    ranks: int
    quality: Mapping[str, Quality]
    """By pair; the parameter `speed` is the median over sizes."""
    exchange_slowdown: tuple[tuple[float, float], ...]
    """(bytes that all ranks send, how much longer than alone)."""
    rank_slowdown: float | None
    """Of products where all ranks compute, relative to one rank alone."""


def _together(samples: SampleSet, backend: str, table: ExchangeTable) -> _Together:
    """Return what exchanges and products cost each other, each size predicted from the others."""
    ranks = table.num_ranks
    quality = {}
    beside = [
        _point(s)
        for s in samples.of("all_to_all", companion="compute", backend=backend)
        if s.arguments["ranks"] == ranks
    ]
    slower: list[tuple[float, float]] = []
    if beside:
        port, total = (np.array([point[0][axis] for point in beside]) for axis in ("bytes", "total_bytes"))
        ratio = np.array([point[1] for point in beside]) / table.seconds(port, total)
        slower = sorted(zip(total.tolist(), np.maximum(1.0, ratio).tolist(), strict=True))
        errors = _left_out_ratios(np.log(total), ratio)
        quality["exchange/compute"] = Quality(
            num_points=len(beside), errors=errors, parameters={"speed": min(1.0, 1 / float(np.median(ratio)))}
        )
    products = [s for s in samples.of("rank_product", backend=backend) if s.arguments["ranks"] == ranks]
    quiet = [s for s in products if s.labels["companion"] == "none"]
    everywhere = [s.median_s for s in quiet if s.arguments["computing"] == ranks]
    one_alone = [s.median_s for s in quiet if s.arguments["computing"] == 1]
    busy = np.array([s.median_s for s in products if s.labels["companion"] != "none"])
    if everywhere and len(busy):
        others = [np.median(np.delete(busy, at)) if len(busy) > 1 else busy[0] for at in range(len(busy))]
        quality["compute/exchange"] = Quality(
            num_points=len(busy),
            errors=np.abs(np.array(others) / busy - 1),
            parameters={"speed": min(1.0, everywhere[0] / float(np.median(busy)))},
        )
    return _Together(
        backend=backend,
        ranks=ranks,
        quality=quality,
        exchange_slowdown=tuple(slower),
        rank_slowdown=max(1.0, everywhere[0] / one_alone[0]) if everywhere and one_alone else None,
    )


def _left_out_ratios(log_total: Array, ratio: Array) -> Array:
    """Return how wrong each slow-down is, between the others; those at the ends are left out only where there is nothing else."""
    order = np.argsort(log_total)
    at, known = log_total[order], ratio[order]
    inner = range(1, len(at) - 1) if len(at) > 2 else range(len(at))
    found = []
    for place in inner:
        kept = np.arange(len(at)) != place if len(at) > 1 else np.ones(1, bool)
        predicted = np.maximum(1.0, between_sizes(at[place : place + 1], at[kept], known[kept]))
        found.append(abs(float(predicted[0]) / known[place] - 1))
    return np.array(found)


def _slowdowns(together: Sequence[_Together], citation: str) -> dict[str, Curve]:
    """Return the slow-downs as tables by the number of ranks."""
    found: dict[str, Curve] = {}
    between = [(float(one.ranks), one.rank_slowdown) for one in together if one.rank_slowdown is not None]
    compute = [(one, one.quality["compute/exchange"]) for one in together if "compute/exchange" in one.quality]
    sizes = [(float(one.ranks), *point) for one in together for point in one.exchange_slowdown]
    wrong = {
        pair: max((nine_in_ten(one.quality[pair].errors) for one in together if pair in one.quality), default=0.0)
        for pair in ("compute/exchange", "exchange/compute")
    }
    if between:
        found[BETWEEN_RANKS] = Curve(
            arguments={"ranks": tuple(ranks for ranks, _ in between)},
            seconds=tuple(ratio for _, ratio in between),
            relative_uncertainty=0.0,
            citation=citation,
        )
    if compute:
        found[OF_COMPUTE] = Curve(
            arguments={"ranks": tuple(float(one.ranks) for one, _ in compute)},
            seconds=tuple(1 / quality.parameters["speed"] for _, quality in compute),
            relative_uncertainty=wrong["compute/exchange"],
            citation=citation,
        )
    if sizes:
        found[OF_EXCHANGE] = Curve(
            arguments={"ranks": tuple(row[0] for row in sizes), "total_bytes": tuple(row[1] for row in sizes)},
            seconds=tuple(row[2] for row in sizes),
            relative_uncertainty=wrong["exchange/compute"],
            citation=citation,
        )
    return found
