"""Samples into a profile: constants with physical meaning, and tables of the measured points with how well they
predict each other.

Modelled: everything a profile needs, or the first thing that was not measured. Ignored: how a table is fitted (`fitter`), how tables
are used (`costs.fitted`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...base.errors import InputError
from ...specs.machines.profile import (
    Profile,
)
from ..costs.steadiness import others_curves, pass_curves
from ..samples import SampleSet, merge
from .fit_runs import fit_runs
from .fitter import HOST_PARTS, Fitter, TableFit
from .overlap_fit import overlap_curves

_ONE_TIME = (
    "measured at one time only: intervals do not say how much faster or slower this machine is at others; "
    "calibrate in full to find out"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A profile and how good it is."""

    profile: Profile
    tables: Mapping[str, TableFit]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the quality of every table as plain values."""
        return {
            name: {
                "num_points": table.num_points,
                "median_error": table.median_error,
                "p90_error": table.p90_error,
                "parameters": dict(table.parameters),
                "flagged": list(table.flagged),
            }
            for name, table in self.tables.items()
        }


def fit_profile(
    samples: SampleSet, *, name: str | None = None, samples_file: str | None = None, meanwhile: bool = False
) -> Fit:
    """Return the profile that fits `samples`; raises InputError where something a profile needs was not measured.

    meanwhile: what the profile is to predict ran between the passes of these samples, and saw the machine as they did.
    """
    samples = merge([samples])
    _check_complete(samples)
    fitter = Fitter(samples)
    fitter.experts()
    fitter.dense()
    links = fitter.copies()
    contention = fitter.contention()
    node = fitter.ranks() or fitter.exchanges(contention)
    fitter.handovers()
    fit_runs(fitter.samples, fitter.surfaces, fitter.curves, fitter.units, fitter.citation)
    steadiness = pass_curves(samples, fitter.citation, meanwhile=meanwhile)
    at_one_time = not steadiness
    if at_one_time and not meanwhile:
        steadiness = others_curves(samples, fitter.citation)
    profile = Profile(
        name=name or str(samples.device.get("name", "this machine")),
        description=f"measured by {samples.produced_by}"
        + (f" with the shapes of {samples.model}" if samples.model else ""),
        device=fitter.device(),
        host_to_device=links["h2d"],
        device_to_host=links["d2h"],
        host=fitter.host(),
        contention=contention,
        disk=fitter.disk(),
        node=node,
        curves=fitter.curves | steadiness | overlap_curves(samples, fitter.citation),
        samples=samples_file,
    )
    flagged = [
        f"{table}: {point} is far slower than its neighbours and was left out"
        for table, fit in fitter.tables.items()
        for point in fit.flagged
    ]
    if at_one_time:
        flagged.append(_ONE_TIME)
    return Fit(profile=profile, tables=fitter.tables, warnings=(*samples.warnings, *flagged))


def _check_complete(samples: SampleSet) -> None:
    """Return nothing; raises InputError for the first thing every profile needs and these samples lack."""
    needed: list[tuple[str, dict[str, str]]] = [(kind, {}) for kind in ("memory", "matmul", "expert", "dense", "head")]
    needed += [("copy", {"direction": direction}) for direction in ("h2d", "d2h")]
    needed += [("host", {"what": what}) for what in HOST_PARTS]
    for kind, labels in needed:
        if not samples.of(kind, **labels):
            name = " ".join([kind, *labels.values()])
            raise InputError("samples", name, "none measured", "calibrate again without leaving it out")
