"""How much faster or slower a machine has become since its profile was measured, from the same runs made again.

    expert.BITS, dense, head, copy.DIRECTION     time now over time then, of what was measured inside runs both times

A shared machine, a new driver, a hotter room: the profile is then of another machine than the one at hand, and a prediction that is
off says nothing of the model that made it. Therefore runs that took part in the calibration are made again, beside the runs that are
to be predicted, and each of their operations is held against what the profile says of just that operation in just such a run.

Modelled: one ratio for each table, the median over its operations. Ignored: the host's own time, and changes that hit one size only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from ...specs.machines.profile import Curve, Profile
from ..costs.forms import copy_form, dense_form, expert_form, head_form
from ..costs.run_kind import NOTHING, factor
from ..costs.surface import Form, Surface, surface_of
from ..samples import Sample
from .fit_runs import Place, alone_s, place_of

_LEAST_SAMPLES = 3
# Tables whose costs were not measured inside runs move with those that were.
_FOLLOWS = {"grouped_item": "expert", "grouped_base": "expert", "cpu_expert": "expert"}


def drift_of(profile: Profile, samples: Iterable[Sample]) -> dict[str, float]:
    """Return for every table the time that runs take now over that which the profile says; samples are of kinds run_*.

    Shapes that the profile was not measured with, and tables with few samples, are left out.
    """
    surfaces: dict[str, Surface] = {}
    ratios: dict[str, list[float]] = {}
    units, pause = _units(profile), profile.curves.get("host.piece")
    for sample in samples:
        place = place_of(sample, units)
        if place is None or sample.labels["beside"] != NOTHING:
            continue
        table, inside = profile.curves.get(place.table), profile.curves.get(place.curve)
        if table is None or inside is None or not _measured(table, place):
            continue
        if place.table not in surfaces:
            surfaces[place.table] = _surface(place.table, table, profile)
        alone = alone_s(place, surfaces[place.table], pause.seconds[0] if pause is not None else 0.0)
        ratios.setdefault(place.table, []).append(sample.midmean_s / (alone * factor(inside, **place.sizes)))
    return {
        table.removesuffix(".pinned"): float(np.median(found))
        for table, found in sorted(ratios.items())
        if len(found) >= _LEAST_SAMPLES
    }


def drifted(profile: Profile, drift: Mapping[str, float]) -> Profile:
    """Return the profile that the machine would have now: its tables' times multiplied by what they became."""
    curves = {}
    for name, curve in profile.curves.items():
        start, _, rest = name.partition(".")
        ratio = drift.get(f"{_FOLLOWS.get(start, start)}.{rest}".removesuffix(".pinned").removesuffix("."), 1.0)
        curves[name] = dataclasses.replace(curve, seconds=tuple(ratio * seconds for seconds in curve.seconds))
    return dataclasses.replace(profile, curves=curves)


def _units(profile: Profile) -> float:
    """Return how many units of the device work in parallel, as its tables say."""
    tables = (curve for name, curve in profile.curves.items() if name.startswith("expert."))
    return next((table.arguments["units"][0] for table in tables), 1.0)


def _measured(table: Curve, place: Place) -> bool:
    """Return whether the profile knows this very shape: others would bring the fit's own error in."""
    axis = "bytes" if "bytes" in table.arguments else "weight_bytes"
    return float(place.arguments[axis]) in table.arguments[axis]


def _surface(name: str, curve: Curve, profile: Profile) -> Surface:
    many = profile.device.kind == "gpu"
    forms: dict[str, Form] = {"dense": dense_form(), "head": head_form(), "copy": copy_form()}
    form = forms.get(name.partition(".")[0]) or expert_form(many_units=many)
    return surface_of(name, form, curve)
