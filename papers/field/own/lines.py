"""A person's own measured speeds, as a benchmark tool printed them, become predictions on a machine of theirs.

Modelled: model, weight format, placement and back end as each line states them, held against what the command line says: where the two
contradict each other, nothing is predicted. A line of another model than asked for, or of something that is not predicted, is kept with
the reason. Ignored: builds, and settings that the tool does not state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....base.errors import InputError, MoeplanError
from ....calibrate.fitting.adjust import moved
from ....calibrate.fitting.update import Measured, Update, updated
from ....calibrate.imports.bench_line import BenchLine
from ....specs.machines.compose import host_bytes_per_s
from ....specs.machines.load import load_machine
from ....specs.machines.notation import is_parts, parse_parts
from ....specs.machines.parts import Parts
from ....specs.machines.profile import Profile
from ....specs.memory import kv_bytes_per_value
from ....specs.models import ModelSpec, weight_format
from ..machine import NotExpressible
from ..predict import predict_setup, speed
from ..rows import Report
from ..setup import Setup, set_up_on
from .machine import backend_of, check_machine, engine_of, with_room
from .model import formats_of_line, model_of_line
from .placement import placement_of


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnLine:
    """One line with what its prediction needs, or why there is none."""

    line: BenchLine
    model: ModelSpec | None
    parts: tuple[tuple[int, Setup], ...]
    """(tokens, setup) of prompt and generation, whichever it has."""
    threads_share: float
    """Of the machine's cores, how many it used."""
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnPrediction:
    """Tokens a second of one line."""

    value: float
    low: float
    high: float
    bound: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """A file of lines on one machine."""

    profile: Profile
    lines: tuple[OwnLine, ...]

    @property
    def usable(self) -> list[OwnLine]:
        """Those that can be predicted."""
        return [one for one in self.lines if one.reason is None]

    @property
    def warnings(self) -> list[str]:
        """What was left out, and why: one sentence a reason."""
        found: dict[str, list[str]] = {}
        for one in self.lines:
            if one.reason is not None:
                found.setdefault(one.reason, []).append(one.line.where)
        return [f"left out: {_listed(places)}: {reason}" for reason, places in found.items()]


def open_own(tool: str, lines: Sequence[BenchLine], *, hardware: str, model: ModelSpec | None = None, quant: str | None = None,
             engine: str | None = None) -> Own:  # fmt: skip
    """Return lines on the machine that `hardware` names.

    Raises InputError where the command line contradicts the file, or where no line is left.
    """
    engine = engine_of(tool, lines, hardware, engine)
    backend = backend_of(lines, hardware)
    profile = load_machine(hardware, engine, backend)
    if profile.curves:
        rule = f"its tables ({next(iter(profile.curves))}, …) were measured and stand in place of constants"
        raise InputError("--hardware", hardware, rule, "name the machine by its parts")
    parts = parse_parts(hardware) if is_parts(hardware) else None
    check_machine(lines, profile, parts)
    roomy = with_room(profile, parts)
    found = [_own_line(line, roomy, parts, model, quant) for line in lines]
    if all(one.reason is not None for one in found):
        reasons = sorted({str(one.reason) for one in found})
        raise InputError(
            tool,
            f"{len(found)} lines",
            f"none can be predicted: {'; '.join(reasons)}",
            "measure others, or correct the options",
        )
    return Own(profile=profile, lines=tuple(found))


def update_own(own: Own, citation: str) -> Update:
    """Return what the lines make of the machine."""
    measured = [
        Measured(
            tokens_per_s=one.line.tokens_per_s, relative_deviation=one.line.relative_deviation, predict=_Predict(one)
        )
        for one in own.usable
    ]
    return updated(own.profile, measured, citation)


def predict_own(one: OwnLine, profile: Profile) -> OwnPrediction:
    """Return the prediction of a line on `profile`, with its interval."""
    found = [(tokens, predict_setup(_on(setup, profile, one))) for tokens, setup in one.parts]
    value, low, high = (
        _together([(tokens, float(getattr(each, name) or 0.0)) for tokens, each in found])
        for name in ("value", "low", "high")
    )
    longest = max(found, key=lambda each: each[0] / float(each[1].value or 1.0))
    return OwnPrediction(value=value, low=low, high=high, bound=str(longest[1].bound))


@dataclass(frozen=True, slots=True)
class _Predict:
    """A line's speed as a function of the machine."""

    one: OwnLine

    def __call__(self, profile: Profile) -> float:
        return _together([(tokens, speed(_on(setup, profile, self.one))) for tokens, setup in self.one.parts])


def _together(parts: Sequence[tuple[int, float]]) -> float:
    """Return tokens a second of parts one after another."""
    return sum(tokens for tokens, _ in parts) / sum(tokens / rate for tokens, rate in parts)


def _on(setup: Setup, profile: Profile, one: OwnLine) -> Setup:
    """Return a setup with another machine's constants; what makes room for the run stays."""
    if one.threads_share < 1:
        profile = moved(profile, {"host.cpu.flops_per_s": one.threads_share})
    host = dataclasses.replace(profile.host, memory_bytes=setup.profile.host.memory_bytes)
    device = dataclasses.replace(profile.device, memory_bytes=setup.profile.device.memory_bytes)
    return dataclasses.replace(setup, profile=dataclasses.replace(profile, host=host, device=device))


# --- one line --------------------------------------------------------------------------------------------------------------


def _own_line(
    line: BenchLine, profile: Profile, parts: Parts | None, asked: ModelSpec | None, quant: str | None
) -> OwnLine:
    reason = line.reason
    model, other = model_of_line(line, asked)
    reason = reason or other
    pieces: list[tuple[int, Setup]] = []
    if reason is None and model is not None:
        model, experts, dense = formats_of_line(line, model, quant)
        try:
            pieces = _pieces(
                line, model, (experts, dense), profile, host_bytes_per_s(parts) if parts is not None else None
            )
        except NotExpressible as error:
            reason = str(error)
        except MoeplanError as error:
            reason = f"{error}"
    share = 1.0
    if parts is not None and parts.cpu is not None and line.threads is not None and profile.device.kind == "gpu":
        share = min(1.0, max(1, line.threads) / (parts.cpu.cores * parts.sockets))
    return OwnLine(line=line, model=model, parts=tuple(pieces), threads_share=share, reason=reason)


def _pieces(
    line: BenchLine, model: ModelSpec, formats: Any, profile: Profile, host_rate: float | None
) -> list[tuple[int, Setup]]:
    """Return (tokens, setup) of a line's prompt and of its generation."""
    placement = placement_of(line, model, profile)
    keys, values = (kv_bytes_per_value(name) for name in line.kv_types)
    found = []
    before, prompt = line.depth_tokens, line.prompt_tokens // line.requests
    generated = line.generated_tokens // line.requests
    for phase, tokens, context in (
        ("prefill", line.prompt_tokens, before + prompt // 2), ("decode", line.generated_tokens, before + prompt + generated // 2),
    ):  # fmt: skip
        if not tokens:
            continue
        workload = {
            "prompt_tokens": line.prompt_tokens or None, "context_tokens": max(1, context), "ubatch": line.ubatch_tokens,
            "batch": 1 if phase == "prefill" else line.requests,
        }  # fmt: skip
        row = {
            "metric": f"{phase}_tokens_per_s", "value": line.tokens_per_s, "placement": placement, "workload": workload,
            "quant": {"experts": line.quant},
        }  # fmt: skip
        report = Report(id=line.where, row=row, folder=Path())
        setup = set_up_on(report, model, profile, formats, [], host_bytes_per_s=host_rate)
        found.append((tokens, dataclasses.replace(setup, kv_bytes_per_value=(keys + values) / 2)))
    for _, setup in found:
        speed(setup)  # refuses what does not fit
    return found


def _listed(places: Sequence[str]) -> str:
    shown = ", ".join(places[:4])
    return shown if len(places) <= 4 else f"{shown} and {len(places) - 4} more"


# Kept here so that what a line is predicted with can be said in one place.
def described(one: OwnLine) -> dict[str, Any]:
    """Return what a line is predicted as, in plain values."""
    if one.model is None or not one.parts:
        return {"model": one.line.model, "schedule": None, "experts": None}
    setup = one.parts[0][1]
    return {
        "model": one.model.name,
        "schedule": setup.schedule.name,
        "experts": weight_format(one.model.native_bits).name,
    }
