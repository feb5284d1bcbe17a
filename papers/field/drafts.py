"""Drafting in a report, where it says so.

    workload.draft_tokens     guesses of a step
    workload.acceptance       share of the drafted tokens that were accepted, as engines print it (0.57 or 57), or a list: the share of
                              drafts accepted up to each position
    workload.tokens_per_step  in its place: tokens that a step yields in the mean ("acceptance length")
    workload.draft            n-gram (else), mtp, or a bundled model

Modelled: acceptance as a chance that is the same for every guess, unless it is told by position. Ignored: drafts that end early, trees.
"""

from __future__ import annotations

from ...base.errors import InputError
from ...sim.offload.drafting.draft import MTP, NGRAM, Drafting
from ...specs.drafting import Acceptance, read_acceptance, yielding
from ...specs.models import ModelSpec
from ...specs.models.load import load_model
from .machine import NotExpressible
from .rows import Report

_PER_CENT = 1.5
"""A share above this is per cent."""


def drafts_anything(report: Report) -> bool:
    """Return whether a report's decode steps verify guesses."""
    return bool(report.number("workload", "draft_tokens"))


def drafting_of(report: Report, model: ModelSpec, assumed: list[str]) -> Drafting | None:
    """Return how a report's decode steps are drafted, None where they are not; raises NotExpressible with the reason."""
    length = report.number("workload", "draft_tokens")
    if not length or not report.decodes:
        return None
    if length != int(length):
        raise NotExpressible("workload.draft_tokens is no count")
    try:
        return _made(report, model, int(length), assumed)
    except InputError as error:
        raise NotExpressible(str(error)) from None


def _made(report: Report, model: ModelSpec, length: int, assumed: list[str]) -> Drafting:
    work = report.part("workload")
    kind = work.get("draft")
    if kind is None:
        assumed.append(f"workload.draft: {NGRAM}")
    acceptance = _acceptance(report, length)
    if kind in (None, NGRAM, MTP):
        return Drafting(length=length, acceptance=acceptance, mtp=kind == MTP)
    found = Drafting(length=length, acceptance=acceptance, model=load_model(str(kind)))
    found.check(model)
    return found


def _acceptance(report: Report, length: int) -> Acceptance:
    told = report.part("workload").get("acceptance")
    if isinstance(told, list):
        return read_acceptance(told, "workload.acceptance")
    tokens, share = report.number("workload", "tokens_per_step"), report.number("workload", "acceptance")
    if tokens is None and share is None:
        raise NotExpressible("drafting, and how many guesses are accepted is not stated")
    if tokens is None and share is not None:
        tokens = 1 + length * (share / 100 if share > _PER_CENT else share)
    return yielding(length, float(tokens or 1))
