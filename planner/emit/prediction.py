"""What was predicted for the files that are written: the plan's best only where the files run it, else what the plan has, else nothing.

Modelled: the schedule that an engine runs, compared with the plan's best, its baselines and its references, options for options.
Ignored: predicting anew (the plan's recording is not here).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...base.units import MS_PER_S
from ...specs.plans.document import EXPERT_PARALLEL
from .choices import NEUTRAL, Emission


def prediction_lines(emission: Emission, document: Mapping[str, Any]) -> list[str]:
    """Return the lines that say what was predicted for what the files run."""
    best = document.get("best")
    ahead = f"; the plan's best: {_figures(best, document)}" if _figures(best, document) else ""
    if emission.runs is None:
        return [f"nothing for these files: {emission.unlike}{ahead}"]
    runs = _options(emission.runs.to_dict())
    for name, prediction, schedule in _predictions(document):
        if _options(schedule) == runs and (said := _figures(prediction, document)):
            return [said] if name == "best" else [f"{said} (the files run {name}, not the plan's best{ahead})"]
    own = document["schedule"] if "schedule" in document else (best or {}).get("schedule")
    planned = _options(own) if isinstance(own, Mapping) else {}
    changed = [
        f"{key}={runs[key]} (plan: {planned[key]})" for key in runs if key in planned and runs[key] != planned[key]
    ]
    if not changed:
        return ["the plan holds no figures of its best"]
    return [f"nothing for these files, which run {', '.join(changed)}{ahead}"]


def _predictions(document: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Yield (name, prediction, schedule) of everything that the plan predicted whole, the best first."""
    best = document.get("best")
    if isinstance(best, Mapping):
        own = document.get("schedule", best.get("schedule"))
        if isinstance(own, Mapping):
            yield "best", best, own
    for part in ("baselines", "baselines_that_need_more", "references"):
        listed = document.get(part)
        for one in listed.values() if isinstance(listed, Mapping) else listed if isinstance(listed, list) else ():
            if isinstance(one, Mapping) and isinstance(one.get("schedule"), Mapping):
                yield str(one.get("name")), one, one["schedule"]


def _options(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that say what is done, by dotted key; placements are compared by whether they are the plain one."""
    flat = {f"{section}.{option}": value for section, options in schedule.items() if isinstance(options, Mapping)
            for option, value in options.items()}  # fmt: skip
    kept = {key: value for key, value in flat.items() if key not in NEUTRAL and key.split(".")[0] not in NEUTRAL}
    if "placement.policy" in flat:
        kept["placement.policy"] = flat["placement.policy"]
    return kept


def _figures(prediction: object, document: Mapping[str, Any]) -> str:
    """Return a prediction in words, empty where it has no figures."""
    if not isinstance(prediction, Mapping):
        return ""
    if document.get("kind") == EXPERT_PARALLEL:
        step, wide = prediction.get("step_s"), prediction.get("relative_uncertainty")
        if not isinstance(step, int | float):
            return ""
        within = f", within {100 * wide:.0f}%" if isinstance(wide, int | float) else ""
        speed = prediction.get("tokens_per_s")
        return f"{MS_PER_S * step:.3f} ms a step{within}" + (
            f", {speed:,.0f} tokens/s" if isinstance(speed, int | float) else ""
        )
    said = []
    for key, words in (("decode_tokens_per_s", "decoding"), ("prefill_tokens_per_s", "prompts")):
        if isinstance(value := prediction.get(key), int | float):
            ends = prediction.get(f"{key}_interval")
            within = f" ({ends[0]:.4g} to {ends[1]:.4g})" if isinstance(ends, list | tuple) and len(ends) == 2 else ""
            said.append(f"{words} {value:.4g} tokens/s{within}")
    return ", ".join(said)
