"""Which cost model a profile takes, and whether it describes the device at hand. Ignored: what anything costs."""

from __future__ import annotations

from typing import Any

from ...base.errors import InputError
from ...specs.card_split import CardSplit
from ...specs.machines.profile import Profile
from ...specs.models import ModelSpec
from .cards import cost_of_cards
from .cost_model import CostModel
from .engine_costs import EngineCosts
from .fitted.model import FittedCostModel
from .gpu.costs import KernelCosts


def load_costs(
    profile: Profile,
    model: ModelSpec,
    *,
    allow_datasheet: bool = False,
    tables: bool = True,
    split: CardSplit | None = None,
    **options: Any,
) -> CostModel:
    """Return the cost model of a profile: fitted tables where it holds a calibration, measured kernels where it names an engine's, the
    roofline of its constants otherwise.

    tables: False takes the roofline of a calibrated machine's constants (its tables are those of one device at work alone). split: how
    the model lies on a machine's cards; raises InputError for several cards without one.
    """
    if profile.cards:
        if split is None:
            raise InputError(
                "hardware",
                profile.name,
                "it has several cards, and this does not divide a model over them",
                "name one card",
            )
        return cost_of_cards(profile, model, split, load_costs, **options)
    if profile.curves and tables:
        return FittedCostModel(profile, model, allow_datasheet=allow_datasheet, **options)
    if profile.kernels is not None and not profile.curves:
        return KernelCosts(profile, model, **options)
    if profile.engine is not None and not profile.curves:
        return EngineCosts(profile, model, **options)
    return CostModel(profile, model, **options)


def check_profile_matches(profile: Profile, *, kind: str, name: str) -> None:
    """Return nothing; raises InputError where a profile was measured on another device than the one at hand."""
    wanted = "gpu" if kind == "cuda" else "cpu"
    if profile.device.kind != wanted:
        raise InputError(
            "profile",
            profile.name,
            f"it describes a {profile.device.kind}, this device is a {wanted}",
            "calibrate this device",
        )
    if profile.curves and name not in (profile.name, *_cited(profile)):
        raise InputError(
            "profile", profile.name, f"it was measured on another device than this {name}", "calibrate this device"
        )


def _cited(profile: Profile) -> list[str]:
    """Return the device names that the profile's tables were measured on."""
    marks = [curve.citation for curve in profile.curves.values()]
    return [mark.removeprefix("calibration of ").partition(" by moeplan")[0] for mark in dict.fromkeys(marks)]
