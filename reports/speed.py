"""Speeds as a report shows them: tokens a second with the interval that the uncertainty of the run's time leaves.

Modelled: a relative uncertainty u of a run's time puts its true time between (1 − u) and (1 + u) of the predicted one, so
its speed between 1 / (1 + u) and 1 / (1 − u): the upper side is the longer one. Ignored: that the errors of two schedules
on one machine are largely common; the report says so in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..schedule import OffloadSchedule, schedule_from_dict
from . import numbers

Document = Mapping[str, Any]

# How plans call references that only have more memory.
_ROOMIER = "memory x"
CHOSEN, PUBLISHED, REFERENCE = "chosen", "published", "reference"
FAMILY_TITLES = {
    CHOSEN: "Chosen",
    PUBLISHED: "Published schedules",
    REFERENCE: "References out of reach",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One schedule of a plan, with the family it is shown in."""

    name: str
    title: str
    """What it is called in words."""
    family: str
    result: Document
    """The schedule's part of the plan document."""
    schedule: OffloadSchedule


def entries(document: Document) -> list[Entry]:
    """Return every simulated schedule of a plan document, the chosen one first, each family in the plan's order.

    Raises InputError for a schedule that is none.
    """
    best = document["best"]
    found = [_entry(best["name"], best["name"], CHOSEN, best)]
    found += [_entry(one["name"], one["name"], PUBLISHED, one) for one in document["baselines"]]
    found += [_entry(name, _reference_title(name), REFERENCE, one) for name, one in document["references"].items()]
    return found


def _entry(name: str, title: str, family: str, result: Document) -> Entry:
    return Entry(name=name, title=title, family=family, result=result, schedule=schedule_from_dict(result["schedule"]))


def is_roomier(entry: Entry) -> bool:
    """Return whether an entry is the chosen schedule with more memory."""
    return entry.family == REFERENCE and entry.name.startswith(_ROOMIER)


def _reference_title(name: str) -> str:
    if name == "belady":
        return "Belady's cache"
    return f"{name.removeprefix(_ROOMIER)} × memory" if name.startswith(_ROOMIER) else name


def interval(value: float, relative_uncertainty: float) -> tuple[float, float | None]:
    """Return the lowest and highest speed within the uncertainty of the time; None where there is no highest."""
    high = value / (1 - relative_uncertainty) if relative_uncertainty < 1 else None
    return value / (1 + relative_uncertainty), high


def interval_of(result: Document) -> tuple[float, float | None]:
    """Return the interval of a schedule's tokens per second."""
    return interval(float(result["tokens_per_s"]), float(result["relative_uncertainty"]))


def interval_text(result: Document) -> str:
    """Return the interval of a schedule's tokens per second in words."""
    low, high = interval_of(result)
    return f"{numbers.significant(low)} to {numbers.significant(high) if high is not None else 'any speed'}"
