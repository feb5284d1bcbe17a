"""What runs predicted and measured, one by one and as a whole grid, and the document that says so.

Modelled: figures, timelines and drift of what ran. Ignored: running (`validate`), and what the figures are called on the command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...base.errors import InputError
from ...base.frames import Tabular, flat
from ...base.units import NS_PER_S
from ...sim.offload.forecast import Forecast
from ...sim.offload.metrics import speeds_of
from ...sim.offload.run_input import RunInput
from ...sim.timeline import Timeline
from ...specs.machines.profile import Profile
from ..calibration.calibrate import Calibration
from ..running.execution import Execution
from ..running.prediction import counted_steps, predicted_step_s
from .agreement import Compared, summary
from .error_budget import median_budget
from .grid import Case


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """One configuration with everything that was predicted and measured."""

    case: Case
    given: RunInput
    forecast: Forecast
    executions: tuple[Execution, ...]
    compared: Compared
    budget: Mapping[str, float]

    def predicted_as(self, other: Forecast) -> Compared:
        """Return the comparison with another prediction of the same run."""
        return dataclasses.replace(
            self.compared,
            predicted_s=predicted_step_s(other.outcome, self.given.workload),
            relative_uncertainty=other.metrics.relative_uncertainty,
            predicted=speeds_of(other.metrics),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation(Tabular):
    """A whole grid."""

    SHOWN: ClassVar[tuple[str, ...]] = (
        "name",
        "predicted_step_s",
        "low_s",
        "high_s",
        "measured_step_s",
        "relative_error",
        "hit_rate_predicted",
        "hit_rate_measured",
    )

    validated: tuple[Validated, ...]
    calibration: Calibration | None
    profile: Profile
    notes: tuple[str, ...]
    seconds: float
    generated: tuple[tuple[int, ...], ...] = ()
    """What a model generated after each prompt, the same under every schedule; empty where a recording was replayed."""
    reduced: Mapping[str, Any] | None = None
    """What of a plan's model ran where the machine does not hold all of it; None where all of it did."""
    drift: Mapping[str, float] | None = None
    """Times of reference runs now over those of the profile, by table; None where none were made."""
    without_drift: tuple[Compared, ...] = ()
    """Every configuration once more, predicted for the machine as it is now."""

    def table_rows(self) -> list[dict[str, Any]]:
        """Return a row for every configuration: predicted beside measured."""
        return [
            flat(one.to_dict()) | dict(zip(("low_s", "high_s"), one.interval_s, strict=True))
            for one in (each.compared for each in self.validated)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the document that `moeplan validate --json` prints."""
        configurations = []
        steadied = {one.name: one for one in self.without_drift}
        for one in self.validated:
            counted = counted_steps(one.given.workload)
            times: dict[str, Any] = {
                "repeats_s": [float(run.step_ns[counted].mean()) / NS_PER_S for run in one.executions]
            }
            times |= {"measured_steps_s": [(run.step_ns / NS_PER_S).tolist() for run in one.executions]}
            now = {"predicted_now_s": steadied[one.case.name].predicted_s} if steadied else {}
            configurations.append(one.compared.to_dict() | now | {"error_budget": dict(one.budget)} | times)
        return {
            **summary([one.compared for one in self.validated]),
            "error_budget": median_budget([one.budget for one in self.validated]),
            "configurations": configurations,
            "profile": self.profile.name,
            "calibrated_in_the_same_run": self.calibration is not None,
            "warnings": list(self.calibration.fit.warnings) if self.calibration is not None else [],
            "disturbed_share": float(
                np.mean([run.disturbed.mean() for one in self.validated for run in one.executions])
            ),
            "notes": list(self.notes),
            "reduced": None if self.reduced is None else dict(self.reduced),
            "seconds": self.seconds,
            "drift": None if self.drift is None else dict(self.drift),
            "without_drift": summary(self.without_drift) if self.without_drift else None,
        }

    def best_to_dict(self) -> dict[str, Any]:
        """Return the first configuration's own figures: of a plan, those of its best schedule."""
        one = self.validated[0].compared
        return {
            "predicted_step_s": one.predicted_s,
            "measured_step_s": one.measured_s,
            "relative_error": one.relative_error,
            "hit_rate_predicted": one.hit_rate_predicted,
            "hit_rate_measured": one.hit_rate_measured,
            "predicted": dict(one.predicted),
            "measured": dict(one.measured),
        }

    def timelines(self, name: str | None = None) -> tuple[Timeline, Timeline]:
        """Return (predicted, measured) rows of a configuration, the first one by default."""
        chosen = next((one for one in self.validated if one.case.name == name), self.validated[0])
        measured = chosen.executions[-1].timeline
        predicted = chosen.forecast.outcome.timeline
        if predicted is None:
            raise InputError("timeline", chosen.case.name, "its rows were not kept", "validate again")
        return predicted, measured
