"""A profile's tables of all-to-alls as a function of traffic: what `fit` kept, read again.

Modelled: the form of `exchange_fit` through the profile's points, with the residual of their sizes; beyond the smallest and the
largest measured size the form goes on with the residual of that end. Where the points have skewed traffic among them, what all ranks
send together takes time of its own. Ignored: which rank sends to which, beyond the busiest one and the sum.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...base.errors import MissingCalibration
from ...specs.machines.profile import Curve, Profile
from .forms import exchange_form
from .surface import Array, Columns, surface_of

# Slow-downs by the number of ranks: kernels where all ranks compute, kernels beside an exchange, and exchanges beside kernels,
# these by size too: a short one waits for its turn less often.
BETWEEN_RANKS, OF_COMPUTE, OF_EXCHANGE = (
    "slowdown.compute/ranks",
    "slowdown.compute/exchange",
    "slowdown.exchange/compute",
)
_CURVE = re.compile(r"all_to_all\.(?P<backend>\w+)\.(?P<ranks>\d+)")
_GRID_POINTS = 96
# Balanced traffic differs from this ratio of all bytes to the busiest port's only by rounding of shares.
_SAME_SHAPE = 1.05


def curve_name(backend: str, ranks: float) -> str:
    """Return the name under which a profile keeps the exchanges of so many ranks."""
    return f"all_to_all.{backend}.{ranks:g}"


def measured_ranks(curves: Mapping[str, Curve]) -> dict[int, str]:
    """Return the names of a profile's tables of exchanges by their number of ranks; NCCL's where two libraries were measured."""
    found = {}
    for name in sorted(curves):
        match = _CURVE.fullmatch(name)
        if match is not None:
            found[int(match["ranks"])] = name
    return found


def is_shared(columns: Columns) -> bool:
    """Return whether the points tell a port's bytes from everybody's: they have traffic of more than one shape."""
    shape = np.asarray(columns["total_bytes"]) / np.asarray(columns["bytes"])
    return bool(shape.max() > _SAME_SHAPE * shape.min())


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeTable:
    """All-to-alls of one number of ranks."""

    name: str
    num_ranks: int
    latency_s: float
    bytes_per_s: float
    shared_bytes_per_s: float
    """Infinite where nothing is known to be shared."""
    log_total: Array
    """[grid]: logarithms of what all ranks send."""
    residual: Array
    """[grid]: measured over form."""
    relative_uncertainty: float
    source: str
    compute_slowdown: float
    """How much longer kernels take where all ranks compute, relative to one rank alone: they may share cores."""
    beside_compute: Array
    """[grid]: how much longer an exchange takes while all ranks compute."""
    compute_speed: float
    """Speed of kernels while an exchange runs, relative to none."""

    def seconds(
        self, port_bytes: Array, total_bytes: Array, *, speed: float = 1.0, beside_compute: bool = False
    ) -> Array:
        """Return seconds for ports of `port_bytes` bytes (the larger of sent and received) while all ranks send `total_bytes`.

        Arrays of shapes that go together. speed: of everything but the latency. beside_compute: all ranks compute meanwhile.
        """
        moving = np.asarray(port_bytes) / self.bytes_per_s + np.asarray(total_bytes) / self.shared_bytes_per_s
        at = np.log(np.maximum(total_bytes, 1))
        near = np.interp(at, self.log_total, self.residual)
        if beside_compute:
            near = near * np.interp(at, self.log_total, self.beside_compute)
        found: Array = (self.latency_s + moving / speed) * near
        return found


def exchange_table(profile: Profile, ranks: int) -> ExchangeTable | None:
    """Return the table of exchanges between `ranks` ranks, None for a profile without any tables of exchanges.

    Raises MissingCalibration, naming the numbers of ranks that were measured, where this one was not.
    """
    names = measured_ranks(profile.curves)
    if not names:
        return None
    if ranks not in names:
        known = ", ".join(str(number) for number in sorted(names))
        raise MissingCalibration(
            f"hardware {profile.name}: all-to-all", f"{ranks} ranks", f"measured between {known} ranks", "use as many"
        )
    return read_table(names[ranks], ranks, profile.curves)


def read_table(name: str, ranks: int, curves: Mapping[str, Curve]) -> ExchangeTable:
    """Return the table called `name`, with the slow-downs that stand beside it among `curves`."""
    curve = curves[name]
    columns = {axis: np.array(values) for axis, values in curve.arguments.items()}
    form = exchange_form(shared=is_shared(columns))
    surface = surface_of(name, form, curve)
    low, high = float(columns["total_bytes"].min()), float(columns["total_bytes"].max())
    grid = np.geomspace(low, high, _GRID_POINTS) if high > low else np.array([low])
    port = float(columns["bytes"][columns["total_bytes"].argmax()]) / high
    at = {"bytes": grid * port, "total_bytes": grid}  # the residual does not depend on the port
    base = form.seconds(at, surface.parameters)
    whole = [surface.predict({axis: float(column[n]) for axis, column in at.items()})[0] for n in range(len(grid))]
    return ExchangeTable(
        name=name,
        num_ranks=ranks,
        latency_s=surface.parameter("latency_s"),
        bytes_per_s=surface.parameter("bandwidth"),
        shared_bytes_per_s=surface.parameter("shared_bandwidth") if "shared_bandwidth" in form.parameters else np.inf,
        log_total=np.log(grid),
        residual=np.array(whole) / base,
        relative_uncertainty=curve.relative_uncertainty,
        source=curve.source,
        compute_slowdown=_slowdown(curves, BETWEEN_RANKS, ranks),
        beside_compute=_beside_compute(curves, ranks, np.log(grid)),
        compute_speed=1 / _slowdown(curves, OF_COMPUTE, ranks),
    )


def _slowdown(curves: Mapping[str, Curve], name: str, ranks: int) -> float:
    """Return how many times longer something takes between so many ranks; 1 where that was not measured."""
    curve = curves.get(name)
    if curve is None or ranks not in curve.arguments["ranks"]:
        return 1.0
    return max(1.0, curve.seconds[curve.arguments["ranks"].index(ranks)])


def _beside_compute(curves: Mapping[str, Curve], ranks: int, log_total: Array) -> Array:
    """Return how much longer exchanges take beside kernels, between the measured sizes and as at their ends."""
    curve = curves.get(OF_EXCHANGE)
    mine = [] if curve is None else [at for at, number in enumerate(curve.arguments["ranks"]) if number == ranks]
    if curve is None or not mine:
        return np.ones_like(log_total)
    at = np.log([curve.arguments["total_bytes"][n] for n in mine])
    return np.maximum(1.0, between_sizes(log_total, at, np.array([curve.seconds[n] for n in mine])))


def between_sizes(wanted: Array, log_total: Array, ratio: Array) -> Array:
    """Return slow-downs at logarithms of sizes, on straight lines between the known ones."""
    order = np.argsort(log_total)
    found: Array = np.interp(wanted, log_total[order], ratio[order])
    return found
