"""Drafted tokens: how many of those that a step verifies are accepted.

A step with draft length k computes k + 1 tokens: the one that is certain and k guesses of a cheaper model. The guesses up to the first
wrong one are accepted, and the model's own token after them comes with it, so that a step yields 1 to k + 1 tokens.

Modelled: acceptance as a chance that is the same for every guess whose forerunners were accepted, or as the share of drafts accepted up
to each position (what vLLM and SGLang print as "per-position acceptance rate"; it falls). Ignored: acceptance that depends on the text or
on the sampling temperature, trees of guesses, drafts that end early because the draft model is unsure.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..base.errors import InputError
from ..base.text_files import read_text
from .models import ModelSpec

MOST_DRAFTED = 64
"""Guesses a step, at most: more than any engine takes by default."""
DRAFTED = frozenset(
    {"deepseek_v3", "deepseek_v32", "deepseek_v4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "mimo_v2_flash", "minimax_m2",
     "qwen3_next", "qwen3_5_moe", "qwen4_exp", "nemotron_h", "exaone_moe", "ernie4_5_moe", "longcat_flash", "step3p5"}
)  # fmt: skip
"""Families whose published checkpoints have multi-token-prediction layers after the last one."""
_MOST_FILE_BYTES = 1 << 20
_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it spread evenly over 0..1, whatever their number


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """How often guesses are accepted: `chance`, or `reached` where it is known position by position."""

    chance: float | None = None
    """That a guess is accepted when all before it were; the same for all positions."""
    reached: tuple[float, ...] = ()
    """Share of drafts of which guesses 1 to j were all accepted, for j = 1, 2, …; never rising."""

    def __post_init__(self) -> None:
        if (self.chance is None) == (not self.reached):
            raise InputError(
                "acceptance", self.chance, "neither one chance nor shares by position", "give one of the two"
            )
        for each in self.reached if self.chance is None else (self.chance,):
            if not 0 <= each <= 1:
                raise InputError("acceptance", f"{each:g}", "outside 0..1", "give shares of the drafted tokens")
        if any(later > earlier for earlier, later in zip(self.reached, self.reached[1:], strict=False)):
            raise InputError(
                "acceptance",
                ",".join(f"{each:g}" for each in self.reached),
                "it rises from one position to the next, though a guess counts only when all before it were right",
                "give the share of drafts accepted up to each position, as engines print it",
            )

    def up_to(self, length: int) -> tuple[float, ...]:
        """Return the shares of drafts of `length` guesses of which the first 1, 2, … `length` were accepted.

        Raises InputError for a length below nought or above MOST_DRAFTED, or beyond the positions that are known.
        """
        if not 0 <= length <= MOST_DRAFTED:
            raise InputError("draft length", length, f"not within 0..{MOST_DRAFTED}", "give the guesses of one step")
        if self.chance is not None:
            return tuple(self.chance**place for place in range(1, length + 1))
        if length > len(self.reached):
            rule = f"acceptance is known for {len(self.reached)} positions"
            raise InputError("draft length", length, rule, "draft fewer, or give one number for all positions")
        return self.reached[:length]

    @property
    def longest(self) -> int:
        """Return the longest draft that this says something of."""
        return MOST_DRAFTED if self.chance is not None else min(len(self.reached), MOST_DRAFTED)

    @property
    def words(self) -> str:
        """The same for people."""
        if self.chance is not None:
            return f"{self.chance:.4g} of the guesses whose forerunners were right"
        return "by position " + ", ".join(f"{each:.4g}" for each in self.reached)

    def to_text(self) -> str:
        """Return what `read_acceptance` reads as the same."""
        return ",".join(repr(each) for each in ((self.chance,) if self.chance is not None else self.reached))


def tokens_per_step(length: int, acceptance: Acceptance) -> float:
    """Return the tokens that a step with drafts of `length` guesses yields in the mean: the accepted ones and the model's own."""
    return 1.0 + math.fsum(acceptance.up_to(length))


def yielding(length: int, tokens: float) -> Acceptance:
    """Return the chance with which drafts of `length` guesses yield `tokens` a step in the mean.

    Raises InputError for fewer than the one that is certain, or more than there are.
    """
    if not 1 <= tokens <= length + 1:
        raise InputError("tokens a step", f"{tokens:g}", f"not within 1..{length + 1}, what {length} guesses can yield",
                         "give the mean of a step, the model's own token included")  # fmt: skip
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_per_step(length, Acceptance(chance=middle)) < tokens else (low, middle)
    return Acceptance(chance=high)


def share_accepted(length: int, acceptance: Acceptance) -> float:
    """Return the share of drafted tokens that are accepted (llama.cpp's "draft acceptance rate"); nought where none are drafted."""
    return math.fsum(acceptance.up_to(length)) / length if length else 0.0


def chances_of_counts(length: int, acceptance: Acceptance) -> tuple[float, ...]:
    """Return the chance that exactly 0, 1, … `length` guesses of a step are accepted; they add up to one."""
    edges = (1.0, *acceptance.up_to(length), 0.0)
    return tuple(edges[count] - edges[count + 1] for count in range(length + 1))


def counts_of_steps(length: int, acceptance: Acceptance, first: int, num_steps: int) -> list[int]:
    """Return how many guesses each of `num_steps` steps accepts, the `first`-th step onward.

    The counts follow no random numbers: steps are spread evenly over the chances, so that n steps hold every count n times its chance to
    within a few, and the same step always accepts the same.
    """
    reached = acceptance.up_to(length)
    points = [((step + 0.5) * _GOLDEN) % 1.0 for step in range(first, first + num_steps)]
    return [sum(point < share for share in reached) for point in points]


def read_acceptance(text: str | float | Sequence[float] | os.PathLike[str], field: str = "--acceptance") -> Acceptance:
    """Return an acceptance from a number, numbers by position with commas between them, or a file that holds either.

    A file is text like that, or JSON: a number, a list, or an object whose `acceptance` is one of them. Raises InputError.
    """
    if isinstance(text, bool):
        raise InputError(field, text, "not a number", "give shares within 0..1")
    if isinstance(text, (int, float)):
        return _made([float(text)], field, text)
    if not isinstance(text, (str, os.PathLike)):
        return _made([_number(each, field) for each in text], field, text, by_position=True)
    words = str(os.fspath(text)).strip()
    if not _is_numbers(words):
        words = _of_file(words, field)
    parts = [part for part in words.replace(",", " ").split() if part]
    return _made([_number(part, field) for part in parts], field, text)


def _made(numbers: list[float], field: str, given: object, *, by_position: bool = False) -> Acceptance:
    if not numbers:
        raise InputError(field, given, "no number in it", "give a number, or one for each position")
    try:
        if len(numbers) == 1 and not by_position:
            return Acceptance(chance=numbers[0])
        return Acceptance(reached=tuple(numbers))
    except InputError as error:
        raise InputError(field, error.value, error.rule, error.remedy) from None


def _number(part: object, field: str) -> float:
    try:
        if isinstance(part, bool) or not isinstance(part, (str, int, float)):
            raise ValueError
        found = float(part)
    except ValueError:
        raise InputError(field, part, "not a number", "give shares within 0..1") from None
    if math.isnan(found):
        raise InputError(field, part, "not a number", "give shares within 0..1")
    return found


def _is_numbers(words: str) -> bool:
    try:
        return [float(part) for part in words.split(",") if part.strip()] != []
    except ValueError:
        return False


def _of_file(path: str, field: str) -> str:
    """Return the numbers of a file as text with commas; raises InputError where it holds none."""
    content = read_text(path, field, _MOST_FILE_BYTES)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return content
    found = found.get("acceptance") if isinstance(found, dict) else found
    listed = found if isinstance(found, list) else [found]
    return ",".join(repr(_number(each, field)) for each in listed)


def has_drafts(model: ModelSpec) -> bool:
    """Return whether checkpoints of the model's family have draft layers; a checkpoint at hand may have lost them."""
    return model.family in DRAFTED
