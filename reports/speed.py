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

# Families of published schedules in the order in which they are shown, by the key that plans give them.
FAMILY_TITLES: Mapping[str, str] = {
    "resident": "Everything on the device",
    "none": "No cache: fetched when routed",
    "static": "Fixed on the device, nothing fetched back",
    "reactive": "Caches that react",
    "speculative": "Caches that guess ahead",
    "prefetch": "Layers fetched ahead",
    "pre-gated": "Routed one layer early",
    "request": "Guesses from whole requests",
    "cpu": "The processor helps",
    "precision": "Fewer bits on a miss",
    "tiers": "Three tiers, with disk",
    "oracle": "Routes known ahead",
    "other": "Other published schedules",
}
_OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One schedule of a plan, with the heading it is shown under."""

    name: str
    title: str
    """What it is called in words."""
    kind: str
    """chosen, published or reference."""
    heading: str
    result: Document
    """The schedule's part of the plan document."""
    schedule: OffloadSchedule


def entries(document: Document) -> list[Entry]:
    """Return every simulated schedule of a plan document: the chosen one, the published ones by family, the references.

    In each family the plan's order is kept. Raises InputError for a schedule that is none.
    """
    best = document["best"]
    found = [_entry(best["name"], best["name"], CHOSEN, "Chosen", best)]
    published = sorted(document["baselines"], key=lambda one: _place(_family(one)))
    one_family = all(_family(one) == _OTHER for one in published)
    for one in published:
        heading = "Published schedules" if one_family else family_title(_family(one))
        found.append(_entry(one["name"], one["name"], PUBLISHED, heading, one))
    for name, one in document["references"].items():
        found.append(_entry(name, _reference_title(name), REFERENCE, "References out of reach", one))
    return found


def family_title(family: str) -> str:
    """Return what a family of schedules is called; a key that is not known speaks for itself."""
    return FAMILY_TITLES.get(family, family[:1].upper() + family[1:].replace("-", " "))


def _family(one: Document) -> str:
    family = one.get("family")
    return family if isinstance(family, str) and family else _OTHER


def _place(family: str) -> tuple[int, str]:
    """Return the place of a family: known ones in their order, others by name before the last."""
    known = [name for name in FAMILY_TITLES if name != _OTHER]
    if family == _OTHER:
        return len(known) + 1, ""
    return (known.index(family), "") if family in known else (len(known), family)


def _entry(name: str, title: str, kind: str, heading: str, result: Document) -> Entry:
    schedule = schedule_from_dict(result["schedule"])
    return Entry(name=name, title=title, kind=kind, heading=heading, result=result, schedule=schedule)


def is_roomier(entry: Entry) -> bool:
    """Return whether an entry is the chosen schedule with more memory."""
    return entry.kind == REFERENCE and entry.name.startswith(_ROOMIER)


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
