"""Options of the commands that need a real device, or figures of one: which device, which model runs on it, over what text.

Modelled: one declaration per option, and what the files behind them are called. Ignored: measuring and running.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .bounds import PASSES, between

DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
TogetherOption = Annotated[
    int | None,
    typer.Option(
        "--concurrency",
        help="with --from vllm-bench: the batch of a latency file.",
        callback=between(1, 1024, "requests"),
    ),
]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        help="Folder of the planned model's Hugging Face checkpoint: the model itself runs, not a recording of it.",
    ),
]
PromptFilesOption = Annotated[
    list[Path] | None,
    typer.Option("--prompt-file", help="with --checkpoint: text to continue. Repeatable: one after another."),
]
NewTokensOption = Annotated[
    int,
    typer.Option(
        "--max-new-tokens",
        help="with --checkpoint: tokens to generate for each prompt.",
        callback=between(1, PASSES, "tokens"),
    ),
]
GatesOption = Annotated[
    Path | None,
    typer.Option("--gates", help="with --checkpoint: trained gates that guess (moeplan gates train)."),
]
TextsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        help="with --model and a checkpoint's folder: text over which the model itself runs, so that its own dense part and experts "
        "are measured. Repeatable.",
    ),
]


def numbered(what: str, paths: list[Path] | None) -> dict[str, str | Path | None]:
    """Return files by what they are called where several are read."""
    return {f"{what} {number}": path for number, path in enumerate(paths or ())}
