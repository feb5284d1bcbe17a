"""Command lines of ollama: which model it runs, and what its variables say of context, cache and requests.

Modelled: `ollama run NAME:TAG` and `ollama serve`, with the variables before them; context as ollama chooses it by the cards' memory; that
it puts as many whole layers on the card as there is room for. Ignored: a Modelfile's own parameters, which a command does not show.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...base.errors import InputError
from ...base.units import GIB
from .call import MOST_TOKENS, Call, kv_type, quant_in
from .flags import FIELD, read_flags, table

ENGINE = "ollama"
PROGRAMS = ("ollama run", "ollama serve")
_FLAGS = table("""
--verbose
--keepalive N
--think ?true,false,high,medium,low
--hidethinking
--format N
--insecure
--nowordwrap
--experimental
--dimensions N
--truncate
""")
_CONTEXTS = ((24 * GIB, 4096), (48 * GIB, 32_768))
_LONGEST = 262_144
"""Tokens of context by the cards' memory (ollama's docs/context-length.mdx, 2026)."""
USUAL_QUANT = "Q4_K_M"
"""Format of ollama's library where a tag says none, but of models that were trained in few bits."""


def read(program: str, words: Sequence[str], before: Sequence[str]) -> Call:
    """Return what a command line says; before: the words before the program, variables among them. Raises InputError."""
    told = read_flags(words, _FLAGS, program, equals=True)
    model = told.others[0] if program == "ollama run" and told.others else None
    said = {
        found[1]: found[2] for word in before if (found := re.fullmatch(r"(OLLAMA_[A-Z_]+)=(.*)", word)) is not None
    }
    kind = kv_type(said.get("OLLAMA_KV_CACHE_TYPE") or None, "OLLAMA_KV_CACHE_TYPE")
    if kind != "f16" and said.get("OLLAMA_FLASH_ATTENTION") in ("0", "false"):
        raise InputError(
            f"{FIELD}: OLLAMA_KV_CACHE_TYPE",
            kind,
            "needs flash attention, which is switched off",
            "leave out one of the two",
        )
    return Call(
        program=program, engine=ENGINE, text=" ".join((program, *words)), model=model, quant=quant_in((model or "").replace(":", "-")),
        placed=False, context=_count(said, "OLLAMA_CONTEXT_LENGTH", MOST_TOKENS), slots=_count(said, "OLLAMA_NUM_PARALLEL", 1024) or 1,
        kv_types=(kind, kind),
    )  # fmt: skip


def usual_context(memory_bytes: int) -> int:
    """Return the tokens of context that ollama keeps room for where nobody says."""
    return next((tokens for least, tokens in _CONTEXTS if memory_bytes < least), _LONGEST)


def _count(said: dict[str, str], name: str, most: int) -> int | None:
    text = said.get(name) or "0"
    if re.fullmatch(r"[0-9]{1,9}", text) is None or int(text) > most:
        raise InputError(f"{FIELD}: {name}", text, f"not a whole number up to {most:,}", "correct the command line")
    return int(text) or None
