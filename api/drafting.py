"""What is said of drafting, read: guesses a step, how many are accepted, what drafts.

Modelled: options that belong together; for plans, which draft lengths are looked at, and the plan with the best of them. Ignored: what
drafting costs (`sim.offload.drafting`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ..base.errors import InputError
from ..planner.offload.drafts import lengths_of
from ..sim.offload.drafting.draft import KINDS, MTP, Drafting
from ..specs.drafting import MOST_DRAFTED, has_drafts, read_acceptance
from ..specs.models import ModelSpec
from .load import as_model

AcceptanceLike: TypeAlias = str | float | Sequence[float] | os.PathLike[str] | None
"""A chance, shares by position, or a file that holds either."""


def drafting_of(
    model: str | os.PathLike[str] | ModelSpec, length: int | None, acceptance: AcceptanceLike, draft: str | os.PathLike[str] | None
) -> Drafting | None:  # fmt: skip
    """Return how tokens are drafted; None where they are not. Raises InputError for options that lack one another."""
    if not length:
        for name, value in (("--acceptance", acceptance), ("--draft", draft)):
            if value is not None:
                raise InputError(name, value, "nothing is drafted", "leave it out, or add --draft-tokens GUESSES")
        return None
    if acceptance is None:
        raise _unknown_acceptance()
    return _drafting(model, length, acceptance, draft)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftsAsked:
    """What a plan is asked of drafting."""

    drafting: Drafting
    """Of the most guesses that are looked at."""
    lengths: tuple[int, ...]
    chosen: bool
    """The search chooses among the lengths, and none at all; else the length is as asked."""


def drafts_asked(
    model: str | os.PathLike[str] | ModelSpec, *, speculative: bool, length: int | None, acceptance: AcceptanceLike,
    draft: str | os.PathLike[str] | None,
) -> DraftsAsked | None:  # fmt: skip
    """Return what a plan is asked of drafting; None where nothing is. length: with `speculative` the most, else the one that is planned.

    Raises InputError for options that lack one another, and for draft layers that the model's checkpoints do not have.
    """
    if not speculative:
        if length is None and (acceptance is not None or draft is not None):
            name, value = ("--acceptance", acceptance) if acceptance is not None else ("--draft", draft)
            raise InputError(
                name, value, "nothing is drafted", "leave it out, or add --speculative or --draft-tokens GUESSES"
            )
        found = drafting_of(model, length, acceptance, draft)
        if found is None:
            return None
        _check_layers(model, found)
        return DraftsAsked(drafting=found, lengths=(found.length,), chosen=False)
    if length is not None and not 1 <= length <= MOST_DRAFTED:
        raise InputError("--draft-tokens", length, f"not within 1..{MOST_DRAFTED}", "give the most guesses of one step")
    if acceptance is None:
        raise _unknown_acceptance()
    first = _drafting(model, 1, acceptance, draft)
    if length is not None:
        first.acceptance.up_to(length)  # refuses more than it says something of
    _check_layers(model, first)
    lengths = lengths_of(first, length)
    return DraftsAsked(drafting=replace(first, length=lengths[-1]), lengths=lengths, chosen=True)


def _unknown_acceptance() -> InputError:
    return InputError("--acceptance", "(absent)", "how many guesses are accepted is the text's and the draft's, and not known here",
                      "measure it, or give a number to see what it would take, e.g. --acceptance 0.7")  # fmt: skip


def _drafting(
    model: str | os.PathLike[str] | ModelSpec, length: int, acceptance: AcceptanceLike, draft: str | os.PathLike[str] | None
) -> Drafting:  # fmt: skip
    found = read_acceptance(acceptance if acceptance is not None else "")
    if draft is None or str(draft) in KINDS:
        return Drafting(length=length, acceptance=found, mtp=str(draft) == MTP)
    drafts = Drafting(length=length, acceptance=found, model=as_model(draft))
    drafts.check(as_model(model))
    return drafts


def _check_layers(model: str | os.PathLike[str] | ModelSpec, drafting: Drafting) -> None:
    """Return nothing; raises InputError for draft layers of a model whose published checkpoints have none."""
    spec = as_model(model)
    if drafting.mtp and not has_drafts(spec):
        raise InputError("--draft", MTP, f"published checkpoints of {spec.name} have no draft layers",
                         "draft with n-gram or a model; moeplan simulate says what such a layer would do")  # fmt: skip
