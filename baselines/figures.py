"""What a scenario's command says, as named figures: the same functions that the command line calls, on the same options.

Modelled: `simulate` (times, hits, bytes, shares, low and high ends, memory breakdown), `plan` for many devices (every schedule's step,
ingredients, migration), `reproduce` (every cell and fitted constant; every public report's prediction); a refusal is a figure too, by
its class and exit status. Ignored: texts that explain, and plans for one device, whose search is made of the simulations above.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.errors import InputError, MoeplanError, UnknownName
from .document import Figure, Measured, Pinned, Scenario, rounded

if TYPE_CHECKING:
    from ..planner.parallel.case import Recording
    from ..specs.models import ModelSpec

_HASH_DIGITS = 16
_NO_FIGURES = ("name", "schedule", "memory_breakdown", "assumptions", "engine")
_BESIDE = ("simulator", "set_by_user")
"""What an answer says besides its figures."""
_FILLED_IN = (
    ("experts", "bits"),
    ("cache", "experts_per_layer"),
    ("cache", "pooled_experts"),
    ("copy", "host_experts"),
)
"""Options of a schedule that a prediction may fill in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a command says, what was measured of it, and the data that both are about."""

    figures: Mapping[str, Any]
    measured: Mapping[str, Measured] = field(default_factory=dict)
    data: str | None = None


def predict(scenario: Scenario, folder: Path | None = None) -> Pinned:
    """Return a scenario with what the product says of it now; raises UnknownName for a command that is not pinned here.

    folder: where files that the scenario names are found.
    """
    if scenario.command not in _COMMANDS:
        raise UnknownName("command", scenario.command, _COMMANDS)
    command, options = _COMMANDS[scenario.command], dict(scenario.options)
    takes = _options_of(scenario.command)
    for name in options:
        if name not in takes:
            raise UnknownName(f"{scenario.name}: option", name, takes)
    absent = [name for name, default in takes.items() if default is inspect.Parameter.empty and name not in options]
    if absent:
        raise InputError(
            f"{scenario.name}: {absent[0]}", "(absent)", f"{scenario.command} needs it", "say it in the baseline"
        )
    if scenario.command == "validation":
        options["folder"] = folder
    try:
        said = command(**options)
    except MoeplanError as error:
        said = Said(figures={"refused": type(error).__name__, "exit_status": error.exit_status}, data=_data(options))
    return Pinned(
        scenario=scenario, figures=dict(_leaves("", said.figures)), measured=dict(sorted(said.measured.items())), data=said.data
    )  # fmt: skip


def _options_of(command: str) -> dict[str, Any]:
    """Return the options that a scenario of a command may have, with their defaults (`Parameter.empty`: none)."""
    found = {
        name: one.default
        for name, one in inspect.signature(_COMMANDS[command]).parameters.items()
        if name not in ("options", "folder")
    }
    if command == "simulate":
        from ..api.simulate import simulate

        more = {name: one.default for name, one in inspect.signature(simulate).parameters.items()}
        return {name: default for name, default in {**more, **found}.items() if name not in ("settings", "timeline")}
    if command == "plan --mode ep":
        from ..planner.parallel.case import ParallelRequest

        return {**{each.name: each.default for each in dataclasses.fields(ParallelRequest)}, **found}
    return found


def _data(options: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of the model and the recording that options name; None where they cannot be read or none is named."""
    facts: dict[str, Any] = {}
    try:
        if isinstance(options.get("model"), str):
            facts["model"] = _model_facts(options["model"])
        if isinstance(options.get("trace"), str):
            facts["trace"] = _trace_facts(options["trace"])
    except MoeplanError:
        return None
    return fingerprint(facts) if facts else None


@cache
def _model_facts(name: str) -> str:
    from ..api.load import load_model

    return fingerprint(dataclasses.asdict(load_model(name)))


@cache
def _trace_facts(name: str) -> str:
    from ..api.load import load_trace
    from ..traces.content import recording_sha256

    return recording_sha256(load_trace(name))


def fingerprint(facts: Any) -> str:
    """Return a short hash of plain values: equal facts, equal text."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH_DIGITS]


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Figure]]:
    """Return the values of a document with dotted names; an interval's two are its low and high."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), part)
    elif isinstance(value, (list, tuple)):
        ends = ("low", "high") if len(value) == 2 and name.endswith("_interval") else range(len(value))
        for end, part in zip(ends, value, strict=True):
            yield from _leaves(f"{name}.{end}", part)
    else:
        yield name, rounded(value)


def _simulate(
    *, model: str, hardware: str, schedule: str | None = None, set: list[str] | None = None, **options: Any
) -> Said:
    """Return the figures of `moeplan simulate`."""
    from ..api.simulate import simulate

    result = simulate(model, hardware, schedule=schedule, settings=set, **options)
    said = {key: value for key, value in result.to_dict().items() if key not in (*result.subject.described, *_BESIDE)}
    memory_breakdown, resolved = said["memory_breakdown"], said["schedule"]
    memory = {f"{item['place']}.{item['name']}": item["bytes"] for item in memory_breakdown["items"]}
    figures = {key: value for key, value in said.items() if key not in _NO_FIGURES} | {
        "schedule": {"name": resolved["name"]} | {f"{part}.{key}": resolved[part][key] for part, key in _FILLED_IN},
        "memory": {"device_bytes": memory_breakdown["device_bytes"], "host_bytes": memory_breakdown["host_bytes"]}
        | memory,
    }
    return Said(figures=figures, data=_data({"model": model, **options}))


def _plan(
    *,
    model: str,
    hardware: str,
    routing: dict[str, Any] | None = None,
    phase: str = "decode",
    bits: str = "native",
    context_tokens: int = 2048,
    **options: Any,
) -> Said:
    """Return the figures of `moeplan plan --mode ep`.

    routing: requests, prompt_tokens, reply_tokens of a recording made up in the way of the model's family, counts: true where only
    the load of each expert is kept; None takes the bundled recording.
    """
    from ..api.load import load_model
    from ..api.plan import plan
    from ..planner.parallel.case import ParallelRequest

    request = ParallelRequest(prefill=phase == "prefill", bits=bits, context_tokens=context_tokens, **options)
    recording = "bundled" if routing is None else _made_up(load_model(model), **routing)
    said = plan(model, hardware, trace=recording, request=request).to_dict()
    kept = (
        "num_candidates",
        "lower_bound_step_s",
        "optimality_gap",
        "overfit_fraction",
        "migration",
        "max_over_mean_by_layer",
    )
    figures = {key: said[key] for key in kept} | {
        "best": _without_schedule(said["best"]) | {"description": said["best"]["description"]},
        "baselines": {one["name"]: _without_schedule(one) for one in said["baselines"] + said["references"]},
        "ablation": {f"{one['kind']} {one['ingredient']}": one["step_s"] for one in said["ablation"]},
        "num_left_out": len(said["baselines_left_out"]),
    }
    return Said(figures=figures, data=_data({"model": model, "trace": "bundled" if routing is None else None}))


def _made_up(
    spec: ModelSpec, *, requests: int, prompt_tokens: int, reply_tokens: int, counts: bool = False
) -> Recording:
    import numpy as np

    from ..traces.lengths import RequestLengths
    from ..traces.recording import LoadProfile
    from ..traces.synthesis.prior import prior_recording

    lengths = RequestLengths.alike(prompt_tokens=prompt_tokens, reply_tokens=reply_tokens, requests=requests)
    trace = prior_recording(spec, lengths)
    if not counts:
        return trace
    load = np.stack(
        [np.bincount(layer.ravel(), minlength=trace.num_experts) for layer in np.moveaxis(trace.experts, 1, 0)]
    )
    return LoadProfile(
        counts=load.astype(np.int64),
        model=trace.model,
        layer_ids=trace.layer_ids,
        source=trace.source,
        licence="",
        top_k=trace.top_k,
    )


def _without_schedule(said: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in said.items() if key not in ("name", "schedule", "description", "engine")}


def _reproduce(*, paper: str, kind: str | None = None, parallel: bool = False) -> Said:
    """Return the cells and fitted constants of `moeplan reproduce`, or the predictions of public reports of one kind and their scores."""
    if paper == "field":
        return _parallel_field(kind) if parallel else _field(kind)
    for name, value in (("kind", kind), ("parallel", parallel or None)):
        if value is not None:
            raise InputError(name, value, f"{paper} has none", "leave it out")
    from ..papers.registry import reproduce

    found = reproduce(paper)
    names = [f"{cell.table} / {cell.row} / {cell.column} ({cell.unit})" for cell in found.cells]
    if len(set(names)) != len(names):
        raise ValueError(f"{paper} has two cells of one name")
    published = {name: cell.published for name, cell in zip(names, found.cells, strict=True) if cell.published}
    return Said(
        figures={
            "cells": {name: cell.simulated for name, cell in zip(names, found.cells, strict=True)},
            "fitted": {constant.name: constant.value for constant in found.constants},
        },
        measured={f"cells.{name}": Measured(value=float(value)) for name, value in published.items()},
        data=fingerprint({name: cell.published for name, cell in zip(names, found.cells, strict=True)}),
    )


def _field(kind: str | None) -> Said:
    from ..papers.field.rows import BUNDLED, read_reports
    from ..papers.field.scores import KINDS, document, predict_all

    if kind not in KINDS:
        raise UnknownName("kind", kind, KINDS)
    reports = [report for report in read_reports(None) if report.reason is None and report.kind == kind]
    said = document(predict_all(reports), bundled=True)
    configs = {path.name: path.read_text("utf-8") for path in sorted((BUNDLED / "configs").glob("*.json"))}
    return Said(
        figures={
            "reports": {row["id"]: {key: row[key] for key in ("predicted", "low", "high")} for row in said["rows"]},
            "scores": said["kinds"][kind], "num_predicted": said["num_predicted"],
            "choices": {name: {key: one[key] for key in ("groups", "chosen", "share")} for name, one in said["choices"].items()},
        },
        measured={f"reports.{report.id}.predicted": Measured(value=report.measured) for report in reports},
        data=fingerprint([configs, [dict(report.row) for report in reports]]),
    )  # fmt: skip


def _parallel_field(kind: str | None) -> Said:
    from ..papers.field.parallel.predict import predict_all
    from ..papers.field.parallel.rows import KINDS, read_rows
    from ..papers.field.parallel.scores import document

    if kind not in KINDS:
        raise UnknownName("kind", kind, KINDS)
    rows = [row for row in read_rows(None) if row.reason is None and row.kind == kind]
    said = document(predict_all(rows), bundled=True)
    return Said(
        figures={
            "reports": {row["id"]: {key: row[key] for key in ("predicted", "low", "high")} for row in said["rows"]},
            "scores": said["kinds"][kind], "num_predicted": said["num_predicted"],
        },
        measured={f"reports.{row.id}.predicted": Measured(value=row.measured) for row in rows},
        data=fingerprint([dict(row.row) for row in rows]),
    )  # fmt: skip


def _validation(*, file: str, run: str, folder: Path | None) -> Said:
    """Return a stored validation scored anew: its predictions beside its measurements, nothing run and nothing predicted."""
    from ..base.json_files import parse_json, read_text
    from ..base.units import MIB
    from ..executor.validation.agreement import Compared, summary

    path = (folder or Path()) / file
    runs = parse_json(read_text(path, "validation", 64 * MIB), "validation", str(path))
    if run not in runs:
        raise UnknownName("run", run, runs)
    found, measured = [], {}
    for one in runs[run]["configurations"]:
        value, noise = float(one["measured_step_s"]), one["noise"]
        found.append(Compared(
            name=one["name"], group=one["group"], predicted_s=one["predicted_step_s"], relative_uncertainty=0.0, measured_s=value,
            measured_again_s=None if noise is None else value, measured_half_s=value if noise is None else value * (1 + noise),
            tokens_per_step=one["measured_tokens_per_s"] * value, count_differences=tuple(one["count_differences"]),
            hit_rate_predicted=one["hit_rate_predicted"], hit_rate_measured=one["hit_rate_measured"],
            predicted={"step_s_interval": one["interval_s"]},
        ))  # fmt: skip
        ends = one["measured_interval_s"] or (None, None)
        measured[f"configurations.{one['name']}.predicted"] = Measured(value=value, low=ends[0], high=ends[1])
    scores = {key: value for key, value in summary(found).items() if key != "misses"}
    return Said(
        figures=scores | {"configurations": {one.name: {"predicted": one.predicted_s, "low": one.interval_s[0],
                                                        "high": one.interval_s[1]} for one in found}},
        measured=measured, data=fingerprint(runs[run]),
    )  # fmt: skip


_COMMANDS: Mapping[str, Callable[..., Said]] = {
    "simulate": _simulate, "plan --mode ep": _plan, "reproduce": _reproduce, "validation": _validation,
}  # fmt: skip
