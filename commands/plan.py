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

from ..base.errors import InputError
from ..base.terminal import print_json, print_parallel_plan, print_plan
from ..base.text_files import check_outputs, write_atomic
from ..base.units import parse_bytes, parse_quantity
from .artefacts import write_offload_report, write_parallel_artefacts, write_perfetto
from .options.bounds import MOVES, PASSES, RANKS, SLOTS, TOKENS_PER_RANK, TOKENS_PER_S, WEEK_S, between
from .options.conditions import ConditionedCommand, was_given
from .options.declarations import (
    ConcurrencyOption,
    ContextOption,
    EngineOption,
    ForOption,
    HardwareOption,
    JsonFlag,
    KvOption,
    MemoryOption,
    ModelOption,
    OptionalTraceOption,
    PromptOption,
    QuantOption,
    ReplyOption,
    ReserveOption,
    UbatchOption,
    bundled_trace_path,
    model_file,
)
from .options.settings import Settings, print_settings, split_settings
from .options.subject import Subject, open_subject, usual_dense_bits

# Fields of a request and the parameters whose options say the same.
_REQUEST_OPTIONS = {
    "bits": "bits", "objective": "objective", "floor_tokens_per_s": "floor", "concurrency": "concurrency",
    "prefill_chunk_tokens": "ubatch", "ttft_s": "ttft", "tpot_s": "tpot", "exhaustive": "exhaustive",
    "num_nodes": "nodes", "ranks_per_node": "ranks_per_node",
    "num_redundant": "redundant", "prefill": "phase", "context_tokens": "context", "tokens_per_rank": "tokens_per_rank",
    "search_moves": "search_moves", "dense_bits": "dense_bits", "memory_bytes": "memory",
}  # fmt: skip
# Context of a request where an expert-parallel plan is told none.
_EP_CONTEXT = 4096

FloorOption = Annotated[
    float | None,
    typer.Option(
        "--floor",
        help="offload: what --objective least_memory must reach: generated tokens (prompt tokens where none are) per second of the window.",
        callback=between(1e-9, TOKENS_PER_S, "tokens/s"),
    ),
]
WindowOption = Annotated[
    int,
    typer.Option(
        "--window", help="offload: forward passes to search on.", callback=between(1, PASSES, "forward passes")
    ),
]
TtftOption = Annotated[
    str | None, typer.Option("--ttft", help="offload: most that the first token of a request may take, e.g. 2s.")
]
TpotOption = Annotated[
    str | None, typer.Option("--tpot", help="offload: most that each further token may take, e.g. 50ms.")
]
NodesOption = Annotated[int, typer.Option("--nodes", help="ep: nodes.", callback=between(1, RANKS, "nodes"))]
RanksOption = Annotated[
    int,
    typer.Option("--ranks-per-node", help="ep: devices in each node.", callback=between(1, RANKS, "devices")),
]
RedundantOption = Annotated[
    int,
    typer.Option(
        "--redundant",
        help="ep: slots of a layer beyond one for each of the model's experts, over all ranks.",
        callback=between(0, SLOTS, "slots"),
    ),
]
TokensPerRankOption = Annotated[
    int | None,
    typer.Option(
        "--tokens-per-rank",
        help="ep: tokens on each rank in a step (else 4096 in prefill, 128 in decode).",
        callback=between(1, TOKENS_PER_RANK, "tokens"),
    ),
]
SearchMovesOption = Annotated[
    int | None,
    typer.Option(
        "--search-moves",
        help="ep: moves the placement search tries in each layer (else 50000); for recordings of single tokens.",
        callback=between(0, MOVES, "moves"),
    ),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change one thing, key=value, in its own units: of the machine (machine.host.memory_bytes=96GiB), the model "
        "(model.top_k=4) or the request (request.concurrency=8). Repeatable.",
    ),
]


def plan(
    ctx: typer.Context,
    model: ModelOption,
    hardware: HardwareOption,
    trace: OptionalTraceOption = None,
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
        str | None,
        typer.Option(
            "--objective",
            help="offload: request_s (prompt and reply of a request; default without a recording), ttft_s, decode_tokens_per_s, "
            "tokens_per_s (the whole window, prompts and answers; default for a recording), p99_step_s or least_memory.",
        ),
    ] = None,
    floor: FloorOption = None,
    ttft: TtftOption = None,
    tpot: TpotOption = None,
    target: ForOption = None,
    engine: EngineOption = None,
    quant: QuantOption = None,
    prompt_tokens: PromptOption = None,
    reply_tokens: ReplyOption = None,
    context: ContextOption = None,
    concurrency: ConcurrencyOption = None,
    ubatch: UbatchOption = None,
    kv_type: KvOption = "f16",
    reserve: ReserveOption = None,
    exhaustive: Annotated[
        bool,
        typer.Option(
            "--exhaustive", help="offload: let no candidate be eliminated by racing early; takes several times as long."
        ),
    ] = False,
    window: WindowOption = 2000,
    nodes: NodesOption = 1,
    ranks_per_node: RanksOption = 8,
    redundant: RedundantOption = 0,
    phase: Annotated[str, typer.Option("--phase", help="ep: prefill or decode.")] = "decode",
    tokens_per_rank: TokensPerRankOption = None,
    search_moves: SearchMovesOption = None,
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
            help="Weight format of everything but routed experts (native: as the checkpoint's attention); else the checkpoint's, "
            "16 at most (ep with --bits: the experts', from 8 bits on).",
        ),
    ] = None,
    settings: SettingsOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Search for the best schedule within a memory budget, and show what it beats and what would help."""
    from ..base.errors import UnknownName

    check_outputs(
        {"--output": output, "--report": report, "--timeline": timeline},
        {"--model": model_file(model), "--hardware": hardware, "--trace": trace}
        | {f"--evaluate-on {path}": path for path in evaluate_on or ()},
    )
    changes = split_settings(settings)
    changes.refuse("schedule", "the search chooses the schedule; machine., model. and request. can be set")
    said = {field: f"--{name.replace('_', '-')}" for field, name in _REQUEST_OPTIONS.items() if was_given(ctx, name)}
    formats = tuple(part.strip() for part in bits.split(",") if part.strip())
    if not formats:
        raise InputError("--bits", bits, "no weight format named", "write for instance --bits 4")
    if mode == "ep":
        asked = _Asked(
            plan=output, report=report, timeline=timeline, others=tuple(evaluate_on or ()), changes=changes, said=said
        )
        options = {
            "num_nodes": nodes, "ranks_per_node": ranks_per_node, "num_redundant": redundant, "context_tokens": context or _EP_CONTEXT,
            "tokens_per_rank": tokens_per_rank, "dense_bits": dense_bits,
            "memory_bytes": None if memory is None else parse_bytes(memory, "--memory"),
        }  # fmt: skip
        if trace is None:
            raise InputError(
                "--trace", "(absent)", "expert-parallel plans are of recordings", "give one; loads will do"
            )
        document = _plan_parallel(model, hardware, trace, formats, phase, search_moves, options, asked)
    elif mode == "offload":
        goal_engine = _target(target, engine)
        subject = open_subject(
            model=model, hardware=hardware, trace=trace, engine=goal_engine or engine, quant=quant, prompt_tokens=prompt_tokens,
            reply_tokens=reply_tokens, context=context, concurrency=concurrency, ubatch=ubatch, kv_type=kv_type, memory=memory,
            window=window if trace is not None or was_given(ctx, "window") else None, dense_bits=dense_bits, reserve=reserve,
            changes=changes,
        )  # fmt: skip
        goal = {
            "objective": objective or ("request_s" if trace is None else "tokens_per_s"), "floor_tokens_per_s": floor,
            "ttft_s": _time(ttft, "--ttft"), "tpot_s": _time(tpot, "--tpot"), "exhaustive": exhaustive,
        }  # fmt: skip
        document = _plan_offload(
            subject,
            formats,
            goal,
            changes,
            said,
            _Outputs(plan=output, report=report, timeline=timeline, engine=goal_engine),
        )
    else:
        raise UnknownName("--mode", mode, ("offload", "ep"))
    if as_json:
        print_json(document)
    elif mode == "ep":
        print_parallel_plan(document, str(output))
    else:
        print_plan(document, str(output))
        typer.echo("\n".join(document["notes"]))
        if "for" in document:
            typer.echo(f"command lines for {document['for']['engine']}: moeplan emit {output}")
    if not as_json:
        print_settings(document)


def _time(text: str | None, option: str) -> float | None:
    """Return a time that is asked for in seconds; raises InputError for nought."""
    if text is None:
        return None
    seconds = parse_quantity(text, "s", option)
    if not 0 < seconds <= WEEK_S:
        raise InputError(option, text, f"not a time above zero, up to {WEEK_S:g} s", "write for instance 50ms")
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outputs:
    """Files that a plan for one device writes."""

    plan: Path
    report: Path | None
    timeline: Path | None
    engine: str | None
    """What the plan is for; None: whatever can run it."""


def _target(target: str | None, engine: str | None) -> str | None:
    """Return the engine that a plan is for; raises UnknownName, or InputError where --engine says another."""
    from ..planner.served.plan import check_engine

    if target is None:
        return None
    name = "llama.cpp" if target == "llamacpp" else target
    check_engine(name)
    if engine not in (None, name):
        raise InputError("--engine", engine, f"--for {target} plans for {name}", "leave out one of the two")
    return name


def _plan_offload(subject: Subject, formats: tuple[str, ...], goal: dict[str, Any], changes: Settings, said: dict[str, str],
                  outputs: _Outputs) -> dict[str, Any]:  # fmt: skip
    """Return the document of a plan for one device, written with what was asked for besides."""
    from ..base.progress import reporter
    from ..planner.offload.plan import PlanRequest, make_plan, plan_to_dict

    simulation = subject.simulation
    asked = PlanRequest(bits=formats, concurrency=subject.concurrency, prefill_chunk_tokens=subject.ubatch, **goal)
    request = changes.changed_request(asked, said)
    more: dict[str, Any] = {}
    if outputs.engine is None:
        found = make_plan(simulation, request, progress=reporter("plan"))
    else:
        from ..planner.served.plan import make_served_plan, served_to_dict
        from ..specs.machines.engines import load_engine

        fixed = "prefill_chunk_tokens" in said or "prefill_chunk_tokens" in changes.request
        ubatch = request.prefill_chunk_tokens if fixed else None
        served = make_served_plan(simulation, request, outputs.engine, ubatch=ubatch, progress=reporter("plan"))
        found, more = served.plan, {"for": served_to_dict(served, outputs.engine, load_engine(outputs.engine).checked)}
    document = (
        plan_to_dict(found) | more | {"asked": subject.asked, "notes": list(subject.notes), "set_by_user": changes.made}
    )
    _write(outputs.plan, document)
    if outputs.timeline is not None:
        write_perfetto(outputs.timeline, simulation, found.best)
    if outputs.report is not None:
        write_offload_report(outputs.report, document, simulation, found.best)
    return document


def _write(output: Path, document: dict[str, Any]) -> None:
    """Write plan.json: first of all outputs, so that nothing that goes wrong with the others loses the search."""
    write_atomic(output, json.dumps(document, indent=1, allow_nan=False) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What an expert-parallel plan reads and writes besides its recording, and what the command line sets."""

    plan: Path
    report: Path | None
    timeline: Path | None
    others: tuple[str, ...]
    changes: Settings
    said: dict[str, str]
    """Fields of the request that have been given by an option of their own: field → option."""


def _plan_parallel(
    model: str,
    hardware: str,
    trace: str,
    formats: tuple[str, ...],
    phase: str,
    search_moves: int | None,
    options: dict[str, Any],
    asked: _Asked,
) -> dict[str, Any]:
    """Return the document of an expert-parallel plan; a recording of loads will do."""
    from ..base.errors import UnknownName
    from ..base.progress import reporter
    from ..planner.parallel.case import EpRequest
    from ..planner.parallel.plan import ep_plan_to_dict, make_ep_plan
    from ..planner.parallel.replay import replay_of
    from ..specs.machines.load import load_machine
    from ..specs.models.load import load_model
    from ..traces.format import load_recording
    from ..traces.recording import LoadProfile

    if phase not in ("prefill", "decode"):
        raise UnknownName("--phase", phase, ("prefill", "decode"))
    if len(formats) > 1:
        raise InputError(
            "--bits", ",".join(formats), "the experts of an expert-parallel plan have one format", "name one of them"
        )
    spec = asked.changes.changed_model(load_model(model))
    profile = asked.changes.changed_machine(load_machine(hardware))
    recording, *others = (
        load_recording(bundled_trace_path() if path == "bundled" else path) for path in (trace, *asked.others)
    )
    if search_moves is not None and isinstance(recording, LoadProfile):
        raise InputError("--search-moves", search_moves, "no placement is searched from counts alone",
                         "leave it out, or record single tokens")  # fmt: skip
    if search_moves is not None:
        options["search_moves"] = search_moves
    if options["dense_bits"] == "native":
        options["dense_bits"] = spec.native_dense_bits
    elif options["dense_bits"] is None and formats[0] == "native":
        options["dense_bits"] = usual_dense_bits(spec)
    asked_for = EpRequest(
        prefill=phase == "prefill", bits=spec.native_bits if formats[0] == "native" else formats[0],
        workers=os.cpu_count() or 1, **options,
    )  # fmt: skip
    request = asked.changes.changed_request(asked_for, asked.said)
    found = make_ep_plan(
        spec, profile, recording, request, progress=reporter("plan"),
        others=dict(zip(asked.others, others, strict=True)),
    )  # fmt: skip
    document = ep_plan_to_dict(found) | {"set_by_user": asked.changes.made}
    _write(asked.plan, document)
    if asked.report is not None or asked.timeline is not None:
        write_parallel_artefacts(asked.report, asked.timeline, document, replay_of(found), profile)
    return document


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command(cls=ConditionedCommand)(plan)
