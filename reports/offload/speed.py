"""Speeds as a report shows them: those of decoding with their own interval, or of prompts where nothing is decoded.

Modelled: which of the two a plan's window has, and what it is called. Ignored: that the errors of two schedules on one machine are
largely common; the report says so in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...specs.schedules.offload import OffloadSchedule, schedule_from_dict
from ...specs.schedules.presets import FAMILIES
from .. import numbers

Document = Mapping[str, Any]

# How plans call references that only have more memory.
_ROOMIER = "memory x"
CHOSEN, PUBLISHED, REFERENCE = "chosen", "published", "reference"

# Times by which plans of requests are told, in words.
_TIMES = {"request_s": "seconds a request", "ttft_s": "seconds to the first token"}

# A plan whose schedules name no family has one heading for all.
_OTHER, _UNSORTED = "other", "Published schedules"
_NEEDING = "Need another model or trained parts"


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
    needs: str | None
    """What it needs that the plan's case does not have; None: nothing."""

    @property
    def label(self) -> str:
        """Its title, with a mark where it needs something."""
        return f"{self.title} †" if self.needs else self.title


def entries(document: Document) -> list[Entry]:
    """Return every simulated schedule of a plan document: the chosen one, the published ones by family, those that need
    more than the plan's case has, the references.

    Families stand in the order of the presets, schedules of a family in the plan's own. Raises InputError for a schedule that
    is none.
    """
    best = document["best"]
    found = [_entry(best["name"], best["name"], CHOSEN, "Chosen", best)]
    published = [*document["baselines"], *document.get("baselines_that_need_more", [])]
    fair, needing = ([one for one in published if bool(one.get("needs")) == needs] for needs in (False, True))
    families = list(dict.fromkeys(_family(one) for one in fair))
    families.sort(key=_place)
    for family in families:
        heading = _UNSORTED if families == [_OTHER] else family_title(family)
        mine = [one for one in fair if _family(one) == family]
        found += [_entry(one["name"], one["name"], PUBLISHED, heading, one) for one in mine]
    found += [_entry(one["name"], one["name"], PUBLISHED, _NEEDING, one) for one in needing]
    for name, one in document["references"].items():
        found.append(_entry(name, _reference_title(name), REFERENCE, "References out of reach", one))
    return found


def family_title(family: str) -> str:
    """Return the heading of a family of schedules, from the words that plans give it."""
    return "Other published schedules" if family == _OTHER else family[:1].upper() + family[1:]


def _family(one: Document) -> str:
    family = one.get("family")
    return family if isinstance(family, str) and family else _OTHER


def _place(family: str) -> tuple[int, str]:
    """Return where a family stands: in the order of the presets, then by name, those without a family last."""
    known = list(dict.fromkeys(FAMILIES.values()))
    if family == _OTHER:
        return len(known) + 1, ""
    return (known.index(family), "") if family in known else (len(known), family)


def _entry(name: str, title: str, kind: str, heading: str, result: Document) -> Entry:
    schedule = schedule_from_dict(result["schedule"])
    return Entry(name=name, title=title, kind=kind, heading=heading, result=result, schedule=schedule,
                 needs=result.get("needs") or None)  # fmt: skip


def is_roomier(entry: Entry) -> bool:
    """Return whether an entry is the chosen schedule with more memory."""
    return entry.kind == REFERENCE and entry.name.startswith(_ROOMIER)


def _reference_title(name: str) -> str:
    if name == "belady":
        return "Belady's cache"
    return f"{name.removeprefix(_ROOMIER)} × memory" if name.startswith(_ROOMIER) else name


def told_by(document: Document) -> str | None:
    """Return the time by which a plan's schedules are told where it was asked for one (of a request, of its first token), else None."""
    ranked = document.get("ranked_by")
    return ranked if isinstance(ranked, str) and ranked in _TIMES and document["best"].get(ranked) is not None else None


def speed_key(result: Document, told: str | None = None) -> str:
    """Return which figure a schedule is told by: `told`, or decoding where anything is decoded, else prompts."""
    if told is not None:
        return told
    return "decode_tokens_per_s" if result["decode_tokens_per_s"] is not None else "prefill_tokens_per_s"


def speed_words(result: Document, told: str | None = None) -> str:
    """Return the unit of `speed_of` in words."""
    if told is not None:
        return _TIMES[told]
    return "decoded tokens/s" if speed_key(result) == "decode_tokens_per_s" else "prompt tokens/s"


def speed_of(result: Document, told: str | None = None) -> float:
    """Return the figure a schedule is told by, in tokens per second, or seconds where it is `told` by a time."""
    return float(result[speed_key(result, told)])


def interval_of(result: Document, told: str | None = None) -> tuple[float, float]:
    """Return the interval of that figure."""
    low, high = result[f"{speed_key(result, told)}_interval"]
    return float(low), float(high)


def interval_text(result: Document, told: str | None = None) -> str:
    """Return the interval of that figure in words."""
    low, high = interval_of(result, told)
    return f"{numbers.significant(low)} to {numbers.significant(high)}"
