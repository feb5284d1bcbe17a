"""One expert-parallel schedule of one's own: from a command's options to a prediction, and what is printed of it.

Modelled: the step with its interval, where the time goes, tokens a second of a device and of a user, balance, traffic, memory and the
largest batch. Ignored: how it came about.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from ...base.terminal import print_table
from ...reports import numbers
from ..options.conditions import was_given
from ..options.parallel import REQUEST_OPTIONS, contexts_of, latency_of, parallel_request

# What the kinds of a step's operations are called where people read them.
PARTS: Mapping[str, str] = {
    "dense": "attention and other dense parts", "shared": "shared experts", "expert": "routed experts", "head": "output head",
    "dispatch": "dispatch", "combine": "combine", "reduce": "reductions among ranks", "host": "host", "waiting": "waiting for a link",
}  # fmt: skip


def simulate_many(
    ctx: typer.Context,
    *,
    trace: str | None,
    schedule: str | None,
    settings: list[str] | None,
    timeline: Path | None,
    **asked: Any,
) -> dict[str, Any]:
    """Return the document of one schedule for many devices, its Perfetto timeline written where asked for.

    asked: options that the function behind takes by the same names; those of a request are read from the command line.
    """
    from ...api.parallel import simulate_parallel
    from ...api.settings import open_settings
    from ...reports.timelines.perfetto import write_timeline

    given, changes = ctx.params, open_settings(settings)
    changes.refuse_repeated(
        {field: f"--{name.replace('_', '-')}" for field, name in REQUEST_OPTIONS.items() if was_given(ctx, name)}
    )
    names = ("ranks_per_node", "tokens_per_rank", "concurrency", "kv_type", "dense_bits")
    prefill = given["phase"] == "prefill"
    request = parallel_request(
        given["phase"], given["bits"] or "native", num_nodes=given["nodes"], attention_ranks=given["attention_tp"],
        **{name: given[name] for name in names},
        **contexts_of(given["context"], given["prompt_tokens"], given["reply_tokens"], prefill=prefill),
        **latency_of(ctx),
    )  # fmt: skip
    found = simulate_parallel(
        trace=trace,
        request=request,
        schedule=schedule or "ep",
        settings=changes,
        timeline=timeline is not None,
        **asked,
    )
    if timeline is not None and found.timeline is not None:
        write_timeline(timeline, found.timeline)
    return found.to_dict()


def print_parallel_prediction(document: Mapping[str, Any]) -> None:
    """Print the prediction of one schedule for many devices."""
    low, high = document["step_s_interval"]
    request, memory = document["request"], document["memory"]
    ranks, phase = document["num_ranks"], "prefill" if request["prefill"] else "decode"
    typer.echo(
        f"{document['model']} on {request['num_nodes']} x {request['ranks_per_node']} {document['hardware']}, {phase} steps of "
        f"{document['step_tokens']:,} tokens: {document['description']}"
    )
    _line("step", f"{numbers.seconds(document['step_s'])}, {numbers.seconds(low)} to {numbers.seconds(high)} likely; "
                  f"{'exchanges' if document['bound'] == 'exchange' else document['bound']} would take longest alone")  # fmt: skip
    user = document["tokens_per_s_per_user"]
    whole, each = document["latency"]["tokens_per_s"], document["tokens_per_s_per_gpu"]
    speed = f"{numbers.significant(whole)} tokens/s, {numbers.significant(each)} per GPU"
    _line("speed", speed + ("" if user is None else f", {numbers.significant(user)} per user"))
    _print_latency(document)
    for kind, value in document["parts_s"].items():
        more = ""
        if kind == "expert" and document["imbalance_s"]:
            more = f", of it {numbers.seconds(document['imbalance_s'])} because ranks are uneven"
        _line(
            "",
            f"{numbers.seconds(value):>9} {numbers.percent(value / document['step_s']):>7}  {PARTS.get(kind, kind)}{more}",
        )
    _line("balance", f"fullest rank {document['max_over_mean_load']:.3f} x the mean; {numbers.size(document['inter_node_bytes'])} between "
                     f"nodes and {numbers.size(document['intra_node_bytes'])} inside in a step")  # fmt: skip
    budget, most = document["memory_budget_bytes"], document["largest_tokens_per_rank"]
    _line("memory", f"{numbers.size(memory['device_bytes'])} of {numbers.size(budget)} on each GPU")
    for item in memory["items"]:
        if item["bytes"]:
            _line("", f"{numbers.size(item['bytes']):>9}  {item['name']}: {item['note']}")
    _line("batch", _batch(document, most, ranks))
    for text in document["assumptions"]:
        _line("assumed", text)


def print_parallel_answer(document: Mapping[str, Any]) -> None:
    """Print what a plan for many devices comes to: against what engines do today, what each decision is worth, memory and batch."""
    from ...reports.parallel.factors import gain_words

    head, best, factors = document["headline"], document["best"], document["factors"]
    request, step, waits = document["request"], best["step_s"], document["latency"]
    ranks = request["num_nodes"] * request["ranks_per_node"]
    user = "" if waits["tpot_s"] is None else f", {numbers.significant(1 / waits['tpot_s'])} per user"
    typer.echo(f"{head['words']}: {numbers.seconds(step)} a step instead of {numbers.seconds(head['step_s'])}, "
               f"{numbers.significant(waits['tokens_per_s'] / ranks)} tokens/s per GPU{user}")  # fmt: skip
    base = factors["baseline"]
    typer.echo(f"what each decision is worth, from {base['description']} ({numbers.seconds(base['step_s'])} a step); shares add up to the "
               "whole:")  # fmt: skip
    rows = [
        (row["factor"], f"{row['off']} → {row['on']}", *(gain_words(row[part]) for part in ("alone", "last", "share")))
        for row in factors["rows"]
    ]
    alone = sum(row["alone"]["change_fraction"] for row in factors["rows"])
    rows.append(("together", "all of them", numbers.percent(alone, signed=True), "", gain_words(factors["whole"])))
    rows.append(("", "the whole less what each does alone", gain_words(factors["interaction"]), "", ""))
    print_table(("decision", "from → to", "alone", "beside all others", "share"), rows)
    if factors["fixed"]:
        said = ", ".join(f"{name} ({does})" for name, does in factors["fixed"].items())
        _line("fixed", f"{document['target']} decides itself: {said}")
    short = [one for one in factors["combinations"] if one["missing_bytes"]]
    for one in short:
        _line(
            "no room",
            f"{' + '.join(one['on']) or 'the baseline'}: {one['missing_bytes']:,} bytes are missing on each GPU",
        )
    memory = document["memory"]
    items = ", ".join(f"{item['name']} {numbers.size(item['bytes'])}" for item in memory["items"] if item["bytes"])
    _line(
        "memory",
        f"{numbers.size(memory['device_bytes'])} of {numbers.size(document['memory_budget_bytes'])} on each GPU: {items}",
    )
    _print_latency(document)
    _line("batch", _batch(document, document["largest_tokens_per_rank"], ranks))
    _print_period(document["period"])
    if document["num_skipped"]:
        _line("stopped", f"time was up: {document['num_skipped']} candidates were left out")


def _print_period(period: Mapping[str, Any] | None) -> None:
    """Print whether rebalancing pays over a served period, policy by policy."""
    if period is None:
        return
    typer.echo(
        f"rebalancing over {period['num_steps']:,} steps in {period['num_windows']} windows ({period['schedule']}):"
    )
    rows = [
        (one["words"], numbers.seconds(one["whole_s"]), f"{-one['change_fraction']:+.1%} ± {one['uncertainty_fraction']:.1%}",
         f"{one['max_over_mean_load']:.3f}", str(one["num_rearrangements"]), numbers.seconds(one["stalled_s"]),
         numbers.seconds(one["longest_pause_s"]), numbers.seconds(one["counting_s"]))
        for one in period["policies"]
    ]  # fmt: skip
    print_table(("policy", "takes", "saved", "fullest/mean", "moves", "stalled", "longest pause", "counting"), rows)
    _line("verdict", period["words"])


def _batch(document: Mapping[str, Any], most: int, ranks: int) -> str:
    """Return the largest batch that fits, in words."""
    drafted = document["request"]["draft_tokens"]
    if not drafted:
        return f"at most {most:,} tokens on each GPU fit, {most * ranks:,} in all"
    each = most // (drafted + 1)
    return f"at most {each:,} sequences on each GPU fit, {each * ranks:,} in all"


def _print_latency(document: Mapping[str, Any]) -> None:
    """Print what users wait for, where more than a plain decode step was asked for."""
    request, found = document["request"], document["latency"]
    if request["draft_tokens"]:
        _line(
            "drafts",
            f"{request['draft_tokens']} checked for each sequence, {document['tokens_a_step']:.4g} tokens a step",
        )
    if document.get("drafting") is not None and document["drafting"]["chosen"]:
        _line("drafting", document["drafting"]["verdict"])
    if request["prefill_share"]:
        _line("prompts", f"{numbers.percent(request['prefill_share'])} of all tokens, steps of {numbers.seconds(found['prompt_step_s'])}; "
                         f"left are {numbers.significant(found['tokens_per_s'])} generated tokens/s")  # fmt: skip
    for name, said, limit in (
        ("ttft_s", "first token", request["ttft_s"]),
        ("tpot_s", "further token", request["tpot_s"]),
    ):
        if found[name] is None or (limit is None and not (request["prefill_share"] or request["draft_tokens"])):
            continue
        kept = (
            ""
            if limit is None
            else f", {'within' if found[name] <= limit else 'over'} the limit of {numbers.seconds(limit)}"
        )
        _line("wait", f"{said} {numbers.seconds(found[name])}{kept}")
    if found["largest_within"] is not None:
        _line(
            "",
            f"at most {found['largest_within']:,} sequences on each GPU keep {numbers.seconds(request['tpot_s'])} a token",
        )


def _line(title: str, text: str) -> None:
    typer.echo(f"  {title:9} {text}")
