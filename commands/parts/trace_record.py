"""The command that records a model's routing on text.

Modelled: its options and what it prints. Ignored: recording (`executor/model/record`), which needs torch and transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...base.terminal import print_json
from ...base.text_files import check_outputs
from ..options.bounds import PASSES, between
from ..options.declarations import JsonFlag, model_file

_DEPTH, _TOKENS, _BATCH, _WIDTH = 64, 1 << 20, 1024, 1024


def trace_record(
    model: Annotated[str, typer.Option("--model", help="Folder of a Hugging Face checkpoint: config.json and safetensors files.")],
    text: Annotated[list[Path], typer.Option("--text", help="File of text. Repeatable.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Recording to write (.safetensors).")],
    requests: Annotated[
        int | None,
        typer.Option("--requests", help="Requests to cut from the texts; default: one each.", callback=between(1, PASSES, "requests")),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Of a request.", callback=between(1, _TOKENS, "tokens"))] = 64,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", help="Decode steps of a request; 0: prompts only.", callback=between(0, _TOKENS, "tokens"))
    ] = 64,
    follow: Annotated[bool, typer.Option("--follow", help="Decode the text's own tokens instead of generated ones.")] = False,
    batch: Annotated[int, typer.Option("--batch", help="Requests computed together.", callback=between(1, _BATCH, "requests"))] = 1,
    distance: Annotated[
        int, typer.Option("--distance", help="Layers ahead that each gate guesses; 0: no guesses.", callback=between(0, _DEPTH, "layers"))
    ] = 3,
    width: Annotated[
        int | None,
        typer.Option("--width", help="Guesses a layer; default: one more than a token chooses.", callback=between(1, _WIDTH, "guesses")),
    ] = None,
    gates: Annotated[Path | None, typer.Option("--gates", help="Trained gates that guess (moeplan gates train).")] = None,
    memory: Annotated[str | None, typer.Option("--memory", help="Memory that everything but the experts may take.")] = None,
    as_json: JsonFlag = False,
) -> None:  # fmt: skip
    """Record a model's own routing on text: choices, weights, and what each layer's gate would have guessed early."""
    from ...api.record import record
    from ...base.progress import reporter

    inputs: dict[str, Any] = {"--model": model_file(model), "--gates": gates}
    check_outputs({"--output": output}, inputs | {f"text {n}": path for n, path in enumerate(text)})
    found = record(
        model, text, output, requests=requests, prompt_tokens=prompt_tokens, new_tokens=new_tokens, follow=follow, batch=batch,
        distance=distance, width=width, gates=gates, memory=memory, progress=reporter("record"),
    )  # fmt: skip
    if as_json:
        print_json(found)
        return
    typer.echo(", ".join(f"{key} {value}" for key, value in found.items() if key != "path"))
    typer.echo(f"{found['path']}: moeplan trace stats says what it is like; plan and simulate take it with --trace")
