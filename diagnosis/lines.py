"""Lines of a benchmark file become cases, each with what it measured.

Modelled: lines of one phase (a prompt, or generated tokens) as `papers.field.own` reads them: model, weight format, placement, micro-batch,
cache types, threads and depth as the file states them. Ignored: prompt and reply in one test, which has no interval of a phase.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..base.errors import InputError, MoeplanError
from ..calibrate.imports.bench_line import BenchLine
from ..papers.field.machine import NotExpressible
from ..papers.field.own.machine import backend_of, check_machine, engine_of
from ..papers.field.own.model import model_of_line
from ..papers.field.own.placement import placement_of
from ..specs.machines.engines import choose_backend, load_engine
from ..specs.machines.load import load_machine
from ..specs.machines.notation import is_parts, parse_parts
from ..specs.models import ModelSpec
from ..specs.models.load import load_model
from .case import DECODE, PREFILL, Case, machine_of

TOOL = "llama-bench"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A line with its case, or why there is none."""

    line: BenchLine
    case: Case | None
    metric: str | None
    reason: str | None


def cases_of_lines(lines: Sequence[BenchLine], *, hardware: str, model: str | None, quant: str | None, engine: str | None,
                   built: str | None) -> list[Measured]:  # fmt: skip
    """Return every line with its case; raises InputError where the command line contradicts the file, or where no line is left."""
    asked = None if model is None else load_model(model)
    name = engine_of(TOOL, lines, hardware, engine)
    found = [_measured(line, hardware, asked, quant, name, backend_of(lines, hardware), built) for line in lines]
    check_machine(lines, load_machine(hardware, name), parse_parts(hardware) if is_parts(hardware) else None)
    if all(one.case is None for one in found):
        reasons = "; ".join(sorted({str(one.reason) for one in found}))
        raise InputError(
            TOOL, f"{len(found)} lines", f"none can be predicted: {reasons}", "measure others, or correct the options"
        )
    return found


def _measured(line: BenchLine, hardware: str, asked: ModelSpec | None, quant: str | None, engine: str | None, backend: str | None,
              built: str | None) -> Measured:  # fmt: skip
    def none(reason: str) -> Measured:
        return Measured(line=line, case=None, metric=None, reason=reason)

    if line.reason is not None:
        return none(line.reason)
    if line.prompt_tokens and line.generated_tokens:
        return none("prompt and reply in one test: measure them apart (-p, -n)")
    model, other = model_of_line(line, asked)
    if model is None:
        return none(other or "of another model")
    metric = PREFILL if line.prompt_tokens else DECODE
    try:
        case = _case(line, hardware, model, quant, engine, backend, built)
        case.predicted(metric)  # refuses what does not fit
    except InputError as error:
        if error.field in ("--quant", "--hardware"):
            raise
        return none(error.rule)
    except (NotExpressible, MoeplanError) as error:
        return none(str(error))
    return Measured(line=line, case=case, metric=metric, reason=None)


def _case(line: BenchLine, hardware: str, model: ModelSpec, quant: str | None, engine: str | None, backend: str | None,
          built: str | None) -> Case:  # fmt: skip
    """Return the case of a line; raises NotExpressible for a placement that is not predicted."""
    parts, profile = None, load_machine(hardware, engine, backend)
    own = profile.engine
    name = own.name if own is not None else "llama.cpp"
    if is_parts(hardware):
        parts = parse_parts(hardware)
        if line.threads is not None and parts.cpu is not None:
            parts = dataclasses.replace(parts, threads=max(1, min(line.threads, parts.cpu.cores * parts.sockets)))
        backend = choose_backend(load_engine(name), backend, "cpu" if parts.gpu is None else parts.gpu.backend)
        profile = machine_of(parts, name, backend, built)
    return Case(
        model=model, model_name=model.name, quant=quant or line.quant, parts=parts, profile=profile, engine=name,
        backend=backend or ("cuda" if own is None else own.backend), placement=placement_of(line, model, profile),
        ubatch=line.ubatch_tokens or load_engine(name).prompt_chunk(profile.device.memory_bytes.value),
        kv_types=line.kv_types, prompt=line.prompt_tokens, reply=line.generated_tokens, depth=line.depth_tokens, built=built,
        line=line if quant is None else dataclasses.replace(line, quant=line.quant),
        concurrency=line.requests, threads=line.threads,
    )  # fmt: skip
