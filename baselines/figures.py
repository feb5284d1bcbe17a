"""What a scenario's command says, as named figures: the same functions that the command line calls, on the same options.

Modelled: `simulate` (times, hits, bytes, shares, low and high ends, memory breakdown), `plan` for many devices (every schedule's step,
ingredients, migration), `reproduce` (every cell and fitted constant; every public report's prediction); a refusal is a figure too, by
its class and exit status. Ignored: texts that explain, and plans for one device, whose search is made of the simulations above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..base.errors import MoeplanError, UnknownName
from .document import Figure, Pinned, Scenario, rounded

if TYPE_CHECKING:
    from ..planner.parallel.case import Recording
    from ..specs.models import ModelSpec

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


def predict(scenario: Scenario) -> Pinned:
    """Return a scenario with what the product says of it now; raises UnknownName for a command that is not pinned here."""
    if scenario.command not in _COMMANDS:
        raise UnknownName("command", scenario.command, _COMMANDS)
    try:
        said = _COMMANDS[scenario.command](**scenario.options)
    except MoeplanError as error:
        said = {"refused": type(error).__name__, "exit_status": error.exit_status}
    return Pinned(scenario=scenario, figures=dict(_leaves("", said)))


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
) -> dict[str, Any]:
    """Return the figures of `moeplan simulate`."""
    from ..api.simulate import simulate

    result = simulate(model, hardware, schedule=schedule, settings=set, **options)
    said = {key: value for key, value in result.to_dict().items() if key not in (*result.subject.described, *_BESIDE)}
    memory_breakdown, resolved = said["memory_breakdown"], said["schedule"]
    memory = {f"{item['place']}.{item['name']}": item["bytes"] for item in memory_breakdown["items"]}
    return {key: value for key, value in said.items() if key not in _NO_FIGURES} | {
        "schedule": {"name": resolved["name"]} | {f"{part}.{key}": resolved[part][key] for part, key in _FILLED_IN},
        "memory": {"device_bytes": memory_breakdown["device_bytes"], "host_bytes": memory_breakdown["host_bytes"]}
        | memory,
    }


def _plan(
    *,
    model: str,
    hardware: str,
    routing: dict[str, Any] | None = None,
    phase: str = "decode",
    bits: str = "native",
    context_tokens: int = 2048,
    **options: Any,
) -> dict[str, Any]:
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
    return {key: said[key] for key in kept} | {
        "best": _without_schedule(said["best"]) | {"description": said["best"]["description"]},
        "baselines": {one["name"]: _without_schedule(one) for one in said["baselines"] + said["references"]},
        "ablation": {f"{one['kind']} {one['ingredient']}": one["step_s"] for one in said["ablation"]},
        "num_left_out": len(said["baselines_left_out"]),
    }


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


def _reproduce(*, paper: str) -> dict[str, Any]:
    """Return the cells and fitted constants of `moeplan reproduce`, or each public report's prediction and their scores."""
    if paper == "field":
        return _field()
    from ..papers.registry import reproduce

    found = reproduce(paper)
    cells = {f"{cell.table} / {cell.row} / {cell.column} ({cell.unit})": cell.simulated for cell in found.cells}
    if len(cells) != len(found.cells):
        raise ValueError(f"{paper} has two cells of one name")
    return {"cells": cells, "fitted": {constant.name: constant.value for constant in found.constants}}


def _field() -> dict[str, Any]:
    from ..papers.field.rows import read_reports
    from ..papers.field.scores import document, predict_all

    said = document(predict_all(read_reports(None)), bundled=True)
    rows = {row["id"]: {key: row[key] for key in ("predicted", "low", "high")} for row in said["rows"]}
    return {"reports": rows, "kinds": said["kinds"], "cuts": said["cuts"], "num_predicted": said["num_predicted"]}


_COMMANDS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "simulate": _simulate, "plan --mode ep": _plan, "reproduce": _reproduce,
}  # fmt: skip
