"""Run a real model under a plan's schedule: the function behind `moeplan run`. It needs torch and transformers.

Modelled: which schedule, memory and recording a run takes from its plan or from options; one prompt after another. Ignored: the run
itself (`executor/model/`), pages.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..base.errors import InputError
from ..specs.machines.profile_file import load_hardware
from ..specs.models import ModelSpec, weight_format
from ..specs.plans.document import read_plan
from ..specs.provenance import machine_of, model_of
from ..specs.schedules.offload import OffloadSchedule, apply_settings, parse_setting, schedule_from_dict
from ..specs.schedules.presets import load_preset
from .load import as_routing
from .model_folder import check_can_run, gates_in, model_in, read_bytes
from .plan import Progress
from .subject import bytes_of

if TYPE_CHECKING:
    from ..executor.model.outcome import ModelRun

_SAME = ("num_layers", "moe_layers", "num_experts", "top_k", "hidden_size", "expert_intermediate_size", "family")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run did and amounts to; of a dry run, what it would take."""

    model: ModelSpec
    schedule: OffloadSchedule
    device: str
    memory: dict[str, Any]
    """Memory item by item, on the device and on the host."""
    texts: tuple[str, ...] = ()
    figures: dict[str, Any] | None = None
    run: ModelRun | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything but arrays as plain values."""
        return {
            "model": self.model.name, "schedule": self.schedule.to_dict(), "device": self.device, "memory": self.memory,
            "texts": list(self.texts), **(self.figures or {}),
        }  # fmt: skip


def run(
    model: str | os.PathLike[str],
    *,
    plan: str | os.PathLike[str] | None = None,
    schedule: str | OffloadSchedule | None = None,
    settings: Sequence[str] = (),
    prompts: Sequence[str | os.PathLike[str]],
    max_new_tokens: int = 64,
    device: str = "cpu",
    memory: int | str | None = None,
    trace: str | os.PathLike[str] | None = None,
    profile: str | os.PathLike[str] | None = None,
    gates: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    heard: Callable[[int, int], None] | None = None,
) -> RunResult:
    """Return what running the checkpoint in the folder `model` under a schedule did, continuing the text of each file of `prompts`.

    plan: a plan.json made for this model; or schedule: a preset's name, or a schedule. settings: options of it, "key=value".
    memory: bytes that the device may take, or a text; None: the plan's, or most of what is free. trace: a recording of this model,
    from which a static cache knows what is popular. profile: of this machine, by which a schedule that weighs costs knows them; None:
    the plan's. gates: trained gates that guess. dry_run: only add up what it would take.

    Raises InputError for what cannot be run, DoesNotFit where memory or disk do not suffice, ExecutionFailed where a run breaks off.
    """
    check_can_run(device)
    chosen, planned = _schedule(plan, schedule, settings)
    from ..executor.model.figures import figures
    from ..executor.model.loading.text import Text
    from ..executor.model.needs import described_needs
    from ..executor.model.session import check_prompts, open_model, run_model, silent

    spec = model_in(model)
    limit = bytes_of(memory, "--memory")
    if planned is not None:
        check_planned_for(planned, spec, os.fspath(plan or ""))
        limit = limit or int(planned.get("provenance", {}).get("memory_bytes") or 0) or None
    text = Text(model, spec.vocab_size)
    asked = [text.ids(read_bytes(path, "--prompt-file"), "--prompt-file") for path in prompts]
    check_prompts(asked, max_new_tokens)
    learnt = gates_in(gates, spec)
    popularity = None if trace is None else popularity_in(trace, spec)
    prices = _prices(chosen, spec, planned, profile, device, max(map(len, asked)) + max_new_tokens // 2)
    needs = described_needs(model, chosen, list(map(len, asked)), max_new_tokens=max_new_tokens, device=device, memory_bytes=limit,
                            popularity=popularity, prices=prices)  # fmt: skip
    if dry_run:
        return RunResult(model=spec, schedule=chosen, device=device, memory=needs)
    report = progress or silent
    with open_model(model, device=device, memory_bytes=limit, gates=learnt, progress=report) as loaded:
        done = run_model(loaded, chosen, asked, max_new_tokens=max_new_tokens, popularity=popularity, prices=prices, stop=text.stop,
                         progress=report, heard=heard)  # fmt: skip
    return RunResult(
        model=spec, schedule=chosen, device=device, memory=needs, texts=tuple(map(text.text, done.tokens)),
        figures=figures(done, chosen), run=done,
    )  # fmt: skip


def _prices(
    schedule: OffloadSchedule, spec: ModelSpec, planned: Any, profile: str | os.PathLike[str] | None, device: str, context_tokens: int
) -> Any:  # fmt: skip
    """Return what decisions that weigh costs go by: of `profile`, or of the plan's machine; None where neither is known or needed."""
    if profile is not None and not schedule.predictor.benefit:
        rule = "no decision of this schedule weighs costs"
        raise InputError("--profile", os.fspath(profile), rule, "leave it out, or set predictor.benefit=true")
    if not schedule.predictor.benefit or (planned is None and profile is None):
        return None
    from ..calibrate.costs.load import load_costs
    from ..executor.model.prices import prices_for

    machine = machine_of(planned) if profile is None else load_hardware(profile)
    stored = weight_format("32" if device == "cpu" else "16")
    costs = load_costs(machine, spec, dense_format=stored)
    return prices_for(schedule, spec, costs, context_tokens=context_tokens)


def check_planned_for(document: Any, spec: ModelSpec, path: str) -> None:
    """Return nothing; raises InputError where a plan was made for another model."""
    planned = model_of(document)
    differ = [name for name in _SAME if getattr(planned, name) != getattr(spec, name)]
    if differ:
        one, other = (getattr(each, differ[0]) for each in (planned, spec))
        rule = f"was made for {planned.name}: {differ[0]} is {one} there and {other} in this model"
        raise InputError("--plan", path, rule, "plan for this model")


def _schedule(
    plan: str | os.PathLike[str] | None, schedule: str | OffloadSchedule | None, settings: Sequence[str]
) -> tuple[OffloadSchedule, Any]:
    """Return the schedule to run, and the plan document it comes from, None where it comes from none."""
    if (plan is None) == (schedule is None):
        raise InputError(
            "--plan", "nothing" if plan is None else "a plan and a schedule", "one of both is needed", "give --plan"
        )
    document = None
    if plan is not None:
        document = read_plan(plan)
        best = document.get("best")
        if document.get("kind") != "offload":
            raise InputError(
                "plan.kind", document.get("kind"), "only plans for one device can be run", "plan --mode offload"
            )
        if not isinstance(best, dict) or not isinstance(best.get("schedule"), dict):
            raise InputError("plan.best", "(absent)", "no schedule", "give a plan.json written by moeplan plan")
        found = schedule_from_dict(best["schedule"])
    else:
        found = schedule if isinstance(schedule, OffloadSchedule) else load_preset(str(schedule))
    return apply_settings(found, dict(map(parse_setting, settings))), document


def popularity_in(trace: str | os.PathLike[str], spec: ModelSpec) -> Any:
    """Return tokens per expert [num_layers, num_experts] of a recording of the model."""
    import numpy as np

    from ..traces.counting import add_loads
    from ..traces.match import check_match

    recording = as_routing(trace)
    check_match(spec, recording)
    counts = np.zeros((recording.num_layers, recording.num_experts), np.int64)
    add_loads(np.asarray(recording.experts), counts)
    return counts
