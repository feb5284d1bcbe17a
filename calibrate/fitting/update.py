"""A machine's constants after a few measured speeds: least squares that starts from what was believed, and what is believed afterwards.

Modelled: each constant's logarithm is normal around its value with its stated uncertainty; constants of one kind of work (decoding,
prompts, experts on the cores, the link) err together in part. A share of what predictions are stated to be uncertain by is not of the
machine: it is in every measured speed, beside its repetitions, and stays in every prediction. A machine whose speeds are further off than
all that allows is believed to be unlike its parts, and learned from the more. Speeds that are off by no more than lines of one machine
differ among themselves, or that point opposite ways, say nothing of the machine: its constants stay. The most likely constants are found by
Gauss-Newton steps, their uncertainties are those of what is left; where residuals are larger than stated errors allow, everything is
widened by as much. Ignored: order and age of measurements.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ...base.errors import InputError
from ...specs.machines.profile import Constant, Profile
from .adjust import FACTOR_OF_INTERVAL, Movable, factors_of, movable, moved, with_constants, with_kernels

Array: TypeAlias = npt.NDArray[np.float64]

TOGETHER = 0.8
"""Correlation of constants of one kind of work, before anything is measured."""
_MOST_SURPRISE = 9.0
"""No machine is thought to lie more than three times as far from its parts as stated."""
_ROUNDS = 5
_LEAST_NOISE = 0.03
_STEP = 0.05
_CLOSE, _STILL = 1e-5, 1e-3
_LEAST_SURE = 10.0
"""Beyond that share of its value, nothing is known of a constant."""
_SEEN = 0.01
"""A constant that moves a speed by less than this share of its own move is not measured by it."""
_KINDS: tuple[tuple[str, tuple[str, ...], float, float], ...] = (
    ("cores", ("host.cpu.memory", "host.cpu.launch", "engine.cpu"), 0.2, 0.5),
    ("prompts on cores", ("host.cpu.flops", "host_to_device.", "device_to_host."), 0.4, 0.75),
    ("fetching", ("engine.fetch", "disk."), 0.45, 0.5),
    (
        "decoding",
        (
            "device.memory",
            "engine.kv",
            "engine.layer_s",
            "host.",
            "device.launch",
            "kernels.decode",
            "kernels.latent_decode",
        ),
        0.2,
        0.4,
    ),
    ("prompts", ("",), 0.2, 0.4),
)
"""Kinds of work by how the names of their constants begin, the first that fits; and of the variance that a prediction is stated with the
share that is not the machine's: other models, contexts and formats on it err in another way. It is half of what speeds of one machine vary
by in public reports (`python -m benchmarks.learning`), which mix hosts, builds and people; one's own lines do not. Last, the share that
lines of one machine differ by among themselves in those reports, machines left out of the fit (on cards 1 − 0.57 and 1 − 0.59, what is
common to them): what a few lines must stand out from."""
_LEAST_SCATTER = 0.05
_TOLD = 1.0
"""Speeds that are off by less than one deviation of that, all together, tell nothing of the machine."""
_OPPOSITE = 0.3
"""Two speeds that are off opposite ways, each by that many deviations, tell nothing either."""
_MANY = 4
"""From so many lines on, lines of each kind of work may be off in a way of their own."""
WITHIN, APART = "within", "apart"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A speed, and how sure it is."""

    tokens_per_s: float
    relative_deviation: float
    predict: Callable[[Profile], float]
    """Tokens a second on a profile."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What measured speeds make of a machine."""

    profile: Profile
    before: tuple[float, ...]
    """Predictions before and after, in the order of what was measured."""
    after: tuple[float, ...]
    chi_square: float
    degrees_of_freedom: int
    kernels: Mapping[str, float]
    """By how many times the kernels of a family take longer, where the machine has measured ones."""
    widened: float
    """By how much uncertainties were widened because speeds contradict each other or the model; 1 where they do not."""
    kept: str | None = None
    """Why constants stayed: speeds are off by no more than lines of one machine differ (`WITHIN`), or opposite ways (`APART`)."""


def updated(base: Profile, measured: Sequence[Measured], citation: str) -> Update:
    """Return what `measured` makes of `base`; raises InputError for a machine without constants that could move."""
    choice = movable(base)
    if not choice:
        raise InputError(
            "--hardware", base.name, "none of its constants is uncertain", "describe the machine by its parts"
        )
    prior, others = beliefs(choice)
    before, slopes = linear(base, measured)
    wanted = np.array([math.log(one.tokens_per_s) for one in measured])
    found = np.zeros(len(choice))
    repeated = np.array([one.relative_deviation for one in measured])
    noise = repeated**2 + np.maximum(np.abs(slopes) @ others, _LEAST_NOISE) ** 2
    wider_prior = prior * _surprise(wanted - before, slopes @ prior @ slopes.T + np.diag(noise))
    at, kept = before, untold(choice, slopes, wanted - before, repeated)
    for _ in range(0 if kept else _ROUNDS):
        seen = slopes @ wider_prior @ slopes.T + np.diag(noise)
        step = wider_prior @ slopes.T @ np.linalg.solve(seen, wanted - at + slopes @ found) - found
        moved_by = _inside(choice, found + step) - found
        found = found + moved_by
        at = _logs(moved(base, factors_of(choice, found)), measured)
        slopes = _slopes(base, choice, found, at, measured)
        if np.abs(moved_by).max() < _STILL:
            break
    seen = slopes @ prior @ slopes.T + np.diag(noise)
    left = prior - prior @ slopes.T @ np.linalg.solve(seen, slopes @ prior)
    # A machine far from what was believed is no contradiction; speeds that no machine explains are.
    chi = float((((wanted - at) ** 2) / noise).sum())
    widened = max(1.0, math.sqrt(chi / len(measured)))
    # What no speed depends on is in no contradiction.
    wider = np.where(np.abs(slopes).max(axis=0) > _SEEN, widened, 1.0)
    deviations = np.sqrt(np.clip(np.diag(left), 0.0, None) + others**2) * wider
    profile = _with_beliefs(base, choice, found, deviations, slopes, citation)
    return Update(
        profile=profile, before=tuple(map(float, np.exp(before))), after=tuple(map(float, np.exp(at))), chi_square=chi,
        degrees_of_freedom=len(measured), widened=widened,
        kernels={name: factor for name, factor in factors_of(choice, found).items() if name.startswith("kernels.")},
        kept=kept,
    )  # fmt: skip


def untold(choice: Sequence[Movable], slopes: Array, residuals: Array, repeated: Array | None = None) -> str | None:
    """Return why speeds tell nothing of their machine, `WITHIN` or `APART`; None where they do.

    residuals: logarithms of measured over predicted speeds; slopes: how those move with each of `choice`; repeated: deviations of
    repetitions.
    """
    scatter = np.array([each.deviation * math.sqrt(_kind(each.name)[2]) for each in choice])
    deviation = np.hypot(np.maximum(np.abs(slopes) @ scatter, _LEAST_SCATTER), 0.0 if repeated is None else repeated)
    off = residuals / deviation
    if len(off) == 2 and off[0] * off[1] < 0 and np.abs(off).min() > _OPPOSITE:
        return APART
    together = abs(float(off.sum())) / math.sqrt(len(off))
    if len(off) >= _MANY:
        together = max(together, math.sqrt(float((off**2).mean())))
    return WITHIN if together < _TOLD else None


def _surprise(residuals: Array, stated: Array) -> float:
    """Return by how much more machines are thought to vary once speeds are further off than stated, as variance; 1 where they are not.

    What is not the machine's stays: it is of kernels and lengths, not of how unlike its data sheet a machine is.
    """
    return min(_MOST_SURPRISE, max(1.0, float(residuals @ np.linalg.solve(stated, residuals)) / len(residuals)))


def linear(base: Profile, measured: Sequence[Measured]) -> tuple[Array, Array]:
    """Return the logarithms of predicted speeds, and how they move with each of `movable(base)`."""
    choice, before = movable(base), _logs(base, measured)
    return before, _slopes(base, choice, np.zeros(len(choice)), before, measured)


def beliefs(choice: Sequence[Movable]) -> tuple[Array, Array]:
    """Return how the logarithms of slowness are thought to vary together from machine to machine, and the deviations of what is not the
    machine's, both before anything is measured.
    """
    kinds = [_kind(each.name) for each in choice]
    stated, share = np.array([each.deviation for each in choice]), np.array([kind[1] for kind in kinds])
    together = np.array([[TOGETHER if one[0] == other[0] else 0.0 for other in kinds] for one in kinds])
    np.fill_diagonal(together, 1.0)
    own = stated * np.sqrt(1 - share)
    return together * np.outer(own, own), stated * np.sqrt(share)


def _kind(name: str) -> tuple[str, float, float]:
    return next((kind, share, scatter) for kind, starts, share, scatter in _KINDS if name.startswith(starts))


def _logs(profile: Profile, measured: Sequence[Measured]) -> Array:
    return np.array([math.log(one.predict(profile)) for one in measured])


def _slopes(base: Profile, choice: Sequence[Movable], found: Array, at: Array, measured: Sequence[Measured]) -> Array:
    """Return how the logarithm of each speed changes with each logarithm of slowness."""
    slopes = np.zeros((len(measured), len(choice)))
    for column, each in enumerate(choice):
        there = found.copy()
        step = _STEP if found[column] + _STEP <= each.most else -_STEP
        there[column] += step
        slopes[:, column] = (_logs(moved(base, factors_of(choice, there)), measured) - at) / step
    return slopes


def _inside(choice: Sequence[Movable], found: Array) -> Array:
    return np.clip(found, [each.least for each in choice], [each.most for each in choice])


def _with_beliefs(
    base: Profile, choice: Sequence[Movable], found: Array, deviations: Array, slopes: Array, citation: str
) -> Profile:
    """Return `base` with the constants as they are believed to be; of those that no speed depends on, the source stays."""
    known, factors = dict(base.constants()), factors_of(choice, found)
    changed: dict[str, Constant] = {}
    of_kernels: dict[str, float] = {}
    for column, each in enumerate(choice):
        left = float(deviations[column])
        if abs(found[column]) < _CLOSE and abs(left / each.deviation - 1) < _CLOSE:
            continue
        seen = bool(np.abs(slopes[:, column]).max() > _SEEN)
        wide = min(_LEAST_SURE, math.expm1(FACTOR_OF_INTERVAL * left))
        if each.name not in known:  # a family of kernels
            of_kernels[each.name] = wide
            continue
        for name in each.constants:
            was = known[name]
            how = citation if seen else f"moved with others of its kind, {citation}"
            changed[name] = Constant(
                value=was.value * factors[name], source="measured" if seen else was.source, relative_uncertainty=wide,
                citation=f"{how}; was {was.value:.4g} ± {was.relative_uncertainty:.0%} ({was.source}): {_plain(was.citation)}",
            )  # fmt: skip
    slower = {name: factors[name] for name in of_kernels}
    return with_constants(with_kernels(base, slower, of_kernels, citation if of_kernels else None), changed)


def _plain(citation: str) -> str:
    """Return where a constant first came from: of one that was updated before, not the whole chain."""
    return citation.rpartition("): ")[2] if "; was " in citation else citation
