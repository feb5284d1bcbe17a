"""The command that predicts one schedule.

Modelled: its options and what it prints; routing from a recording, or of the model's family where none is given. Ignored: the
prediction itself (`sim/`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base.errors import InputError
from ..base.terminal import print_json, print_prediction
from ..base.text_files import check_outputs
from .options.conditions import ConditionedCommand
from .options.declarations import (
    ConcurrencyOption,
    ContextOption,
    DraftOption,
    EngineOption,
    HardwareOption,
    JsonFlag,
    KvOption,
    MemoryOption,
    ModelOption,
    OptionalDenseBitsOption,
    OptionalTraceOption,
    PolicyOption,
    QuantOption,
    ReserveOption,
    SetOption,
    SplitOption,
    UbatchOption,
    WindowOption,
    complete_schedule,
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
    AcceptanceOption,
    AttentionTpOption,
    BitsOption,
    DraftTokensOption,
    EpTpotOption,
    EpTtftOption,
    NodesOption,
    PhaseOption,
    PrefillShareOption,
    RanksOption,
    TokensPerRankOption,
    check_mode,
)
from .options.settings import print_settings
from .parts.artefacts import write_perfetto
from .parts.parallel import print_parallel_prediction, simulate_many

_OLD_NAMES = {"twin": "compiled", "simpy": "simpy", "both": "both"}


def simulate(
    ctx: typer.Context,
    model: ModelOption,
    hardware: HardwareOption,
    trace: OptionalTraceOption = None,
    mode: Annotated[str, typer.Option("--mode", help="offload (one device) or ep (expert parallel).")] = "offload",
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            help="Preset to start from (moeplan schedule list); default: mixtral-offloading (-code where no guesses were "
            "recorded), or under an engine what it does of itself; ep: ep.",
            autocompletion=complete_schedule,
        ),
    ] = None,
    settings: SetOption = None,
    policy: PolicyOption = None,
    engine: EngineOption = None,
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
    kv_type: KvOption = "f16",
    memory: MemoryOption = None,
    reserve: ReserveOption = None,
    split: SplitOption = None,
    draft: DraftOption = None,
    window: WindowOption = None,
    simulator: Annotated[
        str, typer.Option("--simulator", help="What computes it: compiled, simpy, or both (compared).")
    ] = "compiled",
    timeline: Annotated[Path | None, typer.Option("--timeline", help="Write a Perfetto timeline (.json).")] = None,
    dense_bits: OptionalDenseBitsOption = None,
    nodes: NodesOption = 1,
    ranks_per_node: RanksOption = 8,
    attention_tp: AttentionTpOption = None,
    phase: PhaseOption = "decode",
    tokens_per_rank: TokensPerRankOption = None,
    draft_tokens: DraftTokensOption = None,
    acceptance: AcceptanceOption = None,
    prefill_share: PrefillShareOption = None,
    ttft: EpTtftOption = None,
    tpot: EpTpotOption = None,
    bits: BitsOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Predict one schedule on one machine, for a recording or for requests of given lengths; --mode ep: on many devices."""
    named = {
        "--model": model_file(model),
        "--hardware": hardware,
        "--trace": trace,
        "--lengths": lengths,
        "--policy": policy,
    }
    check_outputs({"--timeline": timeline}, {option: name for option, name in named.items() if name is not None})
    if check_mode(mode):
        shown = simulate_many(
            ctx, model=model, hardware=hardware, trace=trace, schedule=schedule, settings=settings, engine=engine, memory=memory,
            reserve=reserve, simulator=simulator, timeline=timeline,
        )  # fmt: skip
        if as_json:
            print_json(shown)
        else:
            print_parallel_prediction(shown)
            print_settings(shown)
        return
    from ..api.simulate import simulate as predict

    if engine in _OLD_NAMES:
        raise InputError("--engine", engine, "names serving engines now", f"write --simulator {_OLD_NAMES[engine]}")
    listed = lengths_asked(
        prompt_tokens=prompt_tokens, reply_tokens=reply_tokens, cached_tokens=cached_tokens, spread=length_spread, requests=requests,
        file=lengths, concurrency=concurrency,
    )  # fmt: skip
    found = predict(
        model, hardware, trace=trace, schedule=schedule, settings=settings, policy=policy, engine=engine, quant=quant, lengths=listed,
        prompt_tokens=None if listed else prompt_tokens, reply_tokens=None if listed else reply_tokens,
        context=context, concurrency=concurrency, ubatch=ubatch, kv_type=kv_type, memory=memory,
        reserve=reserve, split=split, draft_tokens=draft_tokens, acceptance=acceptance,
        draft=draft, window=window, dense_bits=dense_bits, simulator=simulator, timeline=timeline is not None,
    )  # fmt: skip
    if timeline is not None:
        write_perfetto(timeline, found.subject.simulation, found.prediction)
    document = found.to_dict()
    if as_json:
        print_json(document)
    else:
        print_prediction(document)
        for line in found.subject.notes:
            typer.echo(line)
        print_settings(document)


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command(cls=ConditionedCommand)(simulate)
