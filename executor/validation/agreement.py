"""The figures of a validation: how far predictions were off, whether intervals held, whether the order was right.

Modelled: errors relative to what was measured; the noise floor is what the same configuration differs by when it is
run again; order is Kendall's τ over pairs that differ by more than the noise and than either one's own; regret is how much slower the
configuration predicted to be best is than the one measured to be best, among configurations that solve the same
problem. Ignored: where errors come from (`error_budget`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One configuration, predicted and measured."""

    name: str
    group: str
    predicted_s: float
    relative_uncertainty: float
    measured_s: float
    measured_again_s: float | None
    """The same measurement from other repetitions: each of the two from one half of them; None where it ran once."""
    measured_half_s: float
    tokens_per_step: float
    count_differences: tuple[str, ...]
    hit_rate_predicted: float
    hit_rate_measured: float
    predicted: Mapping[str, Any] = field(default_factory=dict)
    """Speeds and times by name, each beside its `..._interval`."""
    measured: Mapping[str, float | None] = field(default_factory=dict)
    """The same names, without intervals."""

    @property
    def relative_error(self) -> float:
        """Prediction over measurement, less one."""
        return self.predicted_s / self.measured_s - 1

    @property
    def interval_s(self) -> tuple[float, float]:
        """The predicted interval of the mean step."""
        known = self.predicted.get("step_s_interval")
        if known is not None:
            return float(known[0]), float(known[1])
        return max(0.0, self.predicted_s * (1 - self.relative_uncertainty)), self.predicted_s * (
            1 + self.relative_uncertainty
        )

    @property
    def covered(self) -> bool:
        """Whether the interval holds the measurement."""
        low, high = self.interval_s
        return low <= self.measured_s <= high

    @property
    def noise(self) -> float | None:
        """How much the two halves of the repetitions differ; None where there is only one, which says nothing about noise."""
        return None if self.measured_again_s is None else abs(self.measured_half_s / self.measured_again_s - 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values."""
        again = self.measured_again_s
        spread = None if again is None else sorted((self.measured_half_s, again))
        return {
            "name": self.name,
            "group": self.group,
            "predicted_step_s": self.predicted_s,
            "measured_step_s": self.measured_s,
            "relative_error": self.relative_error,
            "interval_s": list(self.interval_s),
            "measured_interval_s": spread,
            "covered": self.covered,
            "noise": self.noise,
            "predicted": dict(self.predicted),
            "measured": dict(self.measured),
            "counts_equal": not self.count_differences,
            "count_differences": list(self.count_differences),
            "hit_rate_predicted": self.hit_rate_predicted,
            "hit_rate_measured": self.hit_rate_measured,
        }


def summary(found: Sequence[Compared]) -> dict[str, Any]:
    """Return the figures over all configurations, by the names that others rely on."""
    errors = np.abs([one.relative_error for one in found])
    known = [one.noise for one in found if one.noise is not None]
    noise = float(np.median(known)) if known else None
    tau, pairs = kendall_tau(found, noise or 0.0)
    losses = regrets(found)
    return {
        "num_configurations": len(found),
        "median_relative_error": float(np.median(errors)),
        "p90_relative_error": float(np.percentile(errors, 90)),
        "worst_relative_error": float(errors.max()),
        "noise_floor": noise,
        "coverage": float(np.mean([one.covered for one in found])),
        "kendall_tau": tau,
        "num_pairs": pairs,
        "regret": max(losses.values()) if losses else None,
        "regret_by_group": losses,
        "counts_equal": all(not one.count_differences for one in found),
        "misses": [one.name for one in found if not one.covered],
    }


def kendall_tau(found: Sequence[Compared], noise: float) -> tuple[float | None, int]:
    """Return (τ, pairs counted) over pairs whose measured speeds differ by more than `noise`, and than either one's own; None without any.

    Speeds are tokens per second, so that configurations of different batches compare.
    """
    measured = np.array([one.tokens_per_step / one.measured_s for one in found])
    predicted = np.array([one.tokens_per_step / one.predicted_s for one in found])
    agree = pairs = 0
    for one in range(len(found)):
        for other in range(one + 1, len(found)):
            apart = abs(measured[one] / measured[other] - 1)
            if apart > max(noise, found[one].noise or 0.0, found[other].noise or 0.0):
                pairs += 1
                agree += int(np.sign((measured[one] - measured[other]) * (predicted[one] - predicted[other])))
    return (agree / pairs, pairs) if pairs else (None, 0)


def regrets(found: Sequence[Compared]) -> dict[str, float]:
    """Return, for each group of more than one, how much slower the predicted best is than the measured best."""
    groups: dict[str, list[Compared]] = {}
    for one in found:
        groups.setdefault(one.group, []).append(one)
    losses = {}
    for name, members in groups.items():
        if len(members) > 1:
            chosen = min(members, key=lambda one: one.predicted_s / one.tokens_per_step)
            best = min(one.measured_s / one.tokens_per_step for one in members)
            losses[name] = chosen.measured_s / chosen.tokens_per_step / best - 1
    return losses
