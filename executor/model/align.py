"""Lookahead gates trained against the gates they stand in for, with the model frozen; and how much of the truth guesses name.

For every column t and distance d a linear map reads what the router of column t − d reads, starts as the gate of column t itself,
and is moved by Adam towards that gate's distribution (the mean Kullback–Leibler divergence), as Ou et al. describe layer-wise gate
alignment (Computer Standards & Interfaces 94, 103996, 2025; their text is not public, this is a reading of the abstract).

Modelled: text in windows of one length, one pass of the model for each batch of them; a run is determined by its seed. Recall is the
share of a token's true choices that are among its `width` best guesses. Ignored: training the model along.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ...base.errors import InputError
from .guesses import Gates, Guesser, distribution
from .loading.store import Progress
from .session import Loaded
from .taps import Taps

_BATCH = 4
"""Windows of a pass where recall is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How gates are trained."""

    distance: int = 3
    steps: int = 200
    windows: int = 8
    """Windows of a step."""
    length: int = 256
    """Tokens of a window."""
    learning_rate: float = 3e-3
    """Of the first step; it falls to nothing along a cosine."""
    seed: int = 0


def windows_of(texts: Sequence[Sequence[int]], length: int) -> torch.Tensor:
    """Return int64 [n, length]: texts cut into windows; raises InputError where no text is that long."""
    found = [ids[low : low + length] for ids in texts for low in range(0, len(ids) - length + 1, length)]
    if not found:
        raise InputError(
            "--text", f"{max(map(len, texts), default=0)} tokens", f"no text has {length} tokens", "give more text"
        )
    return torch.tensor([list(one) for one in found])


def train(
    loaded: Loaded, texts: Sequence[Sequence[int]], settings: Settings, *, progress: Progress
) -> tuple[Gates, dict[str, Any]]:
    """Return trained gates of every column up to `distance` columns early, and facts: losses at both ends, tokens, seconds."""
    began = time.monotonic()
    spec = loaded.spec
    pairs = [
        (column, distance)
        for column in range(1, spec.num_moe_layers)
        for distance in range(1, min(column, settings.distance) + 1)
    ]
    if not pairs:
        raise InputError(
            "--model", spec.name, "has a single MoE layer: there is nothing to guess", "give another model"
        )
    routers: list[Any] = [layer.router for layer in loaded.assembled.layers]
    weight = torch.stack([routers[column].weight.detach().float() for column, _ in pairs]).requires_grad_()
    bias = torch.stack([_bias_of(routers[column], spec.num_experts) for column, _ in pairs]).requires_grad_()
    rows = windows_of(texts, settings.length)
    chooser = torch.optim.Adam([weight, bias], lr=settings.learning_rate)
    losses = []
    for step, taps in enumerate(_passes(loaded, _drawn(rows, settings))):
        for group in chooser.param_groups:
            group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        x = torch.stack([taps.inputs[column - distance].float() for column, distance in pairs])
        target = torch.stack([distribution(routers[column], taps.logits[column]) for column, _ in pairs])
        logits = torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
        loss = functional.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1).mean()
        chooser.zero_grad()
        loss.backward()
        chooser.step()
        losses.append(float(loss.detach()))
        progress(step + 1, settings.steps, f"steps, divergence {losses[-1]:.4f}")
    few = max(1, settings.steps // 10)
    facts = {
        "steps": settings.steps, "tokens": settings.steps * settings.windows * settings.length, "seconds": time.monotonic() - began,
        "divergence_first": sum(losses[:few]) / few, "divergence_last": sum(losses[-few:]) / few,
        "parameters": weight.numel() + bias.numel(),
    }  # fmt: skip
    gates = {pair: (weight[at].detach(), bias[at].detach()) for at, pair in enumerate(pairs)}
    return gates, facts


def recalls(
    loaded: Loaded, texts: Sequence[Sequence[int]], *, distance: int, widths: Sequence[int], length: int, gates: Gates | None,
    progress: Progress,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return recall by distance, column and number of guesses on texts: of the model's own gates run early, or of `gates`.

    Each line is {"distance", "column", "layer", "width", "recall", "tokens"}.
    """
    spec = loaded.spec
    rows = windows_of(texts, length)
    routers = [layer.router for layer in loaded.assembled.layers]
    most = min(max(widths), spec.num_experts)
    guesser = Guesser(routers, depth=distance, width=most, gates=gates)
    found: dict[tuple[int, int, int], int] = {}
    tokens = 0
    for done, taps in enumerate(_passes(loaded, iter(rows.split(_BATCH))), start=1):
        tokens += len(taps.ids[0])
        with torch.inference_mode():
            for column in range(1, spec.num_moe_layers):
                for early in range(1, min(column, distance) + 1):
                    ids = torch.from_numpy(guesser.guess(column, early, taps.inputs[column - early])[0]).long()
                    named = (ids.unsqueeze(2) == taps.ids[column].unsqueeze(1)).any(2).cumsum(1)  # [T, width]
                    for width in widths:
                        key = (early, column, width)
                        found[key] = found.get(key, 0) + int(named[:, min(width, most) - 1].sum())
        progress(done, math.ceil(len(rows) / _BATCH), "batches of text")
    return [
        {"distance": early, "column": column, "layer": spec.moe_layers[column], "width": width,
         "recall": count / (tokens * spec.top_k), "tokens": tokens}
        for (early, column, width), count in sorted(found.items())
    ]  # fmt: skip


def mean_recall(lines: Sequence[dict[str, Any]], distance: int, width: int) -> float:
    """Return the mean over columns of the recall at one distance with one number of guesses."""
    mine: list[float] = [line["recall"] for line in lines if line["distance"] == distance and line["width"] == width]
    return sum(mine) / len(mine)


def _drawn(rows: torch.Tensor, settings: Settings) -> Iterator[torch.Tensor]:
    """Yield the windows of each step, drawn by the seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.steps):
        yield rows[torch.randint(len(rows), (settings.windows,), generator=generator)]


def _passes(loaded: Loaded, batches: Iterator[torch.Tensor]) -> Iterator[Taps]:
    """Yield what routers read and chose in one pass for each batch of windows."""
    taps = Taps(loaded)
    model = loaded.assembled.model
    with taps.listening():
        for rows in batches:
            with torch.no_grad():
                model(rows, use_cache=False, logits_to_keep=1)
            yield taps


def _bias_of(router: Any, num_experts: int) -> torch.Tensor:
    own = getattr(router, "bias", None)
    return torch.zeros(num_experts) if own is None else own.detach().float()
