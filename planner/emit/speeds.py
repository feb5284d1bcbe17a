"""Predicted speeds and times in a few words, each with its interval.

Modelled: one spelling for every engine's files. Ignored: what they are of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Figures = Mapping[str, Any]
_PARTS: Sequence[tuple[str, str]] = (
    ("request_s", "s a request"), ("ttft_s", "s to its first token"), ("prefill_tokens_per_s", "prompt tokens/s"),
    ("decode_tokens_per_s", "generated tokens/s"),
)  # fmt: skip
_WHOLE = 100


def figures_words(figures: Figures) -> str:
    """Return every speed and time that a prediction has, in one line."""
    return ", ".join(f"{with_ends(figures, name)} {unit}" for name, unit in _PARTS if figures.get(name) is not None)


def difference_words(difference: Mapping[str, Any]) -> str:
    """Return how many times as fast a setting is as what the engine does of itself, and whether that can be promised."""
    ratio, low, high = (difference[name] for name in ("ratio", "low", "high"))
    said = f"{ratio:.2f} times as fast ({low:.2f} to {high:.2f})"
    if difference["promised"]:
        return f"{said}, errors that both share cancelled"
    return f"no difference that this prediction can promise: {said}"


def with_ends(figures: Figures, name: str) -> str:
    """Return a figure with its interval, "none" where the prediction lacks it."""
    value, ends = figures.get(name), figures.get(f"{name}_interval")
    if value is None:
        return "none"
    return short(value) + (f" ({short(ends[0])} to {short(ends[1])})" if ends else "")


def short(value: float) -> str:
    """Return a number in three digits, whole from a hundred on."""
    return f"{value:,.0f}" if value >= _WHOLE else f"{value:.3g}"
