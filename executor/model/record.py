"""Record a model's routing on text: what every token chose, with weights, and what each layer's gate would have guessed early.

    text files ──► requests: a prompt, then decode steps with a key-value cache ──► one recording, written as requests end

Modelled: batches of requests, padded on the left where prompts differ; padding and requests that have ended are computed with the
others and never recorded. Tokens that follow a prompt are generated, or the text's own. Rows wait for their request to end and for
those before it, so memory holds one batch, however long the recording. Ignored: schedules; the experts run where they lie.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...base.errors import InputError
from ...sim.policies.state import Array
from ...traces.format import TraceWriter
from ...traces.recording import DECODE, PREFILL
from .guesses import Guesser
from .loading.store import Progress
from .session import Loaded
from .taps import Taps


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request: ids of a prompt, and of the text behind it where that is followed."""

    prompt: tuple[int, ...]
    rest: tuple[int, ...]
    name: str
    """Where it comes from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a recording is made."""

    prompt_tokens: int = 64
    new_tokens: int = 64
    """Decode steps of a request."""
    follow: bool = False
    """Decode the text's own tokens instead of generated ones."""
    batch: int = 1
    distance: int = 3
    """How many layers early guesses are made, at most; 0: none."""
    width: int | None = None
    """Guesses for each layer and distance; None: one more than a token chooses."""


def requests_of(texts: Sequence[tuple[str, Sequence[int]]], settings: Settings, count: int | None) -> list[Asked]:
    """Return requests cut from texts given as (name, ids), in turns, each behind the last one of its text.

    count: how many; None: one of each text. Raises InputError where texts are too short for that many.
    """
    behind = settings.new_tokens if settings.follow else 0
    each = settings.prompt_tokens + behind
    wanted = len(texts) if count is None else count
    found: list[Asked] = []
    for turn in range(wanted):
        for name, ids in texts:
            low = turn * each
            if len(ids) - low >= each and len(found) < wanted:
                middle = low + settings.prompt_tokens
                found.append(Asked(prompt=tuple(ids[low:middle]), rest=tuple(ids[middle : low + each]), name=name))
    if len(found) < wanted:
        rule = f"texts have room for {len(found)} requests of {each} tokens, not for {wanted}"
        raise InputError(
            "--text", f"{sum(len(ids) for _, ids in texts)} tokens", rule, "give more text or ask for fewer"
        )
    return found


def record(
    loaded: Loaded,
    asked: Sequence[Asked],
    out: str | os.PathLike[str],
    settings: Settings,
    *,
    source: str,
    progress: Progress,
) -> dict[str, Any]:
    """Write the recording of all requests to `out`, and return how much of what is in it."""
    spec = loaded.spec
    taps = Taps(loaded)
    width = min(settings.width or spec.top_k + 1, spec.num_experts)
    distance = min(settings.distance, spec.num_moe_layers - 1)
    routers = [layer.router for layer in loaded.assembled.layers]
    guesser = Guesser(routers, depth=distance, width=width, gates=loaded.gates) if distance else None
    writer = TraceWriter(
        out,
        num_experts=spec.num_experts,
        model=spec.name,
        layer_ids=tuple(layer.number for layer in loaded.assembled.layers),
        source=source,
        metadata={"domains": json.dumps([Path(one.name).stem for one in asked])},
    )
    prefill = decode = 0
    with writer, torch.inference_mode(), taps.listening():
        for low in range(0, len(asked), settings.batch):
            batch = asked[low : low + settings.batch]
            for number, rows in enumerate(_batch(loaded, taps, guesser, batch, settings)):
                phase = np.concatenate([one.pop("phase") for one in rows])
                whole = {name: np.concatenate([one[name] for one in rows]) for name in rows[0]}
                count = len(phase)
                writer.append(
                    request=np.full(count, low + number, np.int32),
                    position=np.arange(count, dtype=np.int32),
                    phase=phase,
                    **whole,
                )
                prefill += int((phase == PREFILL).sum())
                decode += int((phase == DECODE).sum())
            progress(low + len(batch), len(asked), "requests recorded")
        writer.finish()
    return {
        "num_requests": len(asked), "num_tokens": prefill + decode, "prefill_tokens": prefill, "decode_tokens": decode,
        "num_layers": spec.num_moe_layers, "num_experts": spec.num_experts, "top_k": spec.top_k,
        "distance": distance, "width": width if distance else 0,
    }  # fmt: skip


def _batch(
    loaded: Loaded, taps: Taps, guesser: Guesser | None, batch: Sequence[Asked], settings: Settings
) -> list[list[dict[str, Array]]]:
    """Return the rows of each request of a batch, pass by pass."""
    from transformers import DynamicCache

    model = loaded.assembled.model
    cache = DynamicCache(config=model.config)
    longest = max(len(one.prompt) for one in batch)
    lengths = np.array([len(one.prompt) for one in batch])
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros(len(batch), longest, dtype=torch.int64)
    for row, one in enumerate(batch):
        ids[row, longest - len(one.prompt) :] = torch.tensor(one.prompt)
        mask[row, longest - len(one.prompt) :] = 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    rows: list[list[dict[str, Array]]] = [[] for _ in batch]
    for step in range(settings.new_tokens + 1):
        options: dict[str, Any] = {"attention_mask": mask, "position_ids": places} if len(batch) > 1 else {}
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **options).logits[:, -1]
        width = ids.shape[1]
        found = _rows(taps, guesser)
        for number, mine in enumerate(rows):
            real = slice(number * width + (width - int(lengths[number]) if step == 0 else 0), (number + 1) * width)
            phase = np.full(real.stop - real.start, PREFILL if step == 0 else DECODE, np.uint8)
            mine.append({name: value[real] for name, value in found.items()} | {"phase": phase})
        if step == settings.new_tokens:
            break
        if settings.follow:
            ids = torch.tensor([[one.rest[step]] for one in batch])
        else:
            ids = logits.argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones(len(batch), 1, dtype=torch.int64)], 1)
        places = places[:, -1:] + 1
    return rows


def _rows(taps: Taps, guesser: Guesser | None) -> dict[str, Array]:
    """Return the arrays of the latest pass, a row for each token, padding included."""
    columns, tokens = len(taps.ids), len(taps.ids[0])
    found = {
        "experts": np.stack([one.numpy() for one in taps.ids], axis=1),
        "weights": np.stack([one.float().numpy() for one in taps.weights], axis=1).astype(np.float16),
    }
    if guesser is not None:
        predicted = np.full((tokens, columns, guesser.depth, guesser.width), -1, np.int16)
        probability = np.zeros(predicted.shape, np.float16)
        for column in range(columns):
            for distance in range(1, min(column, guesser.depth) + 1):
                ids, sure = guesser.guess(column, distance, taps.inputs[column - distance])
                predicted[:, column, distance - 1], probability[:, column, distance - 1] = ids, sure
        found |= {"predicted": predicted, "predicted_prob": probability}
    return found
