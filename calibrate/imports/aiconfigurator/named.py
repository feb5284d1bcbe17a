"""A problem to fit with the place of its answer, and what all problems share.

Modelled: nothing reads device memory faster than its data sheet says. Ignored: what a problem's form is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .fits import Problem

if TYPE_CHECKING:
    import pandas as pd

_OVER_PEAK = 1.05
"""Data sheets round."""
_US = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A problem, and where among an engine's kernels its answer belongs."""

    part: str
    """Field of `GpuKernels`."""
    key: str
    problems: tuple[Problem[Any], ...]
    """Alternatives; the one with the smallest median error is taken."""
    rows: int


def within(named: Named, most: float) -> Named:
    """Return a problem whose weights, keys and values are read no faster than a data sheet's `most`; activations may come from caches."""
    at = {"prompt_attention": None, "latent_prompt": None}.get(named.part, 1)
    if at is None:
        return named
    return dataclasses.replace(
        named, problems=tuple(dataclasses.replace(each, most={at: most * _OVER_PEAK}) for each in named.problems)
    )


def seconds_of(rows: pd.DataFrame) -> npt.NDArray[np.float64]:
    """Return what rows measured."""
    return rows["us"].to_numpy(float) * _US
