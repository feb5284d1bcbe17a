"""One measured speed as a benchmark tool states it, and checks that every reader makes.

Modelled: what was run (tokens, depth, requests together), what the tool says of model, machine and placement, tokens a second and how
far its repetitions lay apart. What a tool does not state is None. Ignored: what it means for a prediction (`papers.field.own`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...base.errors import InputError

MOST_LINES = 2000
_MOST_TOKENS = 1 << 24
_MOST_RATE = 1e9
_MOST_BYTES = 1e15


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchLine:
    """A speed that a tool measured."""

    where: str
    """Which of the file's, for messages."""
    test: str
    """What was run, as people write it: pp512, tg128 @ d4096."""
    prompt_tokens: int
    generated_tokens: int
    tokens_per_s: float
    """Of prompt and generated tokens together, all requests together."""
    relative_deviation: float = 0.0
    """Standard deviation of the repetitions over their mean."""
    depth_tokens: int = 0
    """Tokens of context that were there before."""
    requests: int = 1
    ubatch_tokens: int | None = None
    """Most prompt tokens of one pass."""
    kv_types: tuple[str, str] = ("f16", "f16")
    engine: str | None = None
    """What the tool can only be of."""
    backend: str | None = None
    model: str | None = None
    """As the tool names it."""
    architecture: str | None = None
    """As GGUF files name it."""
    quant: str | None = None
    """Name of the weight format."""
    model_bytes: float | None = None
    model_parameters: float | None = None
    gpus: tuple[str, ...] = ()
    """Names of the cards that took part, where stated."""
    cpu: str | None = None
    threads: int | None = None
    gpu_layers: int | None = None
    """None: not stated, all of them."""
    cpu_moe_layers: int = 0
    """Decoder layers from the first on whose experts are on the cores."""
    overrides: tuple[tuple[str, str], ...] = ()
    """(pattern of tensors' names, kind of memory) in the order they are tried."""
    uploads: bool = True
    """Whether large passes may copy weights to the card."""
    reason: str | None = None
    """Why it cannot be predicted, where the reader sees that."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What else is worth saying of it: the build."""


def checked(line: BenchLine, tool: str) -> BenchLine:
    """Return the line; raises InputError for figures that no run gives."""
    where = f"{tool}: {line.where}"
    _number(f"{where}: tokens per second", line.tokens_per_s, 1e-6, _MOST_RATE)
    if not (math.isfinite(line.relative_deviation) and 0 <= line.relative_deviation < 10):
        raise InputError(f"{where}: deviation", line.relative_deviation, "no deviation of speeds", "measure again")
    for name, value in (
        ("prompt tokens", line.prompt_tokens), ("generated tokens", line.generated_tokens), ("depth", line.depth_tokens),
    ):  # fmt: skip
        if not 0 <= value <= _MOST_TOKENS:
            raise InputError(
                f"{where}: {name}", value, f"not from 0 to {_MOST_TOKENS}", "check that it is the right file"
            )
    if line.prompt_tokens + line.generated_tokens == 0:
        raise InputError(f"{where}: tokens", 0, "nothing was run", "measure with -p or -n above zero")
    if line.ubatch_tokens is not None and not 1 <= line.ubatch_tokens <= _MOST_TOKENS:
        raise InputError(
            f"{where}: tokens of a pass", line.ubatch_tokens, f"not from 1 to {_MOST_TOKENS}", "measure again"
        )
    if not 1 <= line.requests <= 1024:
        raise InputError(f"{where}: requests together", line.requests, "not from 1 to 1024", "measure with fewer")
    for name, size in (("size", line.model_bytes), ("parameters", line.model_parameters)):
        if size is not None:
            _number(f"{where}: model's {name}", size, 1e3, _MOST_BYTES)
    return line


def _number(name: str, value: float, least: float, most: float) -> None:
    if not math.isfinite(value) or not least <= value <= most:
        raise InputError(
            name, value, f"not a number from {least:g} to {most:g}", "measure again, or leave the line out"
        )
