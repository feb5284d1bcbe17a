"""What a validation says of each configuration: predicted, measured, and whether the interval held.

Modelled: a validation document of plain values. Required: `configurations`, a list with `name`, `predicted_step_s`,
`measured_step_s`, `interval_s` (low and high of the prediction). Optional in each: `measured_interval_s`, `counts_equal`; in the
document: `median_relative_error, p90_relative_error, noise_floor, coverage, kendall_tau, regret, counts_equal, error_budget`
(name → relative error left when that class of durations is taken from the measurement). Errors are relative to what was
measured. Ignored: how any of it was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...base.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One configuration, predicted and measured."""

    name: str
    predicted_s: float
    low_s: float
    high_s: float
    measured_s: float
    measured_interval_s: tuple[float, float] | None
    counts_equal: bool | None

    @property
    def relative_error(self) -> float:
        """Prediction over measurement, less one: positive where the prediction was too slow."""
        return self.predicted_s / self.measured_s - 1

    @property
    def covered(self) -> bool:
        """Whether the predicted interval holds the measured time."""
        return self.low_s <= self.measured_s <= self.high_s


def comparisons(document: Mapping[str, Any]) -> list[Comparison]:
    """Return the configurations of a validation document; raises InputError for one without a field or with a wrong value."""
    listed = document.get("configurations")
    if not isinstance(listed, Sequence) or not listed:
        raise InputError(
            "validation: configurations", listed, "not a list of at least one", "give a validation's own document"
        )
    return [_comparison(at, one) for at, one in enumerate(listed)]


def _comparison(at: int, one: Mapping[str, Any]) -> Comparison:
    where = f"validation: configurations[{at}]"
    for key in ("name", "predicted_step_s", "measured_step_s", "interval_s"):
        if key not in one:
            raise InputError(f"{where}.{key}", "(absent)", "a field is absent", "validate again")
    for key in ("predicted_step_s", "measured_step_s"):
        if not _is_duration(one[key]) or one[key] == 0:
            raise InputError(f"{where}.{key}", one[key], "not a duration above zero", "validate again")
    for key in ("interval_s", "measured_interval_s"):
        pair = one.get(key)
        if not _is_interval(pair) and not (pair is None and key == "measured_interval_s"):
            raise InputError(f"{where}.{key}", pair, "not two durations, the lower first", "validate again")
    low, high = one["interval_s"]
    measured = one.get("measured_interval_s")
    return Comparison(
        name=str(one["name"]),
        predicted_s=float(one["predicted_step_s"]),
        low_s=float(low),
        high_s=float(high),
        measured_s=float(one["measured_step_s"]),
        measured_interval_s=(float(measured[0]), float(measured[1])) if measured is not None else None,
        counts_equal=one.get("counts_equal"),
    )


def _is_duration(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_interval(pair: object) -> bool:
    return isinstance(pair, Sequence) and len(pair) == 2 and all(map(_is_duration, pair)) and bool(pair[0] <= pair[1])
