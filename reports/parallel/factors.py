"""What each decision is worth, on the page: the table whose shares add up, and every combination.

Modelled: the plan document's `factors`. Ignored: how shares are found (`planner.parallel.factors`).
"""

from __future__ import annotations

from typing import Any

from .. import numbers
from ..page import Column, Plot, fold, paragraph, table
from .plan_document import Document


def gain_words(one: Document) -> str:
    """Return a change with its doubt and what that means: "−20.3 % ± 4.7, pays"."""
    doubt = numbers.percent(one["uncertainty_fraction"]).removesuffix(" %")
    return f"{numbers.percent(one['change_fraction'], signed=True)} ± {doubt}, {one['verdict']}"


def factor_parts(document: Document) -> tuple[str | Plot, ...]:
    """Return the table of factors, what it says, and all combinations."""
    factors: Any = document["factors"]
    base = factors["baseline"]
    rows = [
        (one["factor"], f"{one['off']} → {one['on']}", *(gain_words(one[part]) for part in ("alone", "last", "share")))
        for one in factors["rows"]
    ]
    rows.append(("all together", "", "", "", gain_words(factors["whole"])))
    rows.append(("whole less each alone", "", gain_words(factors["interaction"]), "", ""))
    columns = (
        Column(title="Decision", is_name=True), Column(title="From → to"), Column(title="Alone", is_number=True),
        Column(title="Beside all others", is_number=True), Column(title="Share", is_number=True),
    )  # fmt: skip
    text = (
        f"Changes of a step of {numbers.seconds(base['step_s'])}: {base['description']}. A share is the mean of what a decision changes "
        "over all orders of making them; shares add up to the whole. Errors that both sides have in common are left out of the doubt: "
        "a change within it is undecided."
    )
    if factors.get("fixed"):
        text += (
            f" {document['target']} decides itself: "
            + ", ".join(f"{name} ({does})" for name, does in factors["fixed"].items())
            + "."
        )
    each = [
        (" + ".join(one["on"]) or "none", numbers.seconds(one["step_s"]),
         numbers.percent(one["step_s"] / base["step_s"] - 1, signed=True), f"{one['max_over_mean_load']:.3f}",
         "yes" if not one["missing_bytes"] else f"{one['missing_bytes']:,} bytes are missing")
        for one in factors["combinations"]
    ]  # fmt: skip
    headings = (
        Column(title="Decisions made", is_name=True), Column(title="Step", is_number=True), Column(title="Change", is_number=True),
        Column(title="Fullest over mean", is_number=True), Column(title="Fits", is_number=True),
    )  # fmt: skip
    return (
        table(columns, rows, marked=frozenset({len(rows) - 2})),
        paragraph(text, "note"),
        fold(f"All {len(each)} combinations", table(headings, each)),
    )
