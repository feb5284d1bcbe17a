"""What commands print: one JSON document, or a few readable lines.

Modelled: documents as plain values, as they stand in files. Ignored: colours, tables, and what the streams can take
(`streams`).
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from typing import Any

from .bounds import binds
from .units import GIB, GIGA, MEGA, MS_PER_S

# Between columns of a table; and how narrow its last column may be folded.
_GAP = "  "
# Figures of a run, what they are called and their units.
SPEEDS = (
    ("prefill_tokens_per_s", "prefill", "prompt tokens/s"),
    ("ttft_s", "first", "s to the first token of a request"),
    ("decode_tokens_per_s", "decode", "generated tokens/s"),
    ("request_s", "request", "s from a request's first step to its last"),
    ("requests_per_s", "requests", "a second"),
    ("window_s", "window", "s for all forward passes, prompts and answers"),
)
# What plans rank schedules by, in words.
RANKED = {
    "window_s": "the time of the whole window, prompts and answers: the least is best",
    "request_s": "the time of a whole request, prompt and reply: the least is best",
    "ttft_s": "the time to the first token of a request, then by the time of the window: the least is best",
    "decode_tokens_per_s": "generated tokens per second, then by the time of the window: the most is best",
    "requests_per_s": "requests finished per second, then by the time of the window: the most is best",
    "step_s.p99": "the 99th percentile of its steps (those that decode, where any do), then by the time of the window",
    "memory_breakdown.device_bytes": "the device memory with which the window reaches the floor: the least is best",
}
_LEAST_ROOM = 24
_NEARLY = 1e-9


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(document, indent=1, allow_nan=False) + "\n")


def print_prediction(document: dict[str, Any]) -> None:
    """Print one prediction in a few lines."""
    step, share = document["step_s"], document["time_share"]
    print(f"{document['name']}: {binds(document['bound'])}")
    for name, title, unit in SPEEDS:
        if name == "requests_per_s" and _is_of_one(document):
            continue
        print(f"  {title:9} {_speed(document, name, unit)}")
    print(
        f"  step      mean {step['mean'] * MS_PER_S:.2f} ms, p50 {step['p50'] * MS_PER_S:.2f}, p99 {step['p99'] * MS_PER_S:.2f}"
    )
    print(f"  hits      {document['hit_rate']:.4f} of {document['hits'] + document['misses']} look-ups")
    print(f"  copied    {document['bytes_copied'] / GIGA:.2f} GB")
    print("  time      " + ", ".join(f"{name} {value:.1%}" for name, value in share.items()))
    memory = document["memory_breakdown"]
    print(
        f"  memory    {memory['device_bytes'] / GIB:.2f} GiB on the device, {memory['host_bytes'] / GIB:.2f} GiB on the host"
    )
    for card in document.get("cards", ()):
        layers = f"{len(card['layers'])} layers" if card["layers"] else "no layer"
        held = f"{card['bytes'] / GIB:.2f} of {card['budget_bytes'] / GIB:.2f} GiB"
        print(f"  card {card['card']}    {card['name']}: {held}, {layers}, {card['resident_experts']} experts")
    for assumption in document["assumptions"]:
        print(f"  assumed   {assumption}")


def _is_of_one(document: dict[str, Any]) -> bool:
    """Return whether the run is one request or none, so that requests per second say nothing more."""
    rate, each = document.get("requests_per_s"), document["request_s"]
    return rate is None or each is None or abs(rate * each - 1) < _NEARLY


def _speed(document: dict[str, Any], name: str, unit: str) -> str:
    """Return one speed or time in words, with its interval where it has one."""
    value, ends = document[name], document.get(f"{name}_interval")
    if value is None:
        return "none in this window"
    scale = 1
    if unit.startswith("s ") and value < 1:
        scale, unit = MS_PER_S, f"m{unit}"
    likely = "" if ends is None else ", {} to {} likely".format(*(_significant(scale * end) for end in ends))
    return f"{_significant(scale * value)} {unit}{likely}"


def _significant(value: float) -> str:
    """Return a number above zero with four significant digits at least."""
    return f"{value:,.{max(0, 3 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def main_speed(document: dict[str, Any]) -> tuple[str, float]:
    """Return (what is computed, tokens per second): decode speed where anything is decoded, else prompt speed."""
    decode = document["decode_tokens_per_s"]
    return ("decode", decode) if decode is not None else ("prefill", document["prefill_tokens_per_s"])


def print_table(titles: Sequence[str], rows: Sequence[Sequence[object]], *, right: Collection[int] = ()) -> None:
    """Print rows below titles, columns aligned; those whose number is in `right` to the right. Only what can be shown is.

    On a terminal that is not too narrow for it, the last column is folded; elsewhere every row is one line.
    """
    cells = [[_shown(cell) for cell in row] for row in (titles, *rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(titles))]
    before = sum(widths[:-1]) + len(_GAP) * (len(widths) - 1)
    room = shutil.get_terminal_size().columns - before
    for row in cells:
        padded = [cell.rjust(width) if at in right else cell.ljust(width)
                  for at, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines = textwrap.wrap(row[-1], room) if sys.stdout.isatty() and room >= _LEAST_ROOM else [padded[-1]]
        print(_GAP.join([*padded[:-1], lines[0] if lines else ""]).rstrip())
        for line in lines[1:]:
            print(" " * before + line)


def _shown(cell: object) -> str:
    """Return a cell as one line without control characters; a dash for None."""
    text = "-" if cell is None else " ".join(str(cell).split())
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def print_plan(document: dict[str, Any], output: str) -> None:
    """Print an offload plan: the best, what it beats, how far the bound is, the verdict."""
    best = document["best"]
    count = {name: document[f"num_{name}"] for name in ("candidates", "evaluated", "abandoned", "raced_out", "pruned")}
    print(f"best of {count['candidates']} candidates ({count['evaluated']} simulated to the end, {count['abandoned']} until beaten, "
          f"{count['raced_out']} eliminated by racing, {count['pruned']} pruned by their bound):")  # fmt: skip
    if document.get("num_skipped"):
        print(f"{document['num_skipped']} more were not looked at: the time given for the search was over")
    print(f"ranked by {RANKED[document['ranked_by']]}")
    print_prediction(best)
    if document.get("for"):
        print(f"  told      {document['for']['engine']}: {document['for']['setting']['name']}")
    print(f"  schedule  {_options(best['schedule'])}")
    families = list(dict.fromkeys(one["family"] for one in document["baselines"]))
    family, ranked = None, document["ranked_by"]
    for one in sorted(document["baselines"], key=lambda one: families.index(one["family"])):
        if one["family"] != family:
            family = one["family"]
            print(f"  {family}:")
        print(f"    {_beside(one, best, ranked, _told(document, one))}")
    if document["baselines_that_need_more"]:
        print("  apart, since they need more than this model and this machine:")
    for one in document["baselines_that_need_more"]:
        print(f"    {_beside(one, best, ranked)}   needs {one['needs']}")
    if document["baselines_that_do_not_fit"] and document["request"].get("objective") == "least_memory":
        print("  in the memory found, not in the budget:")
    for name, why in document["baselines_that_do_not_fit"].items():
        print(f"  left out  {name:26} {why}")
    print(
        f"  bound     {document['lower_bound_step_s'] * MS_PER_S:.2f} ms a forward pass, prompts included: the best's mean "
        f"is within {document['optimality_gap']:.1%} of it"
    )
    print(f"  verdict   {document['verdict']}")
    if document.get("drafting"):
        _print_drafting(document["drafting"])
    print(f"written to {output}")


def _print_drafting(drafting: dict[str, Any]) -> None:
    """Print which draft length was chosen, what others reach, and from which acceptance on the chosen or the shortest one pays."""
    print(f"  drafts    {drafting['verdict']}")
    for one in drafting["tried"]:
        speed, searched = one["decode_tokens_per_s"], "searched" if one["searched"] else "estimated"
        told = one["why"] if speed is None else f"{speed:9.2f} tokens/s generated ({searched})"
        print(f"    {one['length']:2} guesses a step, {one['tokens_per_step']:5.2f} tokens a step {told}")
    pays = drafting.get("break_even")
    if pays:
        at = pays["lengths"].index(drafting["length"]) if drafting["length"] in pays["lengths"] else 0
        points = [
            f"{each['hit_rate']:.1%} hits: {'never' if each['break_even'][at] is None else format(each['break_even'][at], '.0%')}"
            for each in pays["levels"]
        ]
        print(f"    drafts of {pays['lengths'][at]} pay from an acceptance of   {'   '.join(points)}")


def _told(document: dict[str, Any], one: dict[str, Any]) -> float | None:
    """Return by how many times the best is faster than what an engine does of itself, as the verdict says it; None for other schedules."""
    served = document.get("for") or {}
    default, beside = served.get("default"), served.get("difference")
    return beside["ratio"] if default and beside and default["name"] == one["name"] else None


def _beside(one: dict[str, Any], best: dict[str, Any], ranked: str, told: float | None = None) -> str:
    """Return one schedule's speed beside the best's, compared by what the plan ranks by where that is a figure of a request.

    told: the comparison that the verdict makes, which credits an engine with what is not simulated of its own setting.
    """
    phase, speed = main_speed(one)
    figure = ranked if one.get(ranked) and best.get(ranked) else "window_s"
    faster = best[figure] / one[figure] if figure.endswith("per_s") else one[figure] / best[figure]
    return (
        f"{one['name']:26} {phase} {speed:9.2f} tokens/s   window {one['window_s']:9.3f} s: "
        f"the best is {faster if told is None else told:5.2f} x as fast"
    )


def _options(schedule: dict[str, Any]) -> str:
    """Return a schedule's options as `key=value`, those of its sections that are not empty, nought or off."""
    pairs = [
        (f"{section}.{key}", value)
        for section, part in schedule.items()
        if isinstance(part, dict)
        for key, value in part.items()
    ]
    guesses = schedule["predictor"]["kind"] != "none"
    return " ".join(f"{key}={value}" for key, value in pairs
                    if value not in (None, False, 0, 0.0) and (guesses or not key.startswith("predictor.")))  # fmt: skip


def print_parallel_plan(document: dict[str, Any], output: str) -> None:
    """Print an expert-parallel plan: the best, its rivals, moving, staleness, the verdict."""
    best, provenance = document["best"], document["provenance"]
    print(f"best of {document['num_candidates']} candidates for steps of {provenance['step_tokens']} tokens:")
    error = best["relative_uncertainty"]
    print(f"  best      {best['step_s'] * MS_PER_S:.3f} ms a step (±{error:.0%}), {best['tokens_per_s']:.0f} tokens/s, "
          f"{best['bound']} binds: {best.get('description', '')}")  # fmt: skip
    print(f"            {_traffic(best)}")
    rival = document["headline"]["rival"]
    print(
        f"  against   {rival['step_s'] * MS_PER_S:.3f} ms a step, {rival['tokens_per_s']:.0f} tokens/s: {rival['description']}"
    )
    print(f"            {_traffic(rival)}")
    for kind in ("baselines", "references"):
        for one in document[kind]:
            change = best["step_s"] / one["step_s"] - 1
            print(f"  {kind[:-1]:9} {one['name']:18} {one['step_s'] * MS_PER_S:9.3f} ms a step, best is {change:+6.1%}; "
                  f"{_traffic(one)}")  # fmt: skip
    for name, why in document["baselines_left_out"].items():
        print(f"  left out  {name:18} {why}")
    move = document["migration"]
    pays = move["steps_to_pay_back"]
    print(f"  moving    {move['num_experts']} experts, {move['num_bytes'] / GIB:.1f} GiB: {move['stall_s']:.3f} s at a standstill, "
          f"{'never paid back' if pays is None else f'paid back after {pays} steps'}")  # fmt: skip
    for row in document["staleness"]:
        print(f"  staleness on {row['recording']}: {row['plan_step_s'] * MS_PER_S:.3f} ms a step, {row['change_fraction']:+.1%} "
              f"against plain, EPLB planned there {row['replanned_eplb_step_s'] * MS_PER_S:.3f} ms; "
              f"{'plan anew' if row['replan'] else 'the plan still holds'}")  # fmt: skip
    print(f"  bound     {document['lower_bound_step_s'] * MS_PER_S:.3f} ms a step: "
          f"the best is within {document['optimality_gap']:.0%} of it")  # fmt: skip
    for assumption in document["assumptions"]:
        print(f"  assumed   {assumption}")
    print(f"  verdict   {document['verdict']}")
    print(f"written to {output}")


def _traffic(one: dict[str, Any]) -> str:
    return (
        f"max/mean {one['max_over_mean_load']:.3f}, {one['inter_node_bytes'] / GIGA:.2f} GB between nodes and "
        f"{one['intra_node_bytes'] / GIGA:.2f} GB inside"
    )


def print_calibration(document: dict[str, Any]) -> None:
    """Print what a calibration found: how well each table predicts points left out, and what was shaky."""
    name = document["device"].get("name", "this machine")
    print(f"{name}: {document['num_samples']} times measured")
    for table, fit in document["fit"].items():
        print(
            f"  {table:24} {fit['num_points']:4} points, left out and predicted within {fit['median_error']:.1%} (half of them), "
            f"{fit['p90_error']:.1%} (nine in ten)"
        )
    for constant, change in document.get("changed", {}).items():
        before = "" if change["before"] is None else f", was {change['before']:.4g}"
        print(f"  {constant:40} {change['after']:.4g}{before}")
    for warning in document["warnings"]:
        print(f"  note      {warning}")
    print(f"written to {document['profile']}")


def _print_ranks(one: dict[str, Any]) -> None:
    """Print what ranks of one schedule sent, and how far their results are from one process's."""
    between, inside = (one[f"{tier}_node_bytes"] / MEGA for tier in ("inter", "intra"))
    said = "as predicted over every link" if one["bytes_equal"] else "not as predicted"
    print(f"    bytes     {between:.3f} MB between nodes and {inside:.3f} MB inside, {said}; "
          f"headers and sizes {one['other_bytes'] / MEGA:.3f} MB")  # fmt: skip
    print(f"    states    {one['states_error']:.1e} from one process's; rounding allows {one['states_bound']:.1e}")


def print_validation(document: dict[str, Any]) -> None:
    """Print how far predictions were off: what ran where that is not the whole plan, each configuration, the figures over all."""
    if document.get("reduced"):
        for note in document["reduced"]["notes"]:
            print(f"  reduced   {note}")
    for one in document["configurations"]:
        low, high = one["interval_s"]
        print(
            f"  {one['name']:56} predicted {one['predicted_step_s'] * MS_PER_S:9.2f} ms "
            f"({low * MS_PER_S:.2f} to {high * MS_PER_S:.2f}), measured {one['measured_step_s'] * MS_PER_S:9.2f} ms "
            f"{one['relative_error']:+7.1%} a step"
        )
        if "states_error" in one:
            _print_ranks(one)
        for name, title, unit in SPEEDS:
            if one["measured"].get(name) is not None:
                print(f"    {title:9} predicted {_speed(one['predicted'], name, unit)}")
                print(f"    {'':9} measured  {_speed(one['measured'], name, unit)}")
    noise = "unknown (each ran once)" if document["noise_floor"] is None else f"{document['noise_floor']:.1%}"
    tau = "-, no two differ by more than noise" if document["kendall_tau"] is None else (
        f"{document['kendall_tau']:.2f}, of pairs that differ by more than noise ({document['num_pairs']})"
    )  # fmt: skip
    regret = "-" if document["regret"] is None else f"{document['regret']:.1%}"
    print(
        f"{document['num_configurations']} configurations: error median {document['median_relative_error']:.1%}, "
        f"p90 {document['p90_relative_error']:.1%}, worst {document['worst_relative_error']:.1%}; "
        f"noise {noise}; intervals hold {document['coverage']:.0%}"
    )
    print(f"  order     Kendall's tau {tau}; lost by trusting it {regret}")
    print(f"  counts    {'equal' if document['counts_equal'] else 'differ'}")
    print("  error of the step with measured durations, median: "
          + ", ".join(f"{name} {value:.1%}" for name, value in document["error_budget"].items()))  # fmt: skip
    now = document.get("without_drift")
    if now:
        print("  machine   now against its profile: "
              + ", ".join(f"{name} {ratio - 1:+.1%}" for name, ratio in document["drift"].items()))  # fmt: skip
        print(f"            with that taken out: error median {now['median_relative_error']:.1%}, "
              f"p90 {now['p90_relative_error']:.1%}, worst {now['worst_relative_error']:.1%}")  # fmt: skip
    if document["misses"]:
        print(f"  misses    {'; '.join(document['misses'])}")
