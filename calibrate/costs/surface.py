"""A cost as a surface over its arguments: a physical form with few parameters, times a smooth residual that passes
near every point.

    log seconds = log form(arguments; parameters) + residual(log arguments)

Modelled: parameters are found by robust least squares on logarithms; the residual is a Gaussian process over the
logarithms of chosen axes, whose length scale is chosen by leaving points out; the uncertainty is what predicting
points from the others got wrong nine times in ten, form and residual refitted without them. Ignored: anything outside
the range of the points, which is refused rather than guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from ...base.errors import MissingCalibration
from ...specs.machines.profile import Curve

Array: TypeAlias = npt.NDArray[Any]
Columns: TypeAlias = Mapping[str, Array]

# Timings repeat to about this; a residual is not made to pass closer to a point.
_NOISE = 0.02
_LENGTHS = (0.35, 0.7, 1.4, 2.8, 5.6)
_FOLDS = 8
_NINE_IN_TEN = 90
_NORMAL_90 = 1.645
_RANGE_SLACK = 1.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A physical form: seconds from arguments and parameters, all of them positive."""

    parameters: tuple[str, ...]
    start: Callable[[Columns, Array], tuple[float, ...]]
    """First guess of the parameters from the points."""
    seconds: Callable[[Columns, Array], Array]
    axes: tuple[str, ...]
    """Arguments over which the residual varies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """A fitted cost."""

    name: str
    form: Form
    columns: Columns
    seconds: Array
    parameters: Array
    length: float
    scale: float
    _weights: Array
    _inverse: Array

    def predict(self, arguments: Mapping[str, float]) -> tuple[float, float]:
        """Return (seconds, relative uncertainty of the residual's interpolation, nine times in ten) at one point."""
        columns = {name: np.array([float(arguments[name])]) for name in self.columns}
        base = float(self.form.seconds(columns, self.parameters)[0])
        near = _kernel(_logs(columns, self.form.axes), _logs(self.columns, self.form.axes), self.length, self.scale)[0]
        residual = float(near @ self._weights)
        variance = max(0.0, self.scale**2 - float(near @ self._inverse @ near))
        return base * math.exp(residual), _NORMAL_90 * math.sqrt(variance)

    def parameter(self, name: str) -> float:
        """Return one of the form's parameters."""
        return float(self.parameters[self.form.parameters.index(name)])

    def check_inside(self, arguments: Mapping[str, float], axes: Sequence[str]) -> None:
        """Return nothing; raises MissingCalibration, naming the nearest measured point, outside the measured range of `axes`."""
        for axis in axes:
            low, high = float(self.columns[axis].min()), float(self.columns[axis].max())
            value = float(arguments[axis])
            if not low / _RANGE_SLACK <= value <= high * _RANGE_SLACK:
                nearest = self.nearest(arguments)
                point = ", ".join(f"{name} {nearest[name]:g}" for name in self.form.axes)
                raise MissingCalibration(
                    f"{self.name}: {axis}",
                    _short(value),
                    f"measured from {low:g} to {high:g}, nearest point {point}",
                    "calibrate with this size, or allow the datasheet to fill the gap",
                )

    def nearest(self, arguments: Mapping[str, float]) -> dict[str, float]:
        """Return the measured point nearest to `arguments`, in ratios."""
        here = {name: np.array([float(arguments[name])]) for name in self.form.axes}
        distance = np.abs(_logs(here, self.form.axes) - _logs(self.columns, self.form.axes)).sum(1)
        at = int(distance.argmin())
        return {name: float(column[at]) for name, column in self.columns.items()}


def surface_of(name: str, form: Form, curve: Curve) -> Surface:
    """Return the surface through the points of a profile's table."""
    columns = {axis: np.array(values) for axis, values in curve.arguments.items()}
    return fit_surface(name, form, columns, np.array(curve.seconds))


def fit_surface(
    name: str, form: Form, columns: Columns, seconds: Sequence[float] | Array, *, near: Array | None = None
) -> Surface:
    """Return the surface through points; `columns` holds one array for each argument.

    near: parameters to start from, where a good guess is known.
    """
    times = np.asarray(seconds, float)
    arrays = {axis: np.asarray(column, float) for axis, column in columns.items()}
    parameters = _fit_form(form, arrays, times, near)
    residual = np.log(times) - np.log(form.seconds(arrays, parameters))
    logs = _logs(arrays, form.axes)
    scale = max(float(np.sqrt(np.mean(residual**2))), _NOISE)
    length = min(_LENGTHS, key=lambda candidate: _left_out_error(logs, residual, candidate, scale))
    inverse = _inverted(logs, length, scale)
    return Surface(
        name=name,
        form=form,
        columns=arrays,
        seconds=times,
        parameters=parameters,
        length=length,
        scale=scale,
        _weights=inverse @ residual,
        _inverse=inverse,
    )


def cross_validate(name: str, form: Form, columns: Columns, seconds: Sequence[float] | Array) -> Array:
    """Return |predicted / measured − 1| of every point, predicted by a surface fitted without it and others of its fold.

    With fewer points than parameters + 2, the form's own errors with all points are returned: there is nothing to leave out.
    """
    times = np.asarray(seconds, float)
    arrays = {axis: np.asarray(column, float) for axis, column in columns.items()}
    count = len(times)
    errors = np.zeros(count)
    fitted = _fit_form(form, arrays, times)
    if count < len(form.parameters) + 2:
        whole: Array = np.abs(form.seconds(arrays, fitted) / times - 1)
        return whole
    folds = min(_FOLDS, count)
    # Neighbours in size fall into different folds, so that a fold is interpolated rather than extrapolated.
    order = np.lexsort(tuple(arrays[axis] for axis in reversed(form.axes)))
    for fold in range(folds):
        out = order[fold::folds]
        kept = np.setdiff1d(np.arange(count), out)
        part = {axis: column[kept] for axis, column in arrays.items()}
        surface = fit_surface(name, form, part, times[kept], near=fitted)
        for at in out.tolist():
            predicted, _ = surface.predict({axis: float(column[at]) for axis, column in arrays.items()})
            errors[at] = abs(predicted / times[at] - 1)
    return errors


def nine_in_ten(errors: Array) -> float:
    """Return the error that nine in ten stay below."""
    return float(np.percentile(errors, _NINE_IN_TEN))


def _fit_form(form: Form, columns: Columns, seconds: Array, near: Array | None = None) -> Array:
    """Return the form's parameters; logarithms keep them positive, and a soft loss keeps odd points from pulling.

    Without parameters that are known to be `near`, three starts are tried and the best end is taken.
    """
    target = np.log(seconds)

    def residual(theta: Array) -> Array:
        return np.log(np.maximum(form.seconds(columns, np.exp(theta)), 1e-12)) - target

    start = np.log(np.array(form.start(columns, seconds)) if near is None else near)
    best: Any = None
    for shift in (0.0, 1.5, -1.5) if near is None else (0.0,):
        found = least_squares(
            residual, start + shift, loss="soft_l1", f_scale=0.1, max_nfev=400, bounds=(start - 16, start + 16)
        )
        if best is None or found.cost < best.cost:
            best = found
    parameters: Array = np.exp(best.x)
    return parameters


def _logs(columns: Columns, axes: Sequence[str]) -> Array:
    """Return [n, axes]: logarithms of the axes, with 0 counted as 1."""
    return np.stack([np.log(np.maximum(columns[axis], 1.0)) for axis in axes], axis=1)


def _kernel(left: Array, right: Array, length: float, scale: float) -> Array:
    squares = ((left[:, None, :] - right[None, :, :]) ** 2).sum(2)
    kernel: Array = scale**2 * np.exp(-0.5 * squares / length**2)
    return kernel


def _inverted(logs: Array, length: float, scale: float) -> Array:
    inverse: Array = np.linalg.inv(_kernel(logs, logs, length, scale) + _NOISE**2 * np.eye(len(logs)))
    return inverse


def _left_out_error(logs: Array, residual: Array, length: float, scale: float) -> float:
    """Return the mean squared error of each residual predicted from all others, in closed form."""
    inverse = _inverted(logs, length, scale)
    return float(np.mean((inverse @ residual / np.diag(inverse)) ** 2))


def _short(value: float) -> float | int:
    return int(value) if value == int(value) else value
