"""Expert loads that resemble published recordings, where nothing was recorded.

Modelled: popularity of experts as a lognormal of two parts, one that neighbours in a group of experts share and one of each
expert's own; a later load in which every expert's popularity has drifted. Their three deviations meet what SGLang's recordings of
DeepSeek-R1 show: the busiest expert has 5.6 to 7.3 times the mean, the busiest of 32 GPUs 2.1 to 2.9 times (8 GPUs: 1.5 to 2.0), and a
placement balanced on one workload leaves the busiest GPU of 32 with 288 slots at 1.02 to 1.25 times the mean of another of the same phase
(median 1.10). Families whose routing is known to be more or less even (`prior`) have deviations so much larger or smaller; all others
are taken to be as uneven as DeepSeek-R1. Ignored: which experts a token chooses together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ...specs.models import ModelSpec
from ..recording import LoadProfile
from .presets import PRESETS
from .prior import family_dials
from .synthesise import base_popularity

Counts = npt.NDArray[np.float64]

DRIFT = 0.13
"""Deviation of the logarithm of an expert's popularity between the load that a placement was made from and the one it serves: with it, a
placement of DeepSeek-R1 with 288 slots made from one of SGLang's published recordings leaves the busiest of 32 GPUs at 1.10 times the
mean under another of the same phase, as is recorded (1.02 to 1.25)."""

ASSUMED = "assumed"
"""Key of a load's metadata: what was assumed where nothing was recorded."""
GROUP = 32
"""Neighbours that are busy together."""
_TOKENS = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Popularity:
    """Deviations of the logarithm of an expert's load."""

    own: float
    group: float
    drift: float
    """Between the load that a placement was made from and the one it serves."""


POPULARITY = {
    "uniform": Popularity(own=0.0, group=0.0, drift=0.0),
    "prefill": Popularity(own=0.68, group=0.47, drift=DRIFT),
    "decode": Popularity(own=0.6, group=0.65, drift=DRIFT),
}
"""By the kind of recorded load that a row resembles; decode2k and the like are taken as their phase's."""


def popularity_of(name: str, phase: str, model: ModelSpec) -> Popularity:
    """Return the loads that `name` resembles; where it is not known, those of the phase, as uneven as the model's family's."""
    for known, found in POPULARITY.items():
        if name.startswith(known):
            return found
    return _of_family(POPULARITY["prefill" if phase == "prefill" else "decode"], model)


def prior_load(model: ModelSpec, *, prefill: bool) -> LoadProfile:
    """Return loads for a model that nothing was recorded of: as uneven as its family's are known to be, else as DeepSeek-R1's."""
    phase = "prefill" if prefill else "decode"
    planned, _ = loads_of(popularity_of("", phase, model), model.num_moe_layers, model.num_experts, model.top_k)
    like = (
        ""
        if family_dials(model) in (None, PRESETS["deepseek-r1"])
        else ", scaled to what is known of this model's family"
    )
    assumed = (
        f"no recording: experts are as unevenly popular as in SGLang's published {phase} loads of DeepSeek-R1{like}"
    )
    return LoadProfile(
        counts=np.rint(planned).astype(np.int64), model=model.name, layer_ids=tuple(model.moe_layers), licence="", top_k=model.top_k,
        source=assumed, metadata={ASSUMED: assumed},
    )  # fmt: skip


def _of_family(popularity: Popularity, model: ModelSpec) -> Popularity:
    """Return deviations of DeepSeek-R1's loads scaled to those of the model's family, where they are published."""
    dials = family_dials(model)
    if dials is None:
        return popularity
    scale = _deviation(base_popularity(dials)) / _deviation(base_popularity(PRESETS["deepseek-r1"]))
    return Popularity(own=popularity.own * scale, group=popularity.group * scale, drift=popularity.drift)


def _deviation(popularity: Counts) -> float:
    """Return the deviation of the logarithm of a lognormal that is as uneven, by its coefficient of variation."""
    return float(np.sqrt(np.log1p((popularity.std() / popularity.mean()) ** 2)))


@lru_cache(maxsize=64)
def loads_of(popularity: Popularity, layers: int, experts: int, top_k: int, seed: int = 0) -> tuple[Counts, Counts]:
    """Return two loads [layers, experts]: one to plan on and one to serve."""
    rng = np.random.default_rng([seed, layers, experts])
    own, drift = rng.standard_normal((2, layers, experts))
    groups = -(-experts // GROUP)
    group = np.repeat(rng.standard_normal((layers, groups)), GROUP, axis=1)[:, :experts]
    planned = popularity.own * own + popularity.group * group
    served = planned + popularity.drift * drift
    return _counts(planned, top_k), _counts(served, top_k)


def _counts(logarithm: Counts, top_k: int) -> Counts:
    """Return tokens per expert; none gets more than all of them."""
    weight = np.exp(logarithm)
    share = weight / weight.sum(axis=1, keepdims=True) * top_k
    for _ in range(8):  # what is above certainty goes to the others
        share = np.minimum(share, 1.0)
        share *= top_k / share.sum(axis=1, keepdims=True)
    return np.asarray(np.minimum(share, 1.0) * _TOKENS)
