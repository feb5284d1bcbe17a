"""The command that says whether a measured speed is normal.

Modelled: its options, one screen of answer, the page, the shared lines. Ignored: the diagnosis (`diagnosis/`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.errors import InputError, UnknownName
from ..base.terminal import print_json
from ..base.text_files import check_outputs
from ..reports import numbers
from ..reports.diagnosis_words import answer
from .options.bounds import TOKENS_PER_S, between
from .options.conditions import ConditionedCommand
from .options.declarations import (
    ConcurrencyOption,
    EngineOption,
    HardwareOption,
    JsonFlag,
    QuantOption,
    complete_model,
    model_file,
)
from .options.lengths import PromptOption, ReplyOption

TOOL = "llama-bench"


def diagnose(
    hardware: HardwareOption,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Bundled model name, config.json, folder or .gguf file; where the command, or the file of --from, does not say it.",
            autocompletion=complete_model,
        ),
    ] = None,
    command: Annotated[
        str | None,
        typer.Option(
            "--command",
            help='How the engine was started, in its own flags: "llama-server -ngl 99 --n-cpu-moe 28 -c 16384".',
        ),
    ] = None,
    measured_decode: Annotated[
        float | None,
        typer.Option(
            "--measured-decode",
            help="with --command: generated tokens per second, all requests together.",
            callback=between(1e-6, TOKENS_PER_S, "tokens/s"),
        ),
    ] = None,
    measured_prefill: Annotated[
        float | None,
        typer.Option(
            "--measured-prefill",
            help="with --command: prompt tokens per second.",
            callback=between(1e-6, TOKENS_PER_S, "tokens/s"),
        ),
    ] = None,
    tables: Annotated[
        tuple[str, Path] | None,
        typer.Option(
            "--from",
            help="In place of --command: what llama-bench wrote, each line a speed.",
            metavar="llama-bench FILE",
        ),
    ] = None,
    quant: QuantOption = None,
    engine: EngineOption = None,
    prompt_tokens: PromptOption = None,
    reply_tokens: ReplyOption = None,
    concurrency: ConcurrencyOption = None,
    built: Annotated[
        str | None,
        typer.Option("--built", help="Month of the engine's build, e.g. 2026-09; default: any that constants are of."),
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Also write an HTML page.")] = None,
    share: Annotated[
        Path | None,
        typer.Option("--share", help="Add the figures to a file of field reports (.jsonl), for others to predict."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say whether a measured speed is normal: prediction, what binds, what nothing can beat, what would help, what to check."""
    _check_month(built)
    inputs = {
        "--from": None if tables is None else tables[1],
        "--hardware": hardware,
        "--model": None if model is None else model_file(model),
    }
    check_outputs({"--report": report, "--share": share}, inputs)
    if (command is None) == (tables is None):
        raise InputError("--command", "(absent)" if command is None else command, "a run is described by --command or by --from",
                         "give one of the two")  # fmt: skip
    if tables is not None:
        from ..api.diagnose import diagnose_file, file_document

        if tables[0] != TOOL:
            raise UnknownName("--from", tables[0], (TOOL,))
        lines = diagnose_file(tables[1], hardware, model=model, quant=quant, engine=engine, built=built)
        found, document = [one for _, one in lines if one is not None], file_document(lines)
    else:
        from ..api.diagnose import diagnose as ask

        found = [ask(model, hardware, command=str(command), measured_decode=measured_decode, measured_prefill=measured_prefill, quant=quant,
                     engine=engine, prompt_tokens=prompt_tokens, reply_tokens=reply_tokens, concurrency=concurrency,
                     built=built)]  # fmt: skip
        document = found[0].to_dict()
    if share is not None:
        from ..api.diagnose import share as add

        document["shared_rows"] = add(found, share)
    if report is not None:
        from ..reports.diagnosis_page import write_diagnosis_page

        write_diagnosis_page(report, document)
    if as_json:
        print_json(document)
        return
    _print(document)
    if share is not None:
        typer.echo(f"{document['shared_rows']} lines added to {share}: moeplan reproduce field --reports {share}")
    if report is not None:
        typer.echo(f"page written to {report}")


def _check_month(built: str | None) -> None:
    if built is not None and re.fullmatch(r"20[0-9]{2}-(0[1-9]|1[0-2])", built) is None:
        raise InputError("--built", built, "not a month", "write for instance 2026-09")


# --- one screen ------------------------------------------------------------------------------------------------------------


def _print(document: Mapping[str, Any]) -> None:
    """Print a diagnosis."""
    for line in document.get("lines") or ():
        head = f"  {line['where']:8} {line['test']:18} {numbers.significant(line['measured']):>8} tokens/s"
        if line["verdict"] is None:
            typer.echo(f"{head}, not predicted: {line['reason']}")
        else:
            between = f"{numbers.significant(line['low'])} to {numbers.significant(line['high'])}"
            typer.echo(f"{head}, predicted {numbers.significant(line['predicted']):>6} ({between}): {line['verdict']}")
    if document.get("lines"):
        typer.echo(f"{document['shown']}:")
    for line in answer(document):
        typer.echo(line)


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    app.command(cls=ConditionedCommand)(diagnose)
