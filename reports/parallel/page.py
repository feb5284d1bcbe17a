"""The report of an expert-parallel plan: is it worth it, what moves, what every link and rank carries, and how sure that is.

Modelled: the plan document (plan.json) and, where they are given, timelines of its first reported step and the machine's
profile; a section whose data is absent says so or is left out, nothing is made up. Ignored: how the page is drawn.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from ...base.text_files import write_atomic
from ...sim.parallel.timeline import EpTimeline
from ...specs.machines.profile import Profile
from .. import numbers
from ..page import Column, Plot, Section, bullet_list, code_block, figures_row, fold, paragraph, render, table
from ..sources import machine_parts, set_by_user, set_words
from ..timelines.ranks import ranks_plot
from .describe import parallel_rows
from .factors import factor_parts
from .placement import balance_plot, expert_plot, layer_names, load_plot, rank_table_rows
from .plan_document import PLAIN, Document, check_parallel_document, placement_of, plain_of, schedule_of
from .rivals import INGREDIENTS, ablation_plot, schedules, staleness_plot, steps_plot
from .serving import drafting_section, period_section, serving_section
from .traffic import reduction_bytes, traffic_plot, traffic_table_rows

_CHANGES = (Column(title=""), Column(title="Before", is_number=True), Column(title="After", is_number=True))


def parallel_report(document: Document, *, before: EpTimeline | None = None, after: EpTimeline | None = None,
                    profile: Profile | None = None, command: Sequence[str] | str | None = None) -> str:  # fmt: skip
    """Return the HTML of an expert-parallel plan's report.

    document: a plan as `ep_plan_to_dict` gives it or plan.json holds it. before, after: rows of the first reported step under
    plain expert parallelism and under the plan. profile: the machine, for the table of constants. command: what makes this plan
    again; reconstructed from the document where None, with `TRACE` for the file. Raises InputError for a document that is no
    expert-parallel plan.
    """
    check_parallel_document(document)
    sections = [
        _speed(document),
        *serving_section(document),
        *drafting_section(document),
        _decisions(document),
        _ingredients(document),
        _load(document),
        _experts(document),
        _traffic(document),
    ]
    if after is not None and len(after.rows):
        sections.append(_timeline(document, before, after))
    sections += [
        _moving(document),
        *period_section(document),
        _assumptions(document, profile),
        _provenance(document, command),
    ]
    origin, request = document["provenance"], document["request"]
    nodes, ranks_per_node = request["num_nodes"], request["ranks_per_node"]
    ranks = f"{nodes} × {ranks_per_node} ranks" if nodes > 1 else f"{ranks_per_node} ranks of one node"
    title = f"{origin['model']} on {ranks} of {origin['hardware']}, {'prefill' if request['prefill'] else 'decode'}"
    return render(title=title, lead=_lead(document), sections=sections,
                  footer=f"Made by {origin['produced_by']}. This file is complete: it opens without a network.")  # fmt: skip


def write_parallel_report(path: str | os.PathLike[str], document: Document, *, before: EpTimeline | None = None,
                          after: EpTimeline | None = None, profile: Profile | None = None,
                          command: Sequence[str] | str | None = None) -> str:  # fmt: skip
    """Write the report of an expert-parallel plan and return its path; raises InputError where it cannot be written."""
    write_atomic(path, parallel_report(document, before=before, after=after, profile=profile, command=command))
    return os.fspath(path)


# --- the answer ------------------------------------------------------------------------------------------------------


def headline(document: Document) -> str:
    """Return the verdict in a few words: whether to do it, and what a step becomes."""
    best, rival, verdict = document["best"], document["headline"], str(document["verdict"])
    change = numbers.percent(float(best["step_s"]) / float(rival["step_s"]) - 1, signed=True)
    words = str(rival["words"])
    steps = f"{numbers.seconds(best['step_s'])} a step instead of {numbers.seconds(rival['step_s'])} ({change})"
    if verdict.startswith("stay with"):
        return f"{words[:1].upper()}{words[1:]}: {steps}"
    what = "Worth it, but leave the experts where they are" if "without moving" in verdict else "Worth it"
    return f"{what}: {words}, {steps}"


def _lead(document: Document) -> list[str]:
    best, plain, moved = document["best"], plain_of(document), document["migration"]
    steps = moved["steps_to_pay_back"]
    gap = document["optimality_gap"]
    key = [
        ("Step, interval", _interval(best)),
        ("Tokens a second", numbers.significant(best["tokens_per_s"])),
        ("Fullest rank over the mean", f"{plain['max_over_mean_load']:.2f} → {best['max_over_mean_load']:.2f}"),
        ("What binds", {"exchange": "exchanges"}.get(best["bound"], best["bound"])),
        ("Between nodes a step", f"{numbers.size(plain['inter_node_bytes'])} → {numbers.size(best['inter_node_bytes'])}"),
        ("Inside nodes a step", f"{numbers.size(plain['intra_node_bytes'])} → {numbers.size(best['intra_node_bytes'])}"),
        ("Pays back after", "never" if steps is None else "nothing to move" if not moved["num_experts"] else f"{steps:,} steps"),
        ("Above the lower bound", numbers.percent(gap) if gap != float("inf") else "unknown"),
    ]  # fmt: skip
    return [
        paragraph(headline(document), "answer"),
        paragraph(_sentence(document["verdict"]), "verdict"),
        figures_row(key),
    ]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _interval(one: Document) -> str:
    step, part = float(one["step_s"]), float(one["relative_uncertainty"])
    return f"{numbers.seconds(step * (1 - part))} to {numbers.seconds(step * (1 + part))}"


# --- sections --------------------------------------------------------------------------------------------------------


def _speed(document: Document) -> Section:
    origin = document["provenance"]
    search = (
        f"{document['num_candidates']:,} schedules were compared on requests that no placement had seen. No placement or overlap "
        f"can have a step below {numbers.seconds(document['lower_bound_step_s'])}: dense parts, and experts level over all ranks."
        if origin["trace"]["kind"] == "routing"
        else f"{document['num_candidates']:,} schedules were compared on expected traffic. No placement or overlap can have a step below "
        f"{numbers.seconds(document['lower_bound_step_s'])}: dense parts, and experts level over all ranks."
    )
    parts: list[str | Plot] = [steps_plot(document), paragraph(search), _comparison(document)]
    if document["baselines_left_out"]:
        rows = [(name, _sentence(reason)) for name, reason in document["baselines_left_out"].items()]
        parts += [
            "<h3>Schedules that could not be simulated</h3>",
            table([Column(title="Schedule"), Column(title="Why")], rows),
        ]
    return Section(id="speed", title="How fast every schedule is", parts=tuple(parts))


def _comparison(document: Document) -> str:
    every = schedules(document)
    plain_s = float(plain_of(document)["step_s"])
    headings = ("Step", "±", f"Against {PLAIN}", "Kernels", "of them experts", "Exchanges", "Not hidden", "Fullest over mean",
                "Between nodes", "Inside nodes", "Tokens/s")  # fmt: skip
    columns = [Column(title="Schedule", is_name=True), *(Column(title=text, is_number=True) for text in headings)]
    rows = [
        (
            title,
            numbers.seconds(one["step_s"]),
            f"±{numbers.percent(one['relative_uncertainty'], 0)}",
            numbers.percent(float(one["step_s"]) / plain_s - 1, signed=True),
            numbers.seconds(one["compute_s"]),
            numbers.seconds(one["expert_s"]),
            numbers.seconds(one["exchange_s"]),
            numbers.seconds(one["exposed_s"]),
            f"{one['max_over_mean_load']:.3f}",
            numbers.size(one["inter_node_bytes"]),
            numbers.size(one["intra_node_bytes"]),
            numbers.significant(one["tokens_per_s"]),
        )
        for _, title, one in every
    ]
    legend = (
        "Kernels: of the busiest rank. Of them experts: the slowest rank of each stage, which is where imbalance costs. Exchanges: "
        "the slowest port of each. Not hidden: the step without the kernels of its busiest rank. Fullest over mean: rows of the "
        "fullest rank over the mean rank's. Bytes: sent by all ranks in a step."
    )
    what = table(
        [Column(title="Schedule", is_name=True), Column(title="What it does")],
        [(title, str(one["description"])) for _, title, one in every],
    )
    return (
        table(columns, rows, marked=frozenset({0})) + paragraph(legend, "note") + fold("What each of them does", what)
    )


def _decisions(document: Document) -> Section:
    rows = parallel_rows(schedule_of(document, "after"))
    return Section(
        id="plan",
        title="What the plan decides",
        parts=(table([Column(title="Decision"), Column(title="Choice")], rows),),
    )


def _ingredients(document: Document) -> Section:
    rows = [
        (
            INGREDIENTS.get(row["ingredient"], str(row["ingredient"])),
            numbers.seconds(row["step_s"]),
            numbers.percent(row["change_fraction"], signed=True),
        )
        for row in document["ablation"]
        if row["kind"] == "removed"
    ]
    columns = (
        Column(title="The plan without"),
        Column(title="Step", is_number=True),
        Column(title="Change", is_number=True),
    )
    parts = (*factor_parts(document), ablation_plot(document), "<h3>Taken away one at a time</h3>", table(columns, rows),
             paragraph("What an ingredient is worth depends on the others: the two orders need not agree.", "note"))  # fmt: skip
    return Section(id="ingredients", title="What each ingredient adds", parts=parts)


def _load(document: Document) -> Section:
    parts: list[str | Plot] = [*_parallelism_note(document), load_plot(document), balance_plot(document)]
    parts.append(table(_CHANGES, rank_table_rows(document)))
    return Section(id="load", title="What every rank has to do", parts=tuple(parts))


def _experts(document: Document) -> Section:
    placement = placement_of(document, "after")
    copies = placement.replica_counts()
    text = (
        f"{placement.num_slots} slots a layer for {placement.num_logical} experts, {placement.slots_per_rank} on each rank: "
        f"{int((copies > 1).sum(axis=1).mean().round())} experts a layer have copies, at most {int(copies.max())} of one."
        if placement.num_redundant
        else f"{placement.num_slots} slots a layer, one for each expert, {placement.slots_per_rank} on each rank."
    )
    return Section(id="experts", title="Where experts sit", parts=(paragraph(text), expert_plot(document)))


def _parallelism_note(document: Document) -> list[str]:
    """Return a warning where a plan's ranks do not simply compute the experts in their slots."""
    if schedule_of(document, "after").parallel.experts == "expert":
        return []
    return [paragraph("The plan divides experts inside nodes (see above): its maps show where slots are counted; what a rank computes is "
                      "its part of its node's.")]  # fmt: skip


def _traffic(document: Document) -> Section:
    columns = (*_CHANGES, Column(title="Change", is_number=True))
    note = paragraph(
        "Matrices hold what is exchanged. Ranks that share a layer also add up or gather their results among themselves; how that crosses "
        "the links of a node is the library's choice, so only its sum is given.", "note",
    )  # fmt: skip
    shared = any(reduction_bytes(document, state) for state in ("before", "after"))
    parts = (*((note,) if shared else ()), traffic_plot(document), table(columns, traffic_table_rows(document)))
    return Section(id="traffic", title="What every link carries", parts=parts)


def _timeline(document: Document, before: EpTimeline | None, after: EpTimeline) -> Section:
    timelines = [("the plan", after)] if before is None else [("plain expert parallelism", before), ("the plan", after)]
    plot = ranks_plot(
        timelines, ranks_per_node=document["request"]["ranks_per_node"], layer_names=layer_names(document)
    )
    return Section(id="timeline", title="Two layers, rank by rank", parts=(plot,))


def _moving(document: Document) -> Section:
    moved, steps = document["migration"], document["migration"]["steps_to_pay_back"]
    step_s = float(document["best"]["step_s"])
    pays = "never" if steps is None else f"after {steps:,} steps, {numbers.seconds(steps * step_s)} of running"
    rows = [
        (
            "Weights fetched by all ranks together",
            f"{numbers.size(moved['num_bytes'])} ({moved['num_experts']:,} expert weights)",
        ),
        ("The engine stands still for", numbers.seconds(moved["stall_s"])),
        ("Each step then saves, by placement alone", numbers.seconds(moved["saved_s_per_step"])),
        ("Paid back", pays if moved["num_experts"] else "nothing to move"),
    ]
    note = (
        "From the order in which engines load experts. Every rank fetches what it lacks, from its own node where a neighbour holds "
        "it; moving in the background would hide the stall and cost bandwidth instead."
    )
    parts: list[str | Plot] = [
        table((Column(title="Moving there"), Column(title="", is_number=True)), rows),
        paragraph(note, "note"),
    ]
    parts.append("<h3>On requests it was not made for</h3>")
    if document["provenance"]["trace"]["kind"] == "routing":
        fraction = numbers.percent(document["overfit_fraction"], signed=True)
        parts.append(
            paragraph(
                f"A step on the reported requests takes {fraction} against the requests that the placement was made from."
            )
        )
    else:
        parts.append(paragraph("Counts have no requests to hold back: the plan is reported on what it was made from."))
    if document["staleness"]:
        parts += ["<h3>On other recordings</h3>", staleness_plot(document), _staleness_table(document)]
    else:
        parts.append(paragraph("No other recording was given to evaluate the plan on.", "note"))
    return Section(id="moving", title="Moving there, and how it ages", parts=tuple(parts))


def _staleness_table(document: Document) -> str:
    headings = ("Plan against plain", "Plan, fullest over mean", "EPLB made there, fullest over mean")
    columns = [
        Column(title="Recording", is_name=True),
        *(Column(title=text, is_number=True) for text in headings),
        Column(title="Plan again?"),
    ]
    rows = [
        (one["recording"], numbers.percent(one["change_fraction"], signed=True), f"{one['plan_max_over_mean_load']:.3f}",
         f"{one['replanned_eplb_max_over_mean_load']:.3f}", "yes" if one["replan"] else "no")
        for one in document["staleness"]
    ]  # fmt: skip
    return table(columns, rows)


def _assumptions(document: Document, profile: Profile | None) -> Section:
    best = document["best"]
    sure = (
        f"The step's interval is ±{numbers.percent(best['relative_uncertainty'])}: the uncertainty of kernels and of links, weighted by "
        "their time"
        + (
            "."
            if document["provenance"]["trace"]["kind"] == "routing"
            else ", and more because only counts were recorded."
        )
    )
    parts: list[str] = [
        bullet_list(_sentence(text) for text in document["assumptions"]),
        "<h3>How sure</h3>",
        paragraph(sure),
    ]
    parts += machine_parts(profile)
    return Section(id="assumptions", title="Assumptions, uncertainty and sources", parts=tuple(parts))


def _provenance(document: Document, command: Sequence[str] | str | None) -> Section:
    origin, request, best = document["provenance"], document["request"], document["best"]
    trace = origin["trace"]
    tokens = "counts only" if trace["num_tokens"] is None else f"{trace['num_tokens']:,} tokens"
    schedule = schedule_of(document, "after")
    rows = [
        ("Made by", origin["produced_by"]),
        ("Model", origin["model"]),
        ("Machine", f"{request['num_nodes']} × {request['ranks_per_node']} ranks of {origin['hardware']}"),
        ("Recording", f"{trace['source']}; {tokens}"),
        ("Routing", f"{trace['num_layers']} layers, {trace['num_experts']} experts each"),
        (
            "A step",
            f"{origin['step_tokens']:,} tokens of {'prefill' if request['prefill'] else 'decode'}, context {request['context_tokens']:,}",
        ),
        (
            "Redundant slots",
            f"{request['num_redundant']:,} a layer asked for, {schedule.placement.num_redundant:,} used",
        ),
        ("Weights of experts", f"{schedule.kernel.bits} bits"),
        ("The plan", str(best["description"])),
        ("Engine", best["engine"]),
        *(("Set by the user", setting) for setting in set_by_user(document)),
    ]
    text = (
        command
        if isinstance(command, str)
        else shlex.join(command if command is not None else parallel_command(document))
    )
    parts = (
        table([Column(title="What"), Column(title="Value")], rows),
        "<h3>To make this plan again</h3>",
        code_block(text),
    )
    return Section(id="provenance", title="Provenance", parts=parts)


def parallel_command(document: Document) -> list[str]:
    """Return the words of the command that makes a plan document again, with `TRACE` for the recording's file."""
    origin, request = document["provenance"], document["request"]
    words = [
        "moeplan",
        "plan",
        "--mode",
        "ep",
        "--model",
        origin["model"],
        "--hardware",
        origin["hardware"],
        "--trace",
        "TRACE",
    ]
    words += ["--nodes", str(request["num_nodes"]), "--ranks-per-node", str(request["ranks_per_node"])]
    words += ["--redundant", str(request["num_redundant"]), "--phase", "prefill" if request["prefill"] else "decode"]
    words += ["--context", str(request["context_tokens"])]
    if request["bits"] is not None:
        words += ["--bits", request["bits"]]
    own = ("num_nodes", "ranks_per_node", "num_redundant", "prefill", "context_tokens", "bits")
    return [*words, *set_words(document, own), "-o", "plan.json"]
