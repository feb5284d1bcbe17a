"""The account of an import: tokens read, tokens dropped by cause, tokens an answer speaks of and does not hold, remarks.

Modelled: what `trace import` prints and what stays in the recording's metadata, so that a figure made from it can be
questioned later. Ignored: which token was dropped (positions with holes show it).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..recording import LoadProfile, RoutingTrace

PADDING = "padding"
UNCAPTURED = "nothing captured (rows of zeros)"
INCOMPLETE = "a choice missing (-1)"
PARTLY = "captured in some layers only"
NEVER_RAN = "last sampled token (never ran)"
SHARED_PROMPT = "prompt shared with another choice"
RECOMPUTED = "computed again later"
PREFIX_LEFT_OUT = "prefix left out by the server"
_KEYS = ("tokens_read", "tokens_dropped", "tokens_missing", "notes")


@dataclass(slots=True)
class Account:
    """What a reader met; filled while reading."""

    read: int = 0
    """Rows of tokens in the file."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Cause → rows that are in the file and not in the recording."""
    missing: dict[str, int] = field(default_factory=dict)
    """Cause → tokens that ran, as the source says, and that have no row in the file."""
    notes: list[str] = field(default_factory=list)
    """Whole remarks for the person who imports."""

    def drop(self, cause: str, tokens: int) -> None:
        """Count rows left out."""
        if tokens:
            self.dropped[cause] = self.dropped.get(cause, 0) + tokens

    def miss(self, cause: str, tokens: int) -> None:
        """Count tokens that the file does not hold."""
        if tokens:
            self.missing[cause] = self.missing.get(cause, 0) + tokens

    def note(self, text: str) -> None:
        """Add a remark, once."""
        if text not in self.notes:
            self.notes.append(text)

    def metadata(self) -> dict[str, str]:
        """Return the account as metadata of a recording; empty parts are left out."""
        values = {"tokens_read": self.read, "tokens_dropped": self.dropped, "tokens_missing": self.missing}
        entries = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items() if value}
        return entries | ({"notes": json.dumps(self.notes, ensure_ascii=False)} if self.notes else {})


def account_of(recording: RoutingTrace | LoadProfile) -> dict[str, object]:
    """Return `tokens_read`, `tokens_dropped`, `tokens_missing`, `notes` of a recording, from its metadata.

    A recording whose reader keeps no account was read whole.
    """
    stated = {key: _parsed(recording.metadata, key) for key in _KEYS}
    tokens = recording.num_tokens if isinstance(recording, RoutingTrace) else _counted_tokens(recording)
    read, dropped, missing, notes = (stated[key] for key in _KEYS)
    return {
        "tokens_read": read if isinstance(read, int) else tokens,
        "tokens_dropped": dropped if isinstance(dropped, dict) else {},
        "tokens_missing": missing if isinstance(missing, dict) else {},
        "notes": notes if isinstance(notes, list) else [],
    }


def with_note(metadata: Mapping[str, str], text: str) -> dict[str, str]:
    """Return metadata whose notes hold one more remark."""
    notes = _parsed(metadata, "notes")
    return {**metadata, "notes": json.dumps([*(notes if isinstance(notes, list) else []), text], ensure_ascii=False)}


def layer_ranges(layers: list[int]) -> str:
    """Return increasing layer numbers for a person: "0–2, 7"."""
    pieces: list[str] = []
    start = 0
    for end in range(1, len(layers) + 1):
        if end == len(layers) or layers[end] != layers[end - 1] + 1:
            first, last = layers[start], layers[end - 1]
            pieces.append(str(first) if first == last else f"{first}–{last}")
            start = end
    return ", ".join(pieces)


def _counted_tokens(profile: LoadProfile) -> int | None:
    """Return the tokens of the layer that counted most, where the choices of a token are known."""
    return None if profile.top_k is None else int(profile.counts.sum(axis=1).max()) // profile.top_k


def _parsed(metadata: Mapping[str, str], key: str) -> object:
    """Return a JSON entry of the metadata, None when it is absent or not JSON."""
    try:
        return json.loads(metadata[key]) if key in metadata else None
    except (ValueError, RecursionError):
        return None
