"""The forms of kernels fitted to tables, with their errors on shapes that were left out.

Modelled: constants are above zero, so their logarithms are fitted; errors are ratios; a few rows that are several times slower than
their like (kernels that nobody tuned) pull little. Half of the shapes is fitted and the other half predicted, both ways: that
gives a fit's errors; its constants are those of all rows. Ignored: noise of single rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

Array = npt.NDArray[np.float64]
K = TypeVar("K")

_MOST_ROWS = 6000
"""Rows that one fit looks at, evenly taken; errors are of all rows."""
_PULL = 0.1
"""Errors beyond this ratio pull less and less."""
_LEAST_LOG, _MOST_LOG = np.log(1e-6), np.log(1e4)
"""How far a constant may go from where it starts."""
_INSIDE = 0.05
"""How far below its ceiling a constant starts at least, in logarithms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Relative errors without sign."""

    median: float
    mean: float
    nine_in_ten: float
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem(Generic[K]):
    """One kernel's rows and the form that should give them."""

    seconds: Array
    shapes: Array
    """[rows, sizes]: of each row, the shape that is left out together."""
    start: Sequence[float]
    make: Callable[[Sequence[float]], K]
    """From constants to a kernel."""
    predict: Callable[[K, npt.NDArray[np.int64]], Array]
    """Seconds of chosen rows."""
    most: Mapping[int, float] = field(default_factory=dict)
    """By place among the constants: what one cannot exceed."""


def fit(problem: Problem[K]) -> tuple[K, Errors]:
    """Return the kernel fitted to all rows, and its errors on shapes left out."""
    everything = np.arange(len(problem.seconds))
    half = numbered(problem.shapes) % 2
    errors = np.empty(len(everything))
    if len(np.unique(half)) > 1:
        for part in (0, 1):
            away = everything[half == part]
            kernel = _fitted(problem, everything[half != part])
            errors[away] = relative(problem.predict(kernel, away), problem.seconds[away])
        kernel = _fitted(problem, everything)
    else:
        kernel = _fitted(problem, everything)
        errors = relative(problem.predict(kernel, everything), problem.seconds)
    return kernel, errors_of(errors)


def relative(predicted: Array, measured: Array) -> Array:
    """Return |predicted / measured − 1|."""
    return np.abs(predicted / measured - 1)


def errors_of(errors: Array) -> Errors:
    """Return what is said of many errors."""
    return Errors(median=float(np.median(errors)), mean=float(errors.mean()), nine_in_ten=float(np.quantile(errors, 0.9)),
                  rows=len(errors))  # fmt: skip


def fit_without(problem: Problem[K], shapes: Sequence[Sequence[float]]) -> K:
    """Return the kernel fitted to all rows but those of some shapes."""
    out = np.zeros(len(problem.seconds), bool)
    for shape in shapes:
        out |= (problem.shapes == np.asarray(shape, float)).all(axis=1)
    return _fitted(problem, np.flatnonzero(~out))


def columns(*sizes: Any) -> Array:
    """Return [rows, sizes]."""
    return np.stack([np.asarray(size, float) for size in sizes], axis=1)


def numbered(shapes: Array) -> npt.NDArray[np.int64]:
    """Return a number for each distinct row, in ascending order."""
    _, at = np.unique(shapes, axis=0, return_inverse=True)
    return np.asarray(at, np.int64).ravel()


def _fitted(problem: Problem[K], rows: npt.NDArray[np.int64]) -> K:
    chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), _MOST_ROWS)).astype(int)]
    wanted = np.log(problem.seconds[chosen])
    begin = np.log(np.asarray(problem.start, float))

    def off(theta: Array) -> Array:
        kernel = problem.make([float(value) for value in np.exp(begin + theta)])
        return np.asarray(np.log(problem.predict(kernel, chosen)) - wanted)

    top = np.full(len(begin), _MOST_LOG)
    for at, value in problem.most.items():
        top[at] = np.log(value) - begin[at]
    found = least_squares(
        off, np.minimum(0.0, top - _INSIDE), loss="soft_l1", f_scale=_PULL, bounds=(_LEAST_LOG, top), max_nfev=200
    )
    return problem.make([float(value) for value in np.exp(begin + found.x)])
