"""The command that searches for the best schedule, for one device or expert parallel.

Modelled: its options and what it prints. Ignored: the search itself (`planner/`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.errors import InputError
from ..base.terminal import print_json, print_parallel_plan, print_plan
from ..base.text_files import check_outputs, write_atomic
from .options.bounds import MOVES, PASSES, TOKENS_PER_S, between
from .options.conditions import ConditionedCommand, was_given
from .options.declarations import (
    ConcurrencyOption,
    ContextOption,
    DraftOption,
    ForOption,
    HardwareOption,
    JsonFlag,
    KvTypesOption,
    MemoryOption,
    ModelOption,
    OptionalTraceOption,
    PlanEngineOption,
    PolicyOption,
    QuantOption,
    ReserveOption,
    SpeculativeOption,
    UbatchOption,
    model_file,
)
from .options.lengths import (
    CachedOption,
    LengthsOption,
    PromptOption,
    ReplyOption,
    RequestsOption,
    SpreadOption,
    lengths_asked,
)
from .options.parallel import (
    REQUEST_OPTIONS,
    AcceptanceOption,
    AgainstOption,
    AttentionTpOption,
    CountWindowOption,
    DraftTokensOption,
    FactorOption,
    MovesOption,
    NodesOption,
    PeriodOption,
    PhaseOption,
    PrefillShareOption,
    RanksOption,
    RebalanceEveryOption,
    RedundantOption,
    SecondsOption,
    TokensPerRankOption,
    check_mode,
    contexts_of,
    drafts_of,
    factors_of,
    latency_of,
    parallel_request,
    time_of,
)
from .options.settings import print_settings
from .parts.artefacts import write_offload_report, write_parallel_artefacts, write_perfetto
from .parts.parallel import print_parallel_answer

# Fields of a request and the parameters whose options say the same.
_REQUEST_OPTIONS = {
    "objective": "objective", "floor_tokens_per_s": "floor", "prefill_chunk_tokens": "ubatch", "ttft_s": "ttft", "tpot_s": "tpot",
    "exhaustive": "exhaustive", "seconds": "seconds", **REQUEST_OPTIONS,
}  # fmt: skip
FormatsOption = Annotated[
    str,
    typer.Option(
        "--bits", help="Weight formats the experts may have, e.g. 4 or 4,3,2 (ep: one); native: the checkpoint's."
    ),
]
ObjectiveOption = Annotated[
    str | None,
    typer.Option(
        "--objective",
        help="offload: request_s (prompt and reply of a request; default without a recording), ttft_s, decode_tokens_per_s, "
        "requests_per_s, tokens_per_s (the whole window, prompts and answers; default for a recording), p99_step_s or least_memory.",
    ),
]
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
    str | None, typer.Option("--ttft", help="Most that the first token of a request may take, e.g. 2s.")
]
TpotOption = Annotated[
    str | None,
    typer.Option(
        "--tpot",
        help="Most that each further token may take, e.g. 50ms; ep without a batch: the largest that keeps it is planned for.",
    ),
]
SearchMovesOption = Annotated[
    int | None,
    typer.Option(
        "--search-moves",
        help="ep: moves the placement search tries in each layer (else 50000, fewer above 30 layers); for recordings of single tokens.",
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
ExhaustiveOption = Annotated[
    bool,
    typer.Option(
        "--exhaustive", help="offload: let no candidate be eliminated by racing early; takes several times as long."
    ),
]
EvaluateOnOption = Annotated[
    list[str] | None,
    typer.Option("--evaluate-on", help="ep: another recording, to see how the plan fares there. Repeatable."),
]
TimelineOption = Annotated[
    Path | None, typer.Option("--timeline", help="Also write the best schedule's Perfetto timeline.")
]
DenseBitsOption = Annotated[
    str | None,
    typer.Option(
        "--dense-bits",
        help="Weight format of everything but routed experts (native: as the checkpoint's attention); else the checkpoint's, "
        "16 at most (ep with --bits: the experts', from 8 bits on).",
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
    bits: FormatsOption = "native",
    objective: ObjectiveOption = None,
    floor: FloorOption = None,
    ttft: TtftOption = None,
    tpot: TpotOption = None,
    target: ForOption = None,
    engine: PlanEngineOption = None,
    quant: QuantOption = None,
    prompt_tokens: PromptOption = None,
    reply_tokens: ReplyOption = None,
    cached_tokens: CachedOption = None,
    length_spread: SpreadOption = None,
    requests: RequestsOption = None,
    lengths: LengthsOption = None,
    context: ContextOption = None,
    concurrency: ConcurrencyOption = None,
    ubatch: UbatchOption = None,
    kv_type: KvTypesOption = "f16",
    reserve: ReserveOption = None,
    exhaustive: ExhaustiveOption = False,
    window: WindowOption = 2000,
    nodes: NodesOption = 1,
    ranks_per_node: RanksOption = 8,
    attention_tp: AttentionTpOption = None,
    redundant: RedundantOption = None,
    against: AgainstOption = None,
    factor: FactorOption = None,
    seconds: SecondsOption = None,
    phase: PhaseOption = "decode",
    tokens_per_rank: TokensPerRankOption = None,
    draft_tokens: DraftTokensOption = None,
    acceptance: AcceptanceOption = None,
    draft: DraftOption = None,
    speculative: SpeculativeOption = False,
    prefill_share: PrefillShareOption = None,
    search_moves: SearchMovesOption = None,
    evaluate_on: EvaluateOnOption = None,
    period: PeriodOption = None,
    rebalance_every: RebalanceEveryOption = None,
    count_window: CountWindowOption = None,
    moves: MovesOption = None,
    report: Annotated[Path | None, typer.Option("--report", help="Also write an HTML report.")] = None,
    timeline: TimelineOption = None,
    dense_bits: DenseBitsOption = None,
    settings: SettingsOption = None,
    policy: PolicyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Search for the best schedule within a memory budget, and show what it beats and what would help."""
    from ..api.plan import plan as search
    from ..api.settings import open_settings
    from ..base.progress import reporter

    check_outputs(
        {"--output": output, "--report": report, "--timeline": timeline},
        {
            "--model": model_file(model),
            "--hardware": hardware,
            "--trace": trace,
            "--lengths": lengths,
            "--policy": policy,
        }
        | {f"--evaluate-on {path}": path for path in evaluate_on or ()}
        | {f"--period {path}": path for path in period or ()},
    )
    changes = open_settings(settings)
    changes.refuse_repeated(
        {field: f"--{name.replace('_', '-')}" for field, name in _REQUEST_OPTIONS.items() if was_given(ctx, name)}
    )
    formats = tuple(part.strip() for part in bits.split(",") if part.strip())
    if not formats:
        raise InputError("--bits", bits, "no weight format named", "write for instance --bits 4")
    given: dict[str, Any] = {"trace": trace, "memory": memory, "dense_bits": dense_bits, "settings": changes, "policy": policy,
                             "progress": reporter("plan")}  # fmt: skip
    if check_mode(mode):
        tries: dict[str, Any] = {} if search_moves is None else {"search_moves": search_moves}
        many = parallel_request(
            phase, ",".join(formats), num_nodes=nodes, ranks_per_node=ranks_per_node, num_redundant=redundant,
            attention_ranks=attention_tp, tokens_per_rank=tokens_per_rank, concurrency=concurrency, kv_type=kv_type,
            **contexts_of(context, prompt_tokens, reply_tokens, prefill=phase == "prefill"), **tries,
            **latency_of(ctx),
        )  # fmt: skip
        planned = search(
            model,
            hardware,
            request=many,
            evaluate_on={name: name for name in evaluate_on or ()},
            period=period,
            rebalance_every=rebalance_every,
            count_window=count_window,
            moves=moves,
            engine=engine,
            reserve=reserve,
            target=target,
            against=against,
            factors=factors_of(factor),
            seconds=seconds,
            **given,
        )
        document = planned.to_dict()
        _write(output, document)
        if report is not None or timeline is not None:
            from ..planner.parallel.replay import replay_of

            write_parallel_artefacts(report, timeline, document, replay_of(planned), planned.search.simulation.profile)
    else:
        from ..planner.offload.plan import OffloadRequest

        request = OffloadRequest(
            bits=formats, objective=objective or ("request_s" if trace is None else "tokens_per_s"), floor_tokens_per_s=floor,
            ttft_s=time_of(ttft, "--ttft"), tpot_s=time_of(tpot, "--tpot"), exhaustive=exhaustive, concurrency=concurrency or 1,
            prefill_chunk_tokens=ubatch, seconds=seconds,
        )  # fmt: skip
        listed = lengths_asked(
            prompt_tokens=prompt_tokens, reply_tokens=reply_tokens, cached_tokens=cached_tokens, spread=length_spread,
            requests=requests, file=lengths, concurrency=concurrency,
        )  # fmt: skip
        found = search(
            model, hardware, request=request, target="llama.cpp" if target == "llamacpp" else target,
            engine=engine, quant=quant, prompt_tokens=None if listed else prompt_tokens,
            reply_tokens=None if listed else reply_tokens, lengths=listed,
            context=context, kv_type=kv_type, reserve=reserve, window=window if was_given(ctx, "window") else None,
            **drafts_of(ctx), **given,
        )  # fmt: skip
        document = found.to_dict()
        _write(output, document)
        if timeline is not None:
            write_perfetto(timeline, found.simulation, found.best)
        if report is not None:
            write_offload_report(report, document, found.simulation, found.best)
    if as_json:
        print_json(document)
    elif mode == "ep":
        print_parallel_answer(document)
        print_parallel_plan(document, str(output))
    else:
        print_plan(document, str(output))
        typer.echo("\n".join(document["notes"]))
        if "for" in document:
            typer.echo(f"command lines for {document['for']['engine']}: moeplan emit {output}")
    if not as_json:
        print_settings(document)


def _write(output: Path, document: dict[str, Any]) -> None:
    """Write plan.json: first of all outputs, so that nothing that goes wrong with the others loses the search."""
    write_atomic(output, json.dumps(document, indent=1, allow_nan=False) + "\n")


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command(cls=ConditionedCommand)(plan)
