"""A diagnosis in words: what binds, ceilings, memory, changes with their gains and costs, causes with what they would give.

Modelled: from the document that `moeplan diagnose --json` prints, for one screen and for the page. Ignored: how any of it was found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..base.units import GIGA
from . import numbers

TITLES = {"decode_tokens_per_s": "generated", "prefill_tokens_per_s": "prompts"}
_BINDS = {
    "cpu": "experts on the cores bind", "copy": "copies over the link bind", "compute": "the card's work binds",
    "launch": "starting the card's kernels binds", "host": "the host's own work binds", "disk": "reading from the disk binds",
}  # fmt: skip
_ALONE = {"compute": "the cores' work binds"}
"""The same without a card."""
_SHARES = {
    "copy": ("copy",),
    "cpu": ("cpu",),
    "compute": ("dense", "expert", "head"),
    "launch": ("launch",),
    "host": ("host",),
    "disk": ("copy", "cpu", "disk"),
}


def answer(document: Mapping[str, Any]) -> list[str]:
    """Return the lines of a diagnosis, one screen."""
    quant = "" if document["quant"] is None else f" {document['quant']}"
    size = document["memory"]["file_bytes"] / GIGA
    found = [f"{document['verdict']}: {'; '.join(figure_words(one) for one in document['speeds'])}", ""]
    found.append(f"{document['model']}{quant} ({size:.1f} GB), {document['machine']}")
    for one in document["speeds"]:
        found.append(f"  {TITLES[one['metric']]:10} {bound_words(one, alone=document['placement']['kind'] == 'cpu')}")
        found.append(f"  {'':10} nothing beats {ceiling_words(one)}")
    found.append(f"  {'memory':10} {memory_words(document['memory'], alone=document['placement']['kind'] == 'cpu')}")
    found += _list(
        "would gain most (predicted, shared errors cancel)",
        [change_words(one) for one in document["changes"]],
    )
    found += _list("to check: each would give what was measured", [cause_words(one) for one in document["causes"]])
    if document["verdict"] != "normal" and not document["causes"]:
        found += ["", "no cause that is known here has the size of the gap"]
    found += [f"  note      {text}" for text in document["notes"]]
    found += [f"  assumed   {text}" for text in document["assumed"]]
    return found


def figure_words(one: Mapping[str, Any]) -> str:
    """Return a measured figure beside what is normal."""
    measured, predicted, low, high = (
        numbers.significant(one[name]) for name in ("measured", "predicted", "low", "high")
    )
    what = "generated tokens/s" if one["metric"] == "decode_tokens_per_s" else "prompt tokens/s"
    beyond = ", more than anything on this machine can do" if one["impossible"] else ""
    return f"{measured} {what}, {low} to {high} are normal ({predicted} predicted){beyond}"


def bound_words(one: Mapping[str, Any], *, alone: bool = False) -> str:
    """Return what binds; alone: there is no card."""
    names = ("disk",) if "disk" in one["time_share"] and one["bound"] == "disk" else _SHARES.get(one["bound"], ())
    share = sum(one["time_share"].get(name, 0.0) for name in names)
    words = (_BINDS | _ALONE if alone else _BINDS).get(one["bound"], f"{one['bound']} binds")
    return f"{words}, {share:.0%} of the time"


def ceiling_words(one: Mapping[str, Any]) -> str:
    """Return what nothing can beat."""
    ceiling = one["ceiling"]
    said = [f"{numbers.significant(ceiling['as_placed'])} as it is placed ({ceiling['as_placed_from']})"]
    if ceiling["best_placed"] is not None:
        said.append(f"{numbers.significant(ceiling['best_placed'])} with all layers that the card holds")
    if ceiling["any_schedule"] > 1.001 * ceiling["as_placed"]:
        said.append(f"{numbers.significant(ceiling['any_schedule'])} whatever runs")
    return ", ".join(said)


def memory_words(memory: Mapping[str, Any], *, alone: bool = False) -> str:
    """Return what is needed beside what there is; alone: there is no card."""
    room = f"with room for {memory['context_tokens']:,} tokens of context"
    if alone:
        over = "" if memory["fits"] else " (does not fit)"
        return f"{numbers.size(memory['device_bytes'])} of {numbers.size(memory['device_limit_bytes'])}{over}, {room}"
    host = "" if memory["host_limit_bytes"] is None else f" of {numbers.size(memory['host_limit_bytes'])}"
    card = f"{numbers.size(memory['device_bytes'])} of {numbers.size(memory['device_limit_bytes'])} on the card"
    over = "" if memory["fits"] else " (does not fit)"
    return f"{card}{over}, {numbers.size(memory['host_bytes'])}{host} on the host, {room}"


def change_words(one: Mapping[str, Any]) -> str:
    """Return a change with its gains and its cost."""
    gains = [f"{one[name]:.2f} × {words}" for name, words in (("decode_gain", "generated"), ("prefill_gain", "prompts"),
    ("request_gain", "the request"))
             if abs(math.log(one[name])) > 0.01]  # fmt: skip
    bought = "hardware: " if one["kind"] == "hardware" else ""
    return f"{bought}{one['what']}: {', '.join(gains)}; costs {one['cost']}"


def cause_words(one: Mapping[str, Any]) -> str:
    """Return a cause with the speeds it would give, and how to look."""
    speeds = ", ".join(f"{numbers.significant(three[0])} {TITLES[name]}" for name, three in one["speeds"].items())
    return f"{one['what']}: {speeds}; look at {one['check']}"


def _list(title: str, items: list[str]) -> list[str]:
    return ["", title, *(f"  {number}  {text}" for number, text in enumerate(items, 1))] if items else []
