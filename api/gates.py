"""Train lookahead gates for a model, and say how well gates guess: the functions behind `moeplan gates`. They need torch.

Modelled: text, settings, files. Ignored: training and counting (`executor/model/align`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ..base.errors import InputError
from .model_folder import check_can_run, gates_in, model_in, read_texts
from .plan import Progress


def train_gates(
    model: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    distance: int = 3,
    steps: int = 100,
    windows: int = 8,
    length: int = 256,
    epochs: int = 4,
    hidden: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write gates that guess up to `distance` layers early to `output`, and return how training went.

    texts: files of text to train on, in equal turns. steps: passes of the model over windows × length tokens each; epochs: times
    that gates go over what was read. hidden: units of the layer beside each gate's linear map; 0: none.

    Raises InputError for a model or text that cannot be used.
    """
    check_can_run()
    from ..executor.model.align import Settings, train
    from ..executor.model.gates import save_gates
    from ..executor.model.loading.text import Text
    from ..executor.model.session import open_model, silent

    spec = model_in(model)
    given = [ids for _, ids in read_texts(texts, Text(model, spec.vocab_size))]
    report = progress or silent
    settings = Settings(
        distance=distance, steps=steps, windows=windows, length=length, epochs=epochs, hidden=hidden,
        learning_rate=learning_rate, seed=seed,
    )  # fmt: skip
    with open_model(model, progress=report) as loaded:
        gates, facts = train(loaded, given, settings, progress=report)
    said = {
        "steps": str(steps),
        "epochs": str(epochs),
        "hidden": str(hidden),
        "tokens": str(facts["tokens"]),
        "seed": str(seed),
        "model": spec.name,
    }
    save_gates(output, gates, spec, said)
    return {
        "model": spec.name,
        "gates": len(gates),
        **facts,
        "num_bytes": os.stat(output).st_size,
        "path": os.fspath(output),
    }


def evaluate_gates(
    model: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]],
    gates: str | os.PathLike[str] | None = None,
    *,
    distance: int = 3,
    widths: Sequence[int] = (),
    length: int = 256,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return recall by distance, layer and number of guesses on text: of the model's own gates run early, and of trained `gates`.

    widths: numbers of guesses; none: what a token chooses, and one and two more. Each text is counted by itself as well.
    """
    check_can_run()
    from ..executor.model.align import mean_recall, recalls
    from ..executor.model.loading.text import Text
    from ..executor.model.session import open_model, silent

    spec = model_in(model)
    counts = list(widths) or [each for each in range(spec.top_k, spec.top_k + 3) if each <= spec.num_experts]
    wrong = [count for count in counts if not 1 <= count <= spec.num_experts]
    if wrong:
        raise InputError(
            "--width", wrong[0], f"not from 1 to {spec.num_experts}, the model's experts", "give one in between"
        )
    learnt = gates_in(gates, spec)
    read = read_texts(texts, Text(model, spec.vocab_size))
    most = min(distance, spec.num_moe_layers - 1)
    if most < 1:
        raise InputError(
            "--model", spec.name, "has a single MoE layer: there is nothing to guess", "give another model"
        )
    report = progress or silent
    found: list[dict[str, Any]] = []
    with open_model(model, progress=report) as loaded:
        for name, ids in read:
            for kind, used in (("own", None), ("trained", learnt)):
                if kind == "own" or used is not None:
                    lines = recalls(
                        loaded, [ids], distance=most, widths=counts, length=length, gates=used, progress=report
                    )
                    found += [{"text": name, "gates": kind, **line} for line in lines]
    means = []
    for kind in dict.fromkeys(line["gates"] for line in found):
        for early in range(1, most + 1):
            for width in counts:
                each = [
                    (
                        mean_recall(
                            [line for line in found if line["text"] == name and line["gates"] == kind], early, width
                        ),
                        name,
                    )
                    for name, _ in read
                ]
                means.append({"gates": kind, "distance": early, "width": width, "recall": sum(r for r, _ in each) / len(each),
                              "by_text": {name: recall for recall, name in each}})  # fmt: skip
    return {"model": spec.name, "top_k": spec.top_k, "num_experts": spec.num_experts, "means": means, "lines": found}
