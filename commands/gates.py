"""The commands about lookahead gates: train them for a model, and say how well gates guess.

Modelled: their options and what they print. Ignored: training (`executor/model/align`), which needs torch and transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.terminal import print_json, print_table
from ..base.text_files import check_outputs
from .options.bounds import PASSES, between
from .options.declarations import JsonFlag, model_file

_DEPTH = 64
_WINDOW = 1 << 20

ModelFolder = Annotated[
    str, typer.Option("--model", help="Folder of a Hugging Face checkpoint: config.json and safetensors files.")
]
TextFiles = Annotated[list[Path], typer.Option("--text", help="File of text. Repeatable.")]
DistanceOption = Annotated[
    int, typer.Option("--distance", help="Layers ahead to guess, at most.", callback=between(1, _DEPTH, "layers"))
]
LengthOption = Annotated[
    int, typer.Option("--length", help="Tokens of a window of text.", callback=between(2, _WINDOW, "tokens"))
]


def gates_train(
    model: ModelFolder,
    text: TextFiles,
    output: Annotated[Path, typer.Option("--output", "-o", help="Gates to write (.safetensors).")],
    distance: DistanceOption = 3,
    steps: Annotated[int, typer.Option("--steps", help="Passes of the model.", callback=between(1, PASSES, "steps"))] = 100,
    windows: Annotated[int, typer.Option("--windows", help="Windows of text a pass.", callback=between(1, 4096, "windows"))] = 8,
    length: LengthOption = 256,
    epochs: Annotated[
        int, typer.Option("--epochs", help="Times that gates go over what was read.", callback=between(1, 1000, "times"))
    ] = 4,
    hidden: Annotated[
        int, typer.Option("--hidden", help="Units of a layer beside the linear map; 0: none.", callback=between(0, 1 << 16, "units"))
    ] = 128,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="Of the first step.", callback=between(1e-7, 1.0, ""))
    ] = 3e-3,
    seed: Annotated[int, typer.Option("--seed", help="Of the windows drawn.", callback=between(0, 2**31, ""))] = 0,
    as_json: JsonFlag = False,
) -> None:  # fmt: skip
    """Train gates that guess a model's experts some layers early, with the model frozen."""
    from ..api.gates import train_gates
    from ..base.progress import reporter

    check_outputs(
        {"--output": output}, {"--model": model_file(model)} | {f"text {n}": path for n, path in enumerate(text)}
    )
    found = train_gates(
        model, text, output, distance=distance, steps=steps, windows=windows, length=length, epochs=epochs, hidden=hidden,
        learning_rate=learning_rate, seed=seed, progress=reporter("gates"),
    )  # fmt: skip
    if as_json:
        print_json(found)
        return
    typer.echo(
        f"{found['gates']} gates of {found['model']}, {found['parameters']:,} parameters, {found['num_bytes']:,} bytes: {found['path']}"
    )
    typer.echo(
        f"{found['steps']} passes, {found['tokens']:,} tokens, {found['seconds']:.0f} s; divergence "
        f"{found['divergence_first']:.4f} at first, {found['divergence_last']:.4f} at last"
    )
    typer.echo(
        f"next: moeplan gates evaluate --model {model} --gates {output} --text HELD-OUT; moeplan run … --gates {output}"
    )


def gates_evaluate(
    model: ModelFolder,
    text: TextFiles,
    gates: Annotated[
        Path | None, typer.Option("--gates", help="Trained gates; without them only the model's own are counted.")
    ] = None,
    distance: DistanceOption = 3,
    width: Annotated[
        list[int] | None,
        typer.Option("--width", help="Number of guesses. Repeatable; default: what a token chooses, one and two more."),
    ] = None,
    length: LengthOption = 256,
    as_json: JsonFlag = False,
) -> None:
    """Say which share of the experts really chosen gates name some layers early, by distance and layer; each text by itself, too."""
    from ..api.gates import evaluate_gates
    from ..base.progress import reporter

    found = evaluate_gates(
        model, text, gates, distance=distance, widths=width or (), length=length, progress=reporter("gates")
    )
    if as_json:
        print_json(found)
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    own = {(one["distance"], one["width"]): one for one in found["means"] if one["gates"] == "own"}
    trained = {(one["distance"], one["width"]): one for one in found["means"] if one["gates"] == "trained"}
    rows = []
    for key, one in own.items():
        other = trained.get(key)
        gained = "" if other is None else f"{(other['recall'] - one['recall']) / max(1e-9, 1 - one['recall']):.0%}"
        rows.append([*key, f"{one['recall']:.4f}", None if other is None else f"{other['recall']:.4f}", gained])
    typer.echo(
        f"{found['model']}: share of the {found['top_k']} of {found['num_experts']} experts chosen that are guessed"
    )
    print_table(["layers ahead", "guesses", "own gate", "trained", "of what was missing"], rows, right={0, 1, 2, 3, 4})
    names = list(found["means"][0]["by_text"])
    for name in names if len(names) > 1 else []:
        shown = [f"{one['by_text'][name]:.3f} → {trained[key]['by_text'][name]:.3f}" if key in trained else f"{one['by_text'][name]:.3f}"
                 for key, one in own.items() if key[1] == found["top_k"]]  # fmt: skip
        typer.echo(f"  {name}: " + ", ".join(shown) + f" with {found['top_k']} guesses, by distance")


def register(app: typer.Typer) -> None:
    """Add this module's commands to the front door."""
    group = typer.Typer(
        no_args_is_help=True, help="Lookahead gates: trained guesses of a model's experts, some layers early."
    )
    group.command("train")(gates_train)
    group.command("evaluate")(gates_evaluate)
    app.add_typer(group, name="gates")
