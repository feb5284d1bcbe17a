"""What is said of drafting, read: guesses a step, how many are accepted, what drafts.

Modelled: options that belong together. Ignored: what drafting costs (`sim.offload.drafting`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeAlias

from ..base.errors import InputError
from ..sim.offload.drafting.draft import KINDS, MTP, Drafting
from ..specs.drafting import read_acceptance
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
        raise InputError("--acceptance", "(absent)", "how many guesses are accepted is the text's and the draft's, and not known here",
                         "measure it, or give a number to see what it would take, e.g. --acceptance 0.7")  # fmt: skip
    found = read_acceptance(acceptance)
    if draft is None or str(draft) in KINDS:
        return Drafting(length=length, acceptance=found, mtp=str(draft) == MTP)
    drafts = Drafting(length=length, acceptance=found, model=as_model(draft))
    drafts.check(as_model(model))
    return drafts
