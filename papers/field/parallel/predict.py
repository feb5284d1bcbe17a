"""The prediction of one figure of expert parallelism, by its kind.

Modelled: the same simulation as everywhere. Ignored: how good predictions are (`scores`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ....base.errors import MoeplanError
from ..machine import NotExpressible
from .differences import predict_difference
from .operations import predict_exchange, predict_kernel
from .rows import Row
from .serving import Served, predict_serving

_WAYS: dict[str, Callable[[Row], Served]] = {
    "kernel": predict_kernel, "exchange": predict_exchange, "difference": predict_difference,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """One figure beside its prediction."""

    report: Row
    value: float | None
    low: float | None = None
    high: float | None = None
    bound: str | None = None
    roofline: float | None = None
    reason: str | None = None
    assumed: tuple[str, ...] = ()

    @property
    def speed_ratio(self) -> float | None:
        """Predicted over measured as speeds: above one where the prediction is too fast."""
        if self.value is None:
            return None
        ratio = self.value / self.report.measured
        return 1 / ratio if self.report.is_time else ratio


def predict_row(row: Row) -> Predicted:
    """Return the prediction of `row`, or why there is none."""
    if row.reason is not None:
        return Predicted(report=row, value=None, reason=row.reason)
    try:
        found = _WAYS.get(row.kind, predict_serving)(row)
    except (NotExpressible, MoeplanError) as error:
        return Predicted(report=row, value=None, reason=str(error)[:300])
    wide = 1 + found.relative_uncertainty
    return Predicted(report=row, value=found.value, low=found.value / wide, high=found.value * wide, bound=found.bound,
                     roofline=found.roofline, assumed=found.assumed)  # fmt: skip


def predict_all(rows: Iterable[Row], progress: Callable[[int, int, str], None] | None = None) -> list[Predicted]:
    """Return every figure beside its prediction, in order."""
    every = list(rows)
    found = []
    for number, row in enumerate(every):
        if progress is not None:
            progress(number, len(every), "figures")
        found.append(predict_row(row))
    return found
