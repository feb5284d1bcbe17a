"""Record a model's routing on text: the function behind `moeplan trace record`. It needs torch and transformers.

Modelled: which requests are cut from which text, and how they are computed. Ignored: computing them (`executor/model/record`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .model_folder import check_can_run, gates_in, model_in, read_texts
from .plan import Progress
from .subject import bytes_of


def record(
    model: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    requests: int | None = None,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    follow: bool = False,
    batch: int = 1,
    distance: int = 3,
    width: int | None = None,
    gates: str | os.PathLike[str] | None = None,
    memory: int | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the routing of the checkpoint in the folder `model` on files of text to `output`, and return how much there is of what.

    requests: cut from the texts in turns; None: one of each. prompt_tokens, new_tokens: of a request. follow: decode the text's own
    tokens, not generated ones. batch: requests computed together; padding is not recorded. distance, width: of the guesses that each
    layer's gate makes early; distance 0 makes none; width None is one more than a token chooses. gates: trained gates that guess.

    Raises InputError for a model or text that cannot be used, DoesNotFit where memory does not suffice.
    """
    check_can_run()
    from ..executor.model.loading.text import Text
    from ..executor.model.record import Settings, requests_of
    from ..executor.model.record import record as write
    from ..executor.model.session import open_model, silent

    spec = model_in(model)
    settings = Settings(
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, follow=follow, batch=batch, distance=distance, width=width
    )  # fmt: skip
    asked = requests_of(read_texts(texts, Text(model, spec.vocab_size)), settings, requests)
    learnt = gates_in(gates, spec)
    report = progress or silent
    source = f"{spec.name} on text, by moeplan trace record"
    with open_model(model, memory_bytes=bytes_of(memory, "--memory"), gates=learnt, progress=report) as loaded:
        return write(loaded, asked, output, settings, source=source, progress=report) | {"path": os.fspath(output)}
