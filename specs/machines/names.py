"""Free text becomes a part: names as people, shops and operating systems write them.

Modelled: makers' decorations and words that say nothing about speed ("16-Core Processor", "@ 2.60GHz", "Founders Edition") are left
out, spaces and dashes do not matter, a family's name may be missing where no other part has that number ("4090", "i9-13900K",
"Epyc 9654"), a size chooses among those that a part is sold with ("M2 Ultra 192GB"). Every other word counts: "RTX 4070 Laptop" is not
the desktop's card, and an unknown word makes the whole name unknown. Ignored: spelling mistakes, beyond naming what is near.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

from ...base.errors import InputError

T = TypeVar("T")

_SILENT = {
    "nvidia", "geforce", "amd", "ati", "radeon", "intel", "apple", "graphics", "gpu", "cpu", "processor", "generation", "edition",
    "card", "oem", "founders", "fe", "desktop", "unified", "memory", "vram", "corporation", "inc", "mac",
    # who sells cards and boxes, and what makers call generations of processors
    "asus", "msi", "evga", "gigabyte", "zotac", "pny", "palit", "gainward", "sapphire", "powercolor", "xfx", "asrock",
    "dell", "hp", "lenovo",
    "genoa", "turin", "milan", "rome", "naples", "granite", "emerald", "rapids",
}  # fmt: skip
_DECORATIONS = (
    r"\((?:r|tm|c)\)|®|™", r"@\s*[0-9.]+\s*ghz", r"\b(?:w/|with )\s*(?:amd |intel )?(?:radeon|[a-z0-9 ]*graphics).*",
    r"\b[0-9]+(?:st|nd|rd|th) gen(?:eration)?\b",
    r"\bmac(?:book)?[ -](?:pro|air|studio|mini)\b",
)  # fmt: skip
_CORES = re.compile(r"\b([0-9]+|dual|quad|six|eight)[- ]?(?:cores?|threads?)\b")
_SIZE = re.compile(r"\b([0-9]{1,4}) ?(?:gb|gib|g)\b")
_SHORT = (
    (r"(?:rtx|gtx|rx|arc|tesla)-(.+)", ("{0}",)),
    (r"arc-pro-(.+)", ("{0}",)),
    (r"ryzen-([3579])-((?:pro-)?.+)", ("{1}", "ryzen-{1}", "r{0}-{1}")),
    (
        r"threadripper-(pro-)?(.+)",
        ("{1}", "threadripper-{1}", "ryzen-threadripper-{0}{1}", "ryzen-{1}", "tr-{1}", "tr-{0}{1}"),
    ),
    (r"epyc-(.+)", ("{0}",)),
    (r"core-(i[3579])-(.+)", ("{0}-{1}", "{1}", "core-{1}")),
    (r"core-ultra-([579])-(.+)", ("ultra-{0}-{1}", "ultra-{1}", "{1}", "core-ultra-{1}")),
    (r"xeon-(bronze|silver|gold|platinum|max)-(.+)", ("{0}-{1}", "xeon-{1}", "{1}")),
    (r"xeon-e5-(.+)", ("e5-{0}", "{0}", "xeon-{0}")),
    (r"xeon-(w[0-9]?)-(.+)", ("{0}-{1}", "xeon-{1}", "{1}")),
    (r"xeon-(6[0-9]{3}[pe])", ("{0}", "xeon-6-{0}")),
)
"""Names without the family's: kept where only one part would have them."""


def plain_name(text: str) -> str:
    """Return a name as the catalogue spells it: lower case, words joined by dashes, makers and decorations left out."""
    return "-".join(word for word in _words(text) if word not in _SILENT)


class Names(Generic[T]):
    """Finds the parts of one table by whatever people call them."""

    def __init__(self, parts: Mapping[str, T], aliases: Mapping[str, Iterable[str]]) -> None:
        self._canonical = tuple(parts)
        self._parts: dict[str, T] = {}
        self._shared: dict[str, list[str]] = {}
        """Short names that several parts would have, and which."""
        short: dict[str, set[str]] = {}
        for name, part in parts.items():
            for one in (name, *aliases.get(name, ())):
                self._parts[_compact(one)] = part
                short.setdefault(_compact(plain_name(one)), set()).add(name)
            for one in _short_names(name):
                short.setdefault(_compact(one), set()).add(name)
        for one, owners in short.items():
            if len(owners) == 1:
                self._parts.setdefault(one, parts[next(iter(owners))])
            elif one not in self._parts:
                self._shared[one] = sorted(owners)

    def find(self, text: str) -> tuple[T, int | None] | None:
        """Return the part that `text` names and the GB that it names with it (None: no size), or None."""
        without_cores = _words(_CORES.sub(" ", text.lower()))
        forms = [
            form
            for words in (_words(text), without_cores)
            for form in (words, [one for one in words if one not in _SILENT])
        ]
        for form in forms:
            found = self._parts.get("".join(form))
            if found is not None:
                return found, None
        for form in forms:
            sizes = [word for word in form if _SIZE.fullmatch(word)]
            found = self._parts.get("".join(word for word in form if word not in sizes))
            if found is not None and len(sizes) == 1:
                return found, int(sizes[0].rstrip("gib"))
        return None

    def sharing(self, text: str) -> list[str]:
        """Return the parts that `text` ("7900X") may stand for where these are several."""
        return self._shared.get(_compact(plain_name(text)), [])

    def unknown(self, field: str, text: str) -> InputError:
        """Return the error for a text that names none of them, or several: with the nearest names."""
        if shared := self.sharing(text):
            return InputError(field, text, f"may be {' or '.join(shared)}", "write the whole name")
        near = self.nearest(text)
        rule = f"not in the catalogue; near it are {', '.join(near)}" if near else "not in the catalogue"
        remedy = (
            f"did you mean {near[0]!r}? moeplan machine --list {field}s has all"
            if near
            else f"moeplan machine --list {field}s has all"
        )
        return InputError(field, text, rule, remedy)

    def nearest(self, text: str) -> list[str]:
        """Return the canonical names that are most like `text`, at most five: those that hold all of its words first."""
        plain = plain_name(text)
        words = set(plain.split("-"))
        holding = [name for name in self._canonical if words <= set(name.split("-"))]
        ends = {one: name for name in self._canonical for one in (*_short_names(name), name)}
        found = [ends[one] for one in difflib.get_close_matches(plain, list(ends), n=12, cutoff=0.55)]
        return list(dict.fromkeys((*holding, *found)))[:5]

    def likeness(self, text: str) -> float:
        """Return how like the nearest name `text` is, from 0 to 1."""
        plain = plain_name(text)
        near = self.nearest(text)[:1]
        return max(
            (difflib.SequenceMatcher(None, plain, one).ratio() for name in near for one in (*_short_names(name), name)),
            default=0.0,
        )


def _words(text: str) -> list[str]:
    lowered = text.lower()
    for decoration in _DECORATIONS:
        lowered = re.sub(decoration, " ", lowered)
    # What is in brackets explains, but for the cores of a graphics unit: they tell smaller chips from larger ones.
    lowered = re.sub(
        r"\(([^)]*)\)", lambda match: f" {match[1]} " if re.fullmatch(r"[0-9]+[- ]core gpu", match[1]) else " ", lowered
    )
    lowered = _SIZE.sub(r"\1gb", re.sub(r"\b(?:laptop|notebook)\b", "mobile", lowered))
    return re.sub(r"[^a-z0-9.]+", " ", lowered).split()


def _compact(name: str) -> str:
    return name.replace("-", "")


def _short_names(name: str) -> list[str]:
    found = []
    for pattern, forms in _SHORT:
        match = re.fullmatch(pattern, name)
        if match is not None:
            found += [form.format(*(group or "" for group in match.groups())) for form in forms]
    return found
