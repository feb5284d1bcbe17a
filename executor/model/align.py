"""Lookahead gates trained against the gates they stand in for, with the model frozen; and how much of the truth guesses name.

For every column t and distance d a map reads what the router of column t − d reads, starts as the gate of column t itself,
and is moved by Adam towards that gate's distribution (the mean Kullback–Leibler divergence), as Ou et al. describe layer-wise gate
alignment (Computer Standards & Interfaces 94, 103996, 2025; their text is not public, this is a reading of the abstract). The map is
linear, with a small hidden layer beside it that starts as nothing: what the layers between add is not linear in what they read.

Modelled: text in windows of one length, one pass of the model for each batch of them; what routers read is kept while it fits a
buffer, and gates go over it several times, since a pass of the model costs far more than a step of its gates; a run is determined by
its seed. Recall is the share of a token's true choices that are among its `width` best guesses. Ignored: training the model along.
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
from ...base.units import GIB
from .guesses import Gate, Gates, Guesser, distribution
from .loading.store import Progress
from .session import Loaded
from .taps import Taps

_BATCH = 4
"""Windows of a pass where recall is counted."""
_TOKENS = 2048
"""Tokens of a step of the gates."""
_BUFFER_BYTES = GIB
"""Of what routers read and chose, before gates are trained on it and it is let go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How gates are trained."""

    distance: int = 3
    steps: int = 100
    """Passes of the model."""
    windows: int = 8
    """Windows of a pass."""
    epochs: int = 4
    """Times that gates go over what was read."""
    hidden: int = 128
    """Units of the layer beside the linear map; 0: none."""
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
    rows = [windows_of([one], settings.length) for one in texts if len(one) >= settings.length]
    if not rows:
        windows_of(texts, settings.length)  # says so
    learning = _Learning(routers, pairs, spec.num_experts, settings)
    token_bytes = spec.num_moe_layers * (spec.hidden_size + spec.num_experts) * torch.float16.itemsize
    room = max(1, _BUFFER_BYTES // (token_bytes * settings.windows * settings.length))
    for step, taps in enumerate(_passes(loaded, _drawn(rows, settings)), start=1):
        learning.keep(taps)
        progress(step, settings.steps, "passes of the model" + learning.told())
        if step % room == 0 or step == settings.steps:
            learning.learn()
    facts = {
        "steps": settings.steps, "tokens": settings.steps * settings.windows * settings.length, "seconds": time.monotonic() - began,
        "divergence_first": learning.losses[0], "divergence_last": learning.losses[-1], "parameters": learning.num_parameters,
    }  # fmt: skip
    return learning.gates(), facts


class _Learning:
    """Gates on their way: what routers read so far, and steps over it."""

    def __init__(
        self, routers: Sequence[Any], pairs: Sequence[tuple[int, int]], num_experts: int, settings: Settings
    ) -> None:
        self._routers, self._pairs, self._settings = routers, pairs, settings
        self._generator = torch.Generator().manual_seed(settings.seed)
        hidden_size = routers[0].weight.shape[1]
        self._weight = torch.stack([routers[column].weight.detach().float() for column, _ in pairs])
        self._bias = torch.stack([_bias_of(routers[column], num_experts) for column, _ in pairs]).unsqueeze(1)
        self._trained = [self._weight, self._bias]
        if settings.hidden:
            shape = (len(pairs), hidden_size, settings.hidden)
            inner = torch.randn(shape, generator=self._generator) / math.sqrt(hidden_size)
            self._hidden = (
                inner,
                torch.zeros(len(pairs), 1, settings.hidden),
                torch.zeros(len(pairs), settings.hidden, num_experts),
            )
            self._trained += self._hidden
        for tensor in self._trained:
            tensor.requires_grad_()
        self._chooser = torch.optim.Adam(self._trained, lr=settings.learning_rate)
        self._inputs: list[torch.Tensor] = []
        self._targets: list[torch.Tensor] = []
        self._seen = 0
        self.losses: list[float] = []
        """Mean divergence of each go over a buffer."""

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(tensor.numel() for tensor in self._trained)

    def told(self) -> str:
        """Return the latest divergence in words."""
        return f", divergence {self.losses[-1]:.4f}" if self.losses else ""

    def keep(self, taps: Taps) -> None:
        """Keep what one pass's routers read, [columns, T, H], and what they made of it, [columns, T, E]."""
        chances = [distribution(router, logits) for router, logits in zip(self._routers, taps.logits, strict=True)]
        self._inputs.append(torch.stack(taps.inputs).to(torch.float16))
        self._targets.append(torch.stack(chances).to(torch.float16))

    def learn(self) -> None:
        """Go over everything kept so many times, in an order drawn anew for each, and let it go."""
        settings = self._settings
        inputs, targets = torch.cat(self._inputs, 1), torch.cat(self._targets, 1)
        total = settings.epochs * settings.steps * settings.windows * settings.length
        earlier = torch.tensor([column - distance for column, distance in self._pairs])
        own = torch.tensor([column for column, _ in self._pairs])
        for _ in range(settings.epochs):
            losses = []
            for places in torch.randperm(inputs.shape[1], generator=self._generator).split(_TOKENS):
                for group in self._chooser.param_groups:
                    group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * self._seen / total))
                x, target = inputs[:, places].float()[earlier], targets[:, places].float()[own]
                loss = functional.kl_div(self._logits(x).log_softmax(-1), target, reduction="none").sum(-1).mean()
                self._chooser.zero_grad()
                loss.backward()
                self._chooser.step()
                self._seen += len(places)
                losses.append(float(loss.detach()))
            self.losses.append(sum(losses) / len(losses))
        self._inputs, self._targets = [], []

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return [pairs, T, E] for [pairs, T, H]."""
        found = torch.baddbmm(self._bias, x, self._weight.transpose(1, 2))
        if not self._settings.hidden:
            return found
        inner, bias, outer = self._hidden
        return torch.baddbmm(found, functional.silu(torch.baddbmm(bias, x, inner)), outer)

    def gates(self) -> Gates:
        """Return the gates as they are now."""
        found = {}
        for at, pair in enumerate(self._pairs):
            gate = Gate(self._weight[at].detach(), self._bias[at, 0].detach())
            if self._settings.hidden:
                inner, bias, outer = (tensor[at].detach() for tensor in self._hidden)
                gate = gate._replace(inner=inner.T.contiguous(), inner_bias=bias[0], outer=outer.T.contiguous())
            found[pair] = gate
        return found


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


def _drawn(rows: Sequence[torch.Tensor], settings: Settings) -> Iterator[torch.Tensor]:
    """Yield the windows of each pass, drawn by the seed; texts take equal turns, however long they are."""
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(settings.steps):
        texts = [rows[(step * settings.windows + place) % len(rows)] for place in range(settings.windows)]
        yield torch.stack([text[int(torch.randint(len(text), (), generator=generator))] for text in texts])


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
