"""The report of an offload plan: one page that answers first and proves afterwards.

Modelled: the plan document (plan.json) and, where they are given, timeline rows, hit-rate curves and the machine's profile; a
section whose data is absent says so or is left out, nothing is made up. Ignored: how the page is drawn (`page`, `figures_*`).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ...base.text_files import write_atomic
from ...sim.timeline import Timeline
from ...specs.machines.profile import Profile
from ...specs.plans.document import OFFLOAD, check_plan
from .. import numbers
from ..page import Column, Plot, Section, bullet_list, code_block, figures_row, paragraph, render, table
from ..sources import machine_parts, set_by_user, set_words
from ..timelines.lanes import excerpt, lanes_plot, waiting_fraction
from .describe import one_phrase, option_rows
from .drafting import drafting_sections
from .hit_curves import HitCurve
from .memory import front_plot, hit_rate_plot
from .speed import CHOSEN, Document, Entry, entries, interval_text, speed_of, speed_words, told_by
from .speeds import share_plot, speed_plot

_BOUNDS = {
    "copy": "copies",
    "compute": "compute",
    "launch": "launching kernels",
    "cpu": "the host's cores",
    "host": "the host",
    "disk": "the disk",
}


def plan_report(document: Document, *, timeline: Timeline | pd.DataFrame | None = None, lru_curve: HitCurve | None = None,
                belady_curve: HitCurve | None = None, profile: Profile | None = None, command: Sequence[str] | str | None = None,
                more_sections: Sequence[Section] = (), first_sections: Sequence[Section] = (),
                request_sections: Sequence[Section] = ()) -> str:  # fmt: skip
    """Return the HTML of a plan's report.

    document: a plan as `plan_to_dict` gives it or plan.json holds it. timeline: rows of the chosen schedule. lru_curve,
    belady_curve: hit rate by cache size (`hit_curves`). profile: the machine, for the table of constants. command: what
    makes this plan again, as arguments or as typed; reconstructed from the document where None, with `TRACE` for the file.
    more_sections: shown before the assumptions (for instance predicted against measured); first_sections: before all others;
    request_sections: after the speeds (`request`).
    Raises InputError for a document that is not an offload plan.
    """
    check_plan(document, OFFLOAD)
    every = entries(document)
    frame = timeline.frame() if isinstance(timeline, Timeline) else timeline
    curves = [curve for curve in (lru_curve, belady_curve) if curve is not None]
    trace = document["provenance"]["trace"]
    sections = [
        *first_sections,
        _speed(document, every),
        *request_sections,
        *drafting_sections(document),
        Section(id="time", title="Where the time goes", parts=(share_plot(every),)),
    ]
    if frame is not None and len(frame):
        sections.append(_lanes(frame))
    if curves:
        hits = hit_rate_plot(curves, every, num_layers=trace["num_layers"], num_experts=trace["num_experts"])
        sections.append(Section(id="hits", title="Hit rate against cache size", parts=(hits,)))
    sections += [
        Section(id="front", title="What memory buys", parts=(front_plot(document, every),)),
        Section(id="schedule", title="The chosen schedule", parts=(_options(every),)),
        Section(
            id="memory_breakdown", title="Where the memory goes", parts=(_memory_breakdown(document), *_cards(document))
        ),
        *more_sections,
        _assumptions(document, every, profile),
        _provenance(document, command),
    ]
    origin = document["provenance"]
    title = f"{origin['model']} on {origin['hardware']} with {numbers.size(origin['memory_bytes'])} of device memory"
    return render(
        title=title,
        lead=_lead(document, every),
        sections=sections,
        footer=f"Made by {origin['produced_by']}. This file is complete: it opens without a network.",
    )


def write_plan_report(path: str | os.PathLike[str], document: Document, *, timeline: Timeline | pd.DataFrame | None = None,
                      lru_curve: HitCurve | None = None, belady_curve: HitCurve | None = None, profile: Profile | None = None,
                      command: Sequence[str] | str | None = None, more_sections: Sequence[Section] = (),
                      first_sections: Sequence[Section] = (), request_sections: Sequence[Section] = ()) -> str:  # fmt: skip
    """Write the report of a plan and return its path; raises InputError where it cannot be written."""
    text = plan_report(document, timeline=timeline, lru_curve=lru_curve, belady_curve=belady_curve, profile=profile,
                       command=command, more_sections=more_sections, first_sections=first_sections,
                       request_sections=request_sections)  # fmt: skip
    write_atomic(path, text)
    return os.fspath(path)


# --- the answer ------------------------------------------------------------------------------------------------------


def _lead(document: Document, every: Sequence[Entry]) -> list[str]:
    best = document["best"]
    told = told_by(document)
    answer = f"{numbers.significant(speed_of(best, told))} {speed_words(best, told)} predicted, {interval_text(best, told)} likely"
    per_token = best["bytes_copied"] / max(best["num_tokens"], 1)
    gap = document["optimality_gap"]
    key = [
        *_speeds(best),
        ("Step, median", numbers.seconds(best["step_s"]["p50"])),
        ("Step, 99th percentile", numbers.seconds(best["step_s"]["p99"])),
        ("Hit rate", numbers.percent(best["hit_rate"])),
        ("Copied a token", numbers.size(per_token)),
        ("What binds", _BOUNDS.get(best["bound"], best["bound"])),
        ("Device memory used", numbers.size(best["memory_breakdown"]["device_bytes"])),
        ("Above the lower bound", numbers.percent(gap) if gap is not None and gap != float("inf") else "unknown"),
        ("Schedules considered", f"{document['num_candidates']:,}"),
    ]
    return [
        paragraph(answer, "answer"),
        paragraph(_sentence(one_phrase(every[0].schedule))),
        paragraph(_sentence(document["verdict"]), "verdict"),
        figures_row(key),
    ]


def _speeds(best: Document) -> list[tuple[str, str]]:
    """Return every speed and time of the chosen schedule that its window has, with its interval."""
    found = []
    for name, title, shown in (
        ("prefill_tokens_per_s", "Prompts, tokens/s", numbers.significant), ("ttft_s", "To the first token", numbers.seconds),
        ("decode_tokens_per_s", "Decoding, tokens/s", numbers.significant), ("request_s", "A whole request", numbers.seconds),
        ("requests_per_s", "Requests a second", numbers.significant), ("window_s", "The whole window", numbers.seconds),
    ):  # fmt: skip
        if best.get(name) is not None and not (name == "requests_per_s" and best["request_s"] == best["window_s"]):
            low, high = best[f"{name}_interval"]
            found.append((title, f"{shown(best[name])} ({shown(low)} to {shown(high)})"))
    return found


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


# --- sections --------------------------------------------------------------------------------------------------------


def _speed(document: Document, every: Sequence[Entry]) -> Section:
    misfits = document["baselines_that_do_not_fit"]
    raced_out, skipped = document.get("num_raced_out", 0), document.get("num_skipped", 0)
    search = (
        f"{document['num_candidates']:,} schedules were considered: {document['num_evaluated']:,} simulated to the end, "
        f"{document['num_abandoned']:,} until they could no longer win, {document['num_pruned']:,} ruled out beforehand by a "
        f"bound on their time"
        + (f", {raced_out:,} given up after a part of the window, too far behind" if raced_out else "")
        + (f", {skipped:,} not looked at, since the time given was over" if skipped else "")
        + ". No schedule of the space can have a mean forward pass, prompts included, below "
        + f"{numbers.seconds(document['lower_bound_step_s'])}."
    )
    told = told_by(document)
    parts: list[str | Plot] = [speed_plot(every, told), paragraph(search), _comparison(every, told)]
    if misfits:
        rows = [(name, _sentence(reason)) for name, reason in misfits.items()]
        parts += [
            "<h3>Published schedules that could not run</h3>",
            table([Column(title="Schedule"), Column(title="Why")], rows),
        ]
    return Section(id="speed", title="How fast every schedule is", parts=tuple(parts))


def _comparison(every: Sequence[Entry], told: str | None) -> str:
    """Return the figures of every schedule, one row each."""
    speed = _sentence(speed_words(every[0].result, told))[:-1]
    headings = (speed, "Interval", "Whole window", "Step p50", "Step p99", "Hits", "Fetched ahead", "of it used", "in time",
                "Copied a token", "Device memory")  # fmt: skip
    columns = [Column(title="Schedule", is_name=True), *(Column(title=text, is_number=True) for text in headings)]
    marked = frozenset(at for at, entry in enumerate(every) if entry.kind == CHOSEN)
    legend = (
        "Whole window: the time of all forward passes, prompts and answers, which is what schedules are ranked by. "
        "Hits: experts found on the device, fetched ahead or kept, when their layer was decided. Used: share of what was fetched "
        "ahead that was needed. In time: share of those hits whose bytes had arrived by then."
    )
    rows = [_comparison_row(entry, told) for entry in every]
    found = table(columns, rows, marked=marked, headings=[entry.heading for entry in every]) + paragraph(legend, "note")
    needing = [(entry.label, _sentence(entry.needs)) for entry in every if entry.needs]
    if needing:
        found += "<h3>† What some of them need</h3>" + table(
            [Column(title="Schedule", is_name=True), Column(title="Needs")], needing
        )
    return found


def _comparison_row(entry: Entry, told: str | None) -> tuple[str, ...]:
    one = entry.result
    ahead = one["prefetches"]
    return (
        entry.label,
        numbers.significant(speed_of(one, told)),
        interval_text(one, told),
        numbers.seconds(one["window_s"]),
        numbers.seconds(one["step_s"]["p50"]),
        numbers.seconds(one["step_s"]["p99"]),
        numbers.percent(one["hit_rate"]),
        f"{ahead:,}" if ahead else "–",
        _share(one["prefetches_used"], ahead),
        _share(one["ready_hits"], one["guessed_hits"]),
        numbers.size(one["bytes_copied"] / max(one["num_tokens"], 1)),
        numbers.size(one["memory_breakdown"]["device_bytes"]),
    )


def _share(part: int, whole: int) -> str:
    return numbers.percent(part / whole) if whole else "–"


def _lanes(frame: pd.DataFrame) -> Section:
    part = excerpt(frame)
    idle = numbers.percent(waiting_fraction(part), 0)
    caption = (
        f"{_sentence(part.words)[:-1]} of the chosen schedule, ordinary ones with the cache warm. In them the compute stream "
        f"stands idle for {idle} of the time. The plot opens on the first step; the buttons above it zoom and move, dragging "
        "across a stretch enlarges it, a double click goes back and a second one shows all. Point at a bar for its layer, expert "
        "and bytes. Dotted lines separate steps."
    )
    return Section(id="lanes", title="A few steps, lane by lane", parts=(lanes_plot([("", part)], caption=caption),))


def _options(every: Sequence[Entry]) -> str:
    return table([Column(title="Decision"), Column(title="Choice")], option_rows(every[0].schedule))


def _memory_breakdown(document: Document) -> str:
    """Return what takes device and host memory, item by item, each place with its sum."""
    budget = document["provenance"]["memory_bytes"]
    rows: list[tuple[str, str, str, str]] = []
    sums = []
    for place in ("device", "host"):
        items = [item for item in document["best"]["memory_breakdown"]["items"] if item["place"] == place]
        total = sum(item["bytes"] for item in items)
        rows += [
            (item["name"], numbers.size(item["bytes"]), _share(item["bytes"], total), item["note"]) for item in items
        ]
        if items:
            sums.append(len(rows))
            left = (
                f"{numbers.size(budget - total)} of the budget of {numbers.size(budget)} are left"
                if place == "device"
                else ""
            )
            rows.append((f"{place} memory, together", numbers.size(total), "", left))
    columns = (
        Column(title="Item", is_name=True), Column(title="Size", is_number=True), Column(title="Share", is_number=True),
        Column(title="How it comes about"),
    )  # fmt: skip
    return table(columns, rows, sums=frozenset(sums))


def _cards(document: Document) -> list[str]:
    """Return what each of several cards holds; nothing for one card."""
    cards = document["best"].get("cards")
    if not cards:
        return []
    rows = []
    for card in cards:
        layers, budget = card["layers"], card["budget_bytes"]
        held = f"{layers[0]} to {layers[-1]}" if layers else "none"
        sizes = {item["name"]: item["bytes"] for item in card["items"]}
        parts = [numbers.size(sizes.get(name, 0)) for name in ("resident experts", "dense weights", "kv cache")]
        ends = numbers.size(card["bytes"]), numbers.size(budget - card["bytes"])
        rows.append((f"{card['card']}: {card['name']}", held, f"{card['resident_experts']:,}", *parts, *ends))
    columns = (
        Column(title="Card", is_name=True), Column(title="Layers"), Column(title="Experts", is_number=True),
        Column(title="Their size", is_number=True), Column(title="Dense weights", is_number=True),
        Column(title="Keys and values", is_number=True), Column(title="Together", is_number=True), Column(title="Left", is_number=True),
    )  # fmt: skip
    return ["<h3>Card by card</h3>", table(columns, rows)]


def _assumptions(document: Document, every: Sequence[Entry], profile: Profile | None) -> Section:
    parts: list[str] = [
        "<h3>Of the chosen schedule</h3>",
        bullet_list(_sentence(text) for text in document["best"]["assumptions"]),
    ]
    shared = set(document["best"]["assumptions"])
    others = [
        (entry.title, _sentence(text))
        for entry in every[1:]
        for text in entry.result["assumptions"]
        if text not in shared
    ]
    if others:
        parts += [
            "<h3>Of the others, besides</h3>",
            table([Column(title="Schedule"), Column(title="Assumption")], others),
        ]
    parts += machine_parts(profile)
    return Section(id="assumptions", title="Assumptions and sources", parts=tuple(parts))


def _provenance(document: Document, command: Sequence[str] | str | None) -> Section:
    origin, request, best = document["provenance"], document["request"], document["best"]
    trace = origin["trace"]
    window = (
        f"the first {origin['window_steps']:,} forward passes"
        if origin["window_steps"] is not None
        else "the whole recording"
    )
    rows = [
        ("Made by", origin["produced_by"]),
        ("Model", origin["model"]),
        ("Machine", origin["hardware"]),
        ("Device memory", f"{numbers.size(origin['memory_bytes'])} ({origin['memory_bytes']:,} bytes)"),
        ("Recording", f"{trace['source']}; {trace['num_tokens']:,} tokens"),
        ("Routing", f"{trace['num_layers']} layers, {trace['num_experts']} experts each, {trace['top_k']} a token"),
        ("Window", f"{window}: {best['num_steps']:,} passes, {best['num_tokens']:,} tokens"),
        ("Objective", request["objective"].replace("_", " ")),
        ("Weight formats allowed", ", ".join(request["bits"])),
        ("Engine of the chosen schedule", best["engine"]),
        *(("Set by the user", setting) for setting in set_by_user(document)),
    ]
    text = (
        command if isinstance(command, str) else shlex.join(command) if command is not None else plan_command(document)
    )
    parts = (
        table([Column(title="What"), Column(title="Value")], rows),
        "<h3>To make this plan again</h3>",
        code_block(text),
    )
    return Section(id="provenance", title="Provenance", parts=parts)


def _length_words(listed: Mapping[str, Any]) -> list[str]:
    """Return the options that describe a plan's requests, with `LENGTHS` for the file of those that differ."""
    if isinstance(listed["prompt_tokens"], list):
        return ["--lengths", "LENGTHS", "--requests", str(listed["requests"])]
    said = {"--prompt-tokens": listed["prompt_tokens"], "--reply-tokens": listed["reply_tokens"]}
    said |= {"--cached-tokens": listed["cached_tokens"]} if listed.get("cached_tokens") else {}
    return [word for option, value in said.items() for word in (option, str(value))]


def plan_command(document: Document) -> str:
    """Return the command that makes a plan document again, with `TRACE` for the recording's file."""
    origin, request, asked = document["provenance"], document["request"], document.get("asked") or {}
    words = [
        "moeplan",
        "plan",
        "--model",
        asked.get("model", origin["model"]),
        "--hardware",
        asked.get("hardware", origin["hardware"]),
    ]
    listed = asked.get("prior") or asked.get("segments")
    words += _length_words(listed) if listed else []
    words += [] if asked.get("prior") else ["--trace", "TRACE"]
    served = document.get("for")
    for name in ("engine", "quant", "context"):
        if asked.get(name) is not None:
            words += [f"--{name}" if served is None or name != "engine" else "--for", str(asked[name])]
    if asked.get("kv_type", "f16") != "f16":
        words += ["--kv-type", asked["kv_type"]]
    words += ["--memory", f"{origin['memory_bytes']}B"]
    words += ["--bits", ",".join(request["bits"])]
    if request["objective"] != ("request_s" if asked.get("prior") else "tokens_per_s"):
        words += ["--objective", request["objective"]]
    if request["floor_tokens_per_s"] is not None:
        words += ["--floor", f"{request['floor_tokens_per_s']:g}"]
    for name in ("ttft", "tpot"):
        if request.get(f"{name}_s") is not None:
            words += [f"--{name}", f"{request[f'{name}_s']:g}s"]
    if request["concurrency"] != 1:
        words += ["--concurrency", str(request["concurrency"])]
    if request["prefill_chunk_tokens"] is not None and (served is None or asked.get("ubatch") is not None):
        words += ["--ubatch", str(request["prefill_chunk_tokens"])]
    own = ("bits", "objective", "floor_tokens_per_s", "concurrency", "prefill_chunk_tokens", "ttft_s", "tpot_s")
    words += set_words(document, own)
    if (
        "dense_bits" in origin and asked.get("quant") is None
    ):  # named even where it is the default, which depends on the model
        words += ["--dense-bits", origin["dense_bits"]]
    if origin["window_steps"] is not None:
        words += ["--window", str(origin["window_steps"])]
    return shlex.join([*words, "-o", "plan.json"])
