"""The command that says what a machine can run.

Modelled: its options and what it prints. Ignored: how a row comes about (`api/fit.py`).
"""

from __future__ import annotations

from typing import Annotated

import typer

from ..base.errors import DoesNotFit
from ..base.terminal import print_json, print_table
from ..base.units import GIB, GIGA
from .options.bounds import CONTEXT_TOKENS, TOKENS_PER_S, between
from .options.declarations import HardwareOption, JsonFlag, KvOption, complete_model

_LEAST_CONTEXT, _SHORT_CONTEXT = 64, 4096


def fit(
    hardware: HardwareOption,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="One model alone (a bundled name, a config.json, a checkpoint's folder or a .gguf file); default: all bundled decoders.",
            autocompletion=complete_model,
        ),
    ] = None,
    context: Annotated[
        int,
        typer.Option(
            "--context",
            help="Tokens of context that memory is kept for, or as many as a model has.",
            callback=between(_LEAST_CONTEXT, CONTEXT_TOKENS, "tokens"),
        ),
    ] = 32768,
    min_decode: Annotated[
        float | None,
        typer.Option(
            "--min-decode",
            help="Leave out what generates fewer tokens per second; default: nothing.",
            callback=between(1e-9, TOKENS_PER_S, "tokens/s"),
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="Engine that runs it: llama.cpp or ik_llama.cpp.")
    ] = "llama.cpp",
    kv_type: KvOption = "f16",
    as_json: JsonFlag = False,
) -> None:
    """Say which models fit a machine, in which formats, how they are placed and how fast they are."""
    from ..api.fit import PROMPT_TOKENS
    from ..api.fit import fit as ask
    from ..base.progress import reporter

    found = ask(
        hardware, model=model, context=context, min_decode=min_decode, engine=engine, kv_type=kv_type, progress=reporter("fit")
    )  # fmt: skip
    if not found.rows:
        reason = (
            next(iter(found.left_out.values())) if model is not None else "nothing in the catalogue fits this machine"
        )
        on_card = "host memory are missing" not in reason
        raise DoesNotFit(f"{reason.removeprefix('does not fit: ')}{_less(context, kv_type) if on_card else ''}", 0)
    if as_json:
        print_json(found.to_dict())
        return
    typer.echo(found.machine)
    typer.echo(f"memory for {found.context_tokens:,} tokens of context (or the model's own limit)")
    titles = (
        "model",
        "format",
        "B",
        "bits",
        "card GiB",
        "host GiB",
        "prompt tok/s",
        "generated tok/s",
        "likely",
        "told",
    )
    rows = [
        (one.model, one.quant, f"{one.total_parameters / GIGA:.0f}", f"{one.bits_per_weight:.1f}", f"{one.device_bytes / GIB:.1f}",
         f"{one.host_bytes / GIB:.1f}", f"{one.prefill_tokens_per_s:,.0f}", f"{one.decode_tokens_per_s:.1f}",
         "{:.0f} to {:.0f}".format(*one.decode_tokens_per_s_interval), one.placement)
        for one in found.rows
    ]  # fmt: skip
    print_table(titles, rows, right=range(2, 8))
    typer.echo(
        f"speeds of one request, a prompt of {PROMPT_TOKENS} tokens and the reply after it; quality is not judged, bits are shown"
    )
    first = found.rows[0]
    typer.echo(f"the first of them: {first.command}")
    if found.left_out:
        typer.echo(f"left out: {', '.join(found.left_out)} (--model NAME says why)")


def _less(context: int, kv_type: str) -> str:
    """Return what would take less memory, for a message."""
    ways = [f"less than --context {context}"] if context > _SHORT_CONTEXT else []
    if kv_type == "f16":
        ways.append("--kv-type q8_0")
    return f"; {' or '.join(ways)} takes less memory" if ways else ""


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command()(fit)
