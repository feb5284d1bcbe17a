"""What serving a plan means, on the page: what users wait for, where a rank's memory goes, whether rebalancing pays over time.

Modelled: the plan document's `latency`, `memory` and `period`; a document of a version that had none of them has no such section.
Ignored: how the figures come about (`planner.parallel`).
"""

from __future__ import annotations

from html import escape
from typing import Any

from ...planner.parallel.period.moves import WAY_WORDS
from .. import numbers
from ..bars import lying_figure, rows_under, stacked
from ..page import Column, Plot, Section, figures_row, paragraph, table
from ..style import BLUE, LIGHT_GREY, VERMILION, axis, lying_bars
from .factors import gain_words
from .plan_document import Document


def serving_section(document: Document) -> list[Section]:
    """Return the section on users, batches and memory of a GPU."""
    if "memory" not in document or "latency" not in document:
        return []
    parts: list[str | Plot] = [figures_row(_rates(document)), *_limits(document), "<h3>Memory of each GPU</h3>"]
    parts.append(_memory(document))
    return [Section(id="serving", title="What users wait for, and what fits", parts=tuple(parts))]


def drafting_section(document: Document) -> list[Section]:
    """Return the section on draft lengths, where they were chosen."""
    drafting = document.get("drafting")
    if drafting is None or not drafting["tried"]:
        return []
    columns = (
        Column(title="Guesses a step", is_number=True), Column(title="Tokens a step", is_number=True),
        Column(title="A step", is_number=True), Column(title="A further token", is_number=True),
        Column(title="Generated tokens/s", is_number=True), Column(title="Pays from this share accepted", is_number=True),
        Column(title="How it was found"),
    )  # fmt: skip
    rows = []
    for one in drafting["tried"]:
        step, tpot, speed, pays = (one[name] for name in ("step_s", "tpot_s", "tokens_per_s", "pays_from"))
        rows.append((
            str(one["length"]), numbers.significant(one["tokens_per_step"]), "–" if step is None else numbers.seconds(step),
            "–" if tpot is None else numbers.seconds(tpot), "–" if speed is None else numbers.significant(speed),
            "–" if not one["length"] else "none" if pays is None else numbers.percent(pays, 0),
            one["why"] or ("searched" if one["searched"] else "estimated"),
        ))  # fmt: skip
    legend = (
        "Estimated: with the schedule that did best without drafts, at the same batch. What a step takes does not depend on how many of "
        "the tokens that it checks are accepted: a length pays once enough of its guesses are."
    )
    chosen = frozenset(at for at, one in enumerate(drafting["tried"]) if one["length"] == drafting["length"])
    verdict = str(drafting["verdict"])
    parts = (
        paragraph(f"{verdict[:1].upper()}{verdict[1:]}."),
        table(columns, rows, marked=chosen) + paragraph(legend, "note"),
    )
    return [Section(id="drafting", title="Does drafting pay?", parts=parts)]


def _rates(document: Document) -> list[tuple[str, str]]:
    """Return the key figures of serving: rates, drafts, and the largest batch."""
    request, best, waits = document["request"], document["best"], document["latency"]
    ranks = request["num_nodes"] * request["ranks_per_node"]
    drafted, most = request.get("draft_tokens") or 0, document["largest_tokens_per_rank"]
    found = [("Tokens a second of a GPU", numbers.significant(waits["tokens_per_s"] / ranks))]
    if waits["tpot_s"] is not None:
        found.append(("Tokens a second of a user", numbers.significant(1 / waits["tpot_s"])))
        found.append(("A further token", numbers.seconds(waits["tpot_s"])))
    if waits["ttft_s"] is not None:
        found.append(("First token, without a queue", numbers.seconds(waits["ttft_s"])))
    if drafted:
        found.append(("Drafts", f"{drafted} checked, {document['tokens_a_step']:.3g} tokens a step"))
    if waits["prompt_step_s"] is not None:
        found.append(("Prompts", f"{numbers.percent(waits['prompt_share'], 0)} of all tokens"))
        found.append(("A step of prompts", numbers.seconds(waits["prompt_step_s"])))
        found.append(("A step of decoding alone", numbers.seconds(best["step_s"])))
    each = most // (drafted + 1)
    what = "sequences" if drafted else "tokens"
    found.append(("Most that fit", f"{each:,} {what} a GPU, {each * ranks:,} in all"))
    return found


def _limits(document: Document) -> list[str]:
    """Return a table of the limits on waiting that were asked for; none where none were."""
    request, waits = document["request"], document["latency"]
    rows = []
    for name, key in (("First token", "ttft_s"), ("Further token", "tpot_s")):
        limit, value = request.get(key), waits[key]
        if limit is None or value is None:
            continue
        kept = "kept" if value <= limit else "missed"
        rows.append((name, numbers.seconds(limit), numbers.seconds(value), kept))
    if not rows:
        return []
    columns = (Column(title="Limit", is_name=True), Column(title="At most", is_number=True), Column(title="Predicted", is_number=True),
               Column(title=""))  # fmt: skip
    found = [table(columns, rows)]
    if waits["largest_within"] is not None:
        found.append(
            paragraph(
                f"At most {waits['largest_within']:,} sequences on each GPU keep {numbers.seconds(request['tpot_s'])} a token."
            )
        )
    return found


def _memory(document: Document) -> str:
    """Return what takes a GPU's memory, item by item, and what is left."""
    memory, budget = document["memory"], document["memory_budget_bytes"]
    items = [item for item in memory["items"] if item["bytes"]]
    total = memory["device_bytes"]
    rows = [
        (item["name"], numbers.size(item["bytes"]), numbers.percent(item["bytes"] / budget), item["note"])
        for item in items
    ]
    rows.append(
        (
            "together",
            numbers.size(total),
            numbers.percent(total / budget),
            f"of {numbers.size(budget)}; {numbers.size(budget - total)} are left",
        )
    )
    columns = (Column(title="Item", is_name=True), Column(title="Size", is_number=True), Column(title="Of the GPU's", is_number=True),
               Column(title="How it comes about"))  # fmt: skip
    return table(columns, rows, sums=frozenset({len(rows) - 1}))


def period_section(document: Document) -> list[Section]:
    """Return the section on rebalancing while serving; none where no period was given."""
    period: Any = document.get("period")
    if period is None:
        return []
    rows = [
        (one["words"], numbers.seconds(one["whole_s"]), "" if one["policy"] == "never" else gain_words(one),
         "" if one["pays_from_step"] is None or one["policy"] == "never" else f"{one['pays_from_step']:,}",
         f"{one['max_over_mean_load']:.3f}", f"{one['num_rearrangements']:,}", numbers.seconds(one["stalled_s"]),
         numbers.seconds(one["longest_pause_s"]), numbers.seconds(one["counting_s"]))
        for one in period["policies"]
    ]  # fmt: skip
    headings = (
        "The period takes",
        "Change",
        "Pays from step",
        "Fullest over mean",
        "Rearranged",
        "Stalled",
        "Longest pause",
        "Counting",
    )
    columns = [Column(title="Policy"), *(Column(title=text, is_number=True) for text in headings)]
    fastest = min(range(len(rows)), key=lambda at: float(period["policies"][at]["whole_s"]))
    text = (
        f"{period['num_steps']:,} steps ({period['num_tokens']:,} tokens) in {period['num_windows']} "
        f"{'window' if period['num_windows'] == 1 else 'windows'} served after what the plan was made from, under one schedule: "
        f"{period['schedule']}."
    )
    words = str(period["words"])
    legend = (
        "Stalled: serving stands still while experts move, or is slowed while they move beside it. Counting: what collecting the counts "
        "costs. Changes are against never rearranging, with the doubt that is not common to both."
    )
    parts = (
        paragraph(f"{words[:1].upper()}{words[1:]}."),
        paragraph(text),
        _period_plot(period),
        table(columns, rows, marked=frozenset({fastest})),
        paragraph(legend, "note"),
    )
    return [Section(id="period", title="Does rebalancing pay over time", parts=parts)]


def _bar_words(one: Any) -> tuple[str, str]:
    """Return (heading, title) of a policy's bar: an interval and how experts move, short enough to stand beside it."""
    if one["policy"] in ("every", "once-then-every"):
        first = "once before, then every" if one["policy"] == "once-then-every" else "rearranged every"
        return f"{first} {one['every_steps']:,} steps", WAY_WORDS.get(one["moves"], str(one["moves"]))
    return "nothing moves while serving", {"never": "never", "once": "once, before"}.get(one["policy"], one["policy"])


def _period_plot(period: Any) -> Plot:
    """Return what the period takes under every policy: steps, what collecting counts costs, and stalls."""
    every = period["policies"]
    headings, titles = zip(*(_bar_words(one) for one in every), strict=True)
    rows = rows_under(headings)
    kinds = (("steps", "steps_s", BLUE), ("counting", "counting_s", LIGHT_GREY), ("stalled", "stalled_s", VERMILION))
    data = []
    for name, key, colour in kinds:
        hover = [
            f"<b>{escape(title)}</b><br>{name}: {numbers.seconds(one[key])} of {numbers.seconds(one['whole_s'])}"
            for title, one in zip(titles, every, strict=True)
        ]
        data.append(
            lying_bars([float(one[key]) for one in every], rows.bars, hover, name=name, marker={"color": colour})
        )
    most = max(float(one["whole_s"]) for one in every)
    never = float(every[0]["whole_s"])
    texts = [
        numbers.percent(one["whole_s"] / never - 1, signed=True) if at else numbers.seconds(never)
        for at, one in enumerate(every)
    ]
    figure = stacked(lying_figure(titles, rows, texts, "", axis("the period, s", range=[0, most * 1.02]), data))
    return Plot(
        id="plot-period",
        figure=figure,
        height_px=rows.height_px(130),
        title="What the served period takes under every policy",
        caption="Steps, counting and stalls add up to the period. The right column is the change against never rearranging.",
    )
