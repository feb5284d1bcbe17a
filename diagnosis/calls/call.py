"""What a command line says of a run: where experts are, how prompts are cut, how much context there is room for.

Modelled: what a prediction depends on, in one form for every engine. Ignored: flags (each engine's own module).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...base.errors import InputError, UnknownName
from ...specs.memory import KV_TYPES
from ...specs.models.mixes.names import mix_names
from .flags import FIELD

MOST_TOKENS = 1 << 24
MOST_CARDS = 64
ALL_LAYERS = 1 << 20
# Longest first: the name of a file may hold one inside another.
_PIECES = re.compile(r"[^A-Za-z0-9_]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One way in which an engine was started."""

    program: str
    engine: str
    text: str
    """The command, from the program on."""
    model: str | None = None
    """File or repository, as written."""
    quant: str | None = None
    """What the model's name says of its weight format."""
    gpu_layers: int | None = None
    """None: all of them, or not said."""
    placed: bool = True
    """Whether it says where layers are; else the engine decides."""
    cpu_moe_layers: int = 0
    """Decoder layers from the first on whose experts are on the cores."""
    overrides: tuple[tuple[str, str], ...] = ()
    uploads: bool = True
    """Large passes may copy experts of host memory to the card."""
    repacked: bool = False
    """Rows are interleaved for the cores when the model is loaded."""
    ubatch: int | None = None
    """Prompt tokens of a pass; None: as many as the engine takes of itself."""
    context: int | None = None
    """Tokens that the cache has room for, over all slots."""
    slots: int = 1
    fit_free_mib: int | None = None
    """What the engine leaves free of the card where it places layers itself; None: its own default."""
    threads: int | None = None
    kv_types: tuple[str, str] = ("f16", "f16")
    backend: str | None = None
    """None: the card's own; cpu: no card takes part."""
    gpu_experts: int | None = None
    """Experts of each layer on the card, the others on the cores; None: layers are whole."""
    cards: tuple[int, ...] | None = None
    """Numbers of the cards that take part, counted from 0; None: all that the machine has."""
    parallel: str | None = None
    """How several cards divide the model (layer, row, tensor); None: as the engine does of itself."""
    card_shares: tuple[float, ...] = ()
    """What share of it each takes; empty: by their memory."""
    prompt: int | None = None
    reply: int | None = None
    depth: int = 0
    remarks: tuple[str, ...] = ()
    """What it says that is not predicted, and that may matter."""


_SERVED = {"GPTQ-INT4": "GPTQ-Int4", "INT4-AWQ": "AWQ", "AWQ-4BIT": "AWQ", "FP4": "NVFP4", "FP8-DYNAMIC": "FP8"}
"""Formats in names of served checkpoints, as formats are named here, where these differ."""
_CHECKPOINT = re.compile(
    r"(?:^|[-_.])(FP8-dynamic|FP8|GPTQ-Int4|Int4-AWQ|AWQ-4bit|AWQ|W4A16|W8A16|W8A8|NVFP4|FP4|MXFP4|Int8|Int4)(?=$|[-_.])",
    re.IGNORECASE,
)


def kv_type(text: str | None, flag: str) -> str:
    """Return a type of cached values, f16 where none is given; raises UnknownName for another."""
    if text is None:
        return "f16"
    if text.lower() not in KV_TYPES:
        raise UnknownName(f"{FIELD}: {flag}", text, KV_TYPES)
    return text.lower()


def quant_in(*texts: str | None) -> str | None:
    """Return the weight format that a file's or repository's name says, None where it says none."""
    names = sorted((*mix_names(), "BF16", "F16", "MXFP4_MOE"), key=len, reverse=True)
    for text in texts:
        last = (text or "").replace("\\", "/").rstrip("/").rpartition("/")[2].upper()
        marked = "_".join(_PIECES.split(last))
        for name in names:
            if re.search(rf"(?:^|_){re.escape(name.upper().replace('-', '_'))}(?=_|$)", marked):
                return name
    return None


def served_quant_in(name: str | None) -> str | None:
    """Return the weight format that the name of a served checkpoint says (…-FP8, …-GPTQ-Int4, …-AWQ), None where it says none."""
    last = (name or "").replace("\\", "/").rstrip("/").rpartition("/")[2]
    found = _CHECKPOINT.search(last)
    if found is None:
        return None
    said = found.group(1).upper()
    return _SERVED.get(said, said)


def positive(value: int | None, default: int) -> int:
    """Return a count above zero, the default for none or nought."""
    return value if value else default


def refuse(flag: str, value: object, rule: str, remedy: str) -> InputError:
    """Return the error for flags that contradict each other."""
    return InputError(f"{FIELD}: {flag}", value, rule, remedy)
