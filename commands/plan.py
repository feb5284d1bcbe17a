"""The command that searches for the best schedule, for one device or expert parallel.

Modelled: its options and what it prints. Ignored: the search itself (`planner/`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from ..terminal import print_json, print_parallel_plan, print_plan
from ..text_files import check_outputs, write_atomic
from ..units import parse_bytes
from .artefacts import write_offload_report, write_parallel_artefacts, write_perfetto
from .conditions import ConditionedCommand
from .options import (
    HardwareOption,
    JsonFlag,
    MemoryOption,
    ModelOption,
    TraceOption,
    bundled_trace_path,
    model_file,
    rehearse,
)


def plan(
    model: ModelOption,
    hardware: HardwareOption,
    trace: TraceOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="plan.json to write.")] = Path("plan.json"),
    mode: Annotated[str, typer.Option("--mode", help="offload (one device) or ep (expert parallel).")] = "offload",
    memory: MemoryOption = None,
    bits: Annotated[
        str,
        typer.Option(
            "--bits", help="Weight formats the experts may have, e.g. 4 or 4,3,2 (ep: one); native: the checkpoint's."
        ),
    ] = "native",
    objective: Annotated[
        str, typer.Option("--objective", help="offload: tokens_per_s, p99_step_s or least_memory.")
    ] = "tokens_per_s",
    floor: Annotated[
        float | None, typer.Option("--floor", help="offload: tokens/s that --objective least_memory must reach.")
    ] = None,
    exhaustive: Annotated[
        bool,
        typer.Option("--exhaustive", help="offload: let no candidate be outrun early; takes several times as long."),
    ] = False,
    window: Annotated[int, typer.Option("--window", help="offload: forward passes to search on.")] = 2000,
    concurrency: Annotated[int, typer.Option("--concurrency", help="offload: requests decoded together.")] = 1,
    prefill_chunk: Annotated[
        int | None, typer.Option("--prefill-chunk", help="offload: prompt tokens per forward pass.")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="ep: nodes.")] = 1,
    ranks_per_node: Annotated[int, typer.Option("--ranks-per-node", help="ep: devices in each node.")] = 8,
    redundant: Annotated[int, typer.Option("--redundant", help="ep: slots beyond the model's experts.")] = 0,
    phase: Annotated[str, typer.Option("--phase", help="ep: prefill or decode.")] = "decode",
    context: Annotated[int, typer.Option("--context", help="ep: context tokens per request.")] = 4096,
    tokens_per_rank: Annotated[
        int | None,
        typer.Option(
            "--tokens-per-rank", help="ep: tokens on each rank in a step (else 4096 in prefill, 128 in decode)."
        ),
    ] = None,
    search_moves: Annotated[
        int | None,
        typer.Option(
            "--search-moves",
            help="ep: moves the placement search tries in each layer (else 50000); for recordings of single tokens.",
        ),
    ] = None,
    evaluate_on: Annotated[
        list[str] | None,
        typer.Option("--evaluate-on", help="ep: another recording, to see how the plan fares there. Repeatable."),
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Also write an HTML report.")] = None,
    timeline: Annotated[
        Path | None, typer.Option("--timeline", help="Also write the best schedule's Perfetto timeline.")
    ] = None,
    dense_bits: Annotated[
        str | None,
        typer.Option(
            "--dense-bits",
            help="Weight format of everything but routed experts; else 16 (ep: the experts', from 8 bits on).",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Search for the best schedule within a memory budget, and show what it beats and what would help."""
    from ..errors import UnknownName

    check_outputs(
        {"--output": output, "--report": report, "--timeline": timeline},
        {"--model": model_file(model), "--hardware": hardware, "--trace": trace}
        | {f"--evaluate-on {path}": path for path in evaluate_on or ()},
    )
    formats = tuple(part.strip() for part in bits.split(",") if part.strip())
    if not formats:
        raise InputError("--bits", bits, "no weight format named", "write for instance --bits 4")
    if mode == "ep":
        asked = _ParallelFiles(plan=output, report=report, timeline=timeline, others=tuple(evaluate_on or ()))
        options = {
            "num_nodes": nodes, "ranks_per_node": ranks_per_node, "num_redundant": redundant, "context_tokens": context,
            "tokens_per_rank": tokens_per_rank, "dense_bits": dense_bits,
            "memory_bytes": None if memory is None else parse_bytes(memory, "--memory"),
        }  # fmt: skip
        document = _plan_parallel(model, hardware, trace, formats, phase, search_moves, options, asked)
    elif mode == "offload":
        from ..planner.plan import PlanRequest, make_plan, plan_to_dict
        from ..progress import reporter

        rehearsal = rehearse(model, hardware, trace, memory, window, "16" if dense_bits is None else dense_bits)
        request = PlanRequest(
            bits=formats, objective=objective, floor_tokens_per_s=floor, concurrency=concurrency,
            prefill_chunk_tokens=prefill_chunk, exhaustive=exhaustive,
        )  # fmt: skip
        found = make_plan(rehearsal, request, progress=reporter("plan"))
        document = plan_to_dict(found)
        _write(output, document)
        if timeline is not None:
            write_perfetto(timeline, rehearsal, found.best)
        if report is not None:
            write_offload_report(report, document, rehearsal, found.best)
    else:
        raise UnknownName("--mode", mode, ("offload", "ep"))
    if as_json:
        print_json(document)
    elif mode == "ep":
        print_parallel_plan(document, str(output))
    else:
        print_plan(document, str(output))


def _write(output: Path, document: dict[str, Any]) -> None:
    """Write plan.json: first of all outputs, so that nothing that goes wrong with the others loses the search."""
    write_atomic(output, json.dumps(document, indent=1, allow_nan=False) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class _ParallelFiles:
    """What an expert-parallel plan reads and writes besides its recording."""

    plan: Path
    report: Path | None
    timeline: Path | None
    others: tuple[str, ...]


def _plan_parallel(
    model: str,
    hardware: str,
    trace: str,
    formats: tuple[str, ...],
    phase: str,
    search_moves: int | None,
    options: dict[str, Any],
    asked: _ParallelFiles,
) -> dict[str, Any]:
    """Return the document of an expert-parallel plan; a recording of loads will do."""
    from ..errors import UnknownName
    from ..planner.ep_case import EpRequest
    from ..planner.ep_plan import ep_plan_to_dict, make_ep_plan
    from ..planner.ep_replay import replay_of
    from ..progress import reporter
    from ..specs_io import load_hardware, load_model
    from ..traces.format import load_recording
    from ..traces.recording import LoadProfile

    if phase not in ("prefill", "decode"):
        raise UnknownName("--phase", phase, ("prefill", "decode"))
    if len(formats) > 1:
        raise InputError(
            "--bits", ",".join(formats), "the experts of an expert-parallel plan have one format", "name one of them"
        )
    spec = load_model(model)
    profile = load_hardware(hardware)
    recording, *others = (
        load_recording(bundled_trace_path() if path == "bundled" else path) for path in (trace, *asked.others)
    )
    if search_moves is not None and isinstance(recording, LoadProfile):
        raise InputError("--search-moves", search_moves, "no placement is searched from counts alone",
                         "leave it out, or record single tokens")  # fmt: skip
    if search_moves is not None:
        options["search_moves"] = search_moves
    request = EpRequest(
        prefill=phase == "prefill", bits=spec.native_bits if formats[0] == "native" else formats[0],
        workers=os.cpu_count() or 1, **options,
    )  # fmt: skip
    found = make_ep_plan(
        spec, profile, recording, request, progress=reporter("plan"),
        others=dict(zip(asked.others, others, strict=True)),
    )  # fmt: skip
    document = ep_plan_to_dict(found)
    _write(asked.plan, document)
    if asked.report is not None or asked.timeline is not None:
        write_parallel_artefacts(asked.report, asked.timeline, document, replay_of(found), profile)
    return document


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command(cls=ConditionedCommand)(plan)
