"""Where every constant of a machine comes from, as a table, and how much of the profile each source makes up.

Modelled: a walk over the profile's own structure, so a constant that is added to the nouns appears here without being named
again. Ignored: the contents of measured curves, of which only the number of points is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from ..specs.machines.profile import SOURCES, Constant, Curve, Profile
from . import numbers
from .page import Column, fold, paragraph, table

COLUMNS = (
    Column(title="Constant"), Column(title="Value", is_number=True), Column(title="±", is_number=True), Column(title="Source"),
    Column(title="Taken from"),
)  # fmt: skip


def constants(value: object, name: str = "") -> Iterator[tuple[str, Constant]]:
    """Yield (dotted name, constant) for every constant of a profile or a part of one, in declaration order."""
    if isinstance(value, Constant):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from constants(item, f"{name}.{key}")
    elif is_dataclass(value):
        for field in fields(value):
            yield from constants(getattr(value, field.name), f"{name}.{field.name}" if name else field.name)


def curves(profile: Profile) -> Iterator[tuple[str, Curve]]:
    """Yield (name, curve) for every measured table of a profile."""
    yield from profile.curves.items()


def source_summary(profile: Profile) -> str:
    """Return how many constants come from where, most trusted source first, in words."""
    count = Counter(constant.source for _, constant in constants(profile))
    count.update(curve.source for _, curve in curves(profile))
    return ", ".join(f"{count[source]} {source}" for source in SOURCES if count[source])


def constants_table(profile: Profile) -> str:
    """Return every constant with value, uncertainty, source and citation, as an HTML table."""
    rows = [
        (
            _words(name),
            numbers.constant(name, one.value),
            numbers.percent(one.relative_uncertainty, 0),
            one.source,
            one.citation,
        )
        for name, one in constants(profile)
    ]
    rows += [
        (
            _words(name),
            f"{len(curve.seconds)} points",
            numbers.percent(curve.relative_uncertainty, 0),
            curve.source,
            curve.citation,
        )
        for name, curve in curves(profile)
    ]
    return table(COLUMNS, rows)


def _words(name: str) -> str:
    """Return a dotted name without its unit, readable: `host_to_device.latency_s` → `host to device: latency`."""
    found = []
    for part in name.split("."):
        for unit in ("_bytes_per_s", "_flops_per_s", "_bytes", "_s"):
            if part.endswith(unit) and part != unit[1:]:
                found.append(
                    part.removesuffix(unit) + {"_bytes_per_s": " bandwidth", "_flops_per_s": " speed"}.get(unit, "")
                )
                break
        else:
            found.append(part)
    return ": ".join(found).replace("_", " ")


def set_by_user(document: Mapping[str, Any]) -> list[str]:
    """Return what the command line of a plan changed of its model, machine and request, as it was written."""
    return [str(one["setting"]) for one in document.get("set_by_user") or ()]


def set_words(document: Mapping[str, Any], own_options: Collection[str]) -> list[str]:
    """Return the words that set it again; fields of the request that have an option of their own (`own_options`) are left to it."""
    words = []
    for setting in set_by_user(document):
        prefix, _, field = setting.partition("=")[0].partition(".")
        if prefix != "request" or field not in own_options:
            words += ["--set", setting]
    return words


def machine_parts(profile: Profile | None) -> list[str]:
    """Return the part of a page that says what is known of the machine and from where; None: its profile was not given."""
    heading = "<h3>Of the machine</h3>"
    if profile is None:
        missing = "The machine's profile was not given to this report; its file names the source of every constant."
        return [heading, paragraph(missing)]
    known = f"{profile.name}: {profile.description} Its constants are {source_summary(profile)}."
    return [heading, paragraph(known), fold("Every constant, with its source", constants_table(profile))]
