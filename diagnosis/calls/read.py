"""A command line becomes a call: which program it starts, and that program's own reader.

Modelled: paths and endings of programs, words before them (variables, numactl, sudo), which cards variables leave visible, Python
modules, `vllm serve`, `ollama run`. Ignored: shells' variables and substitutions, containers.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence

from ...base.errors import InputError, UnknownName
from . import llamacpp, ollama, servers
from .call import Call
from .flags import FIELD, split_command

_VISIBLE = re.compile(r"(?:CUDA|HIP|ROCR|GGML_VK)_VISIBLE_DEVICES=([0-9]{1,2}(?:,[0-9]{1,2})*)")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS", re.IGNORECASE)
PROGRAMS = (*llamacpp.PROGRAMS, *servers.PROGRAMS, *ollama.PROGRAMS)
"""Programs whose command lines are read."""


def read_command(text: str, engine: str | None = None) -> Call:
    """Return what a command line says; engine: whose flags it has, None where program and flags tell.

    Raises InputError for a program or flag that there is not, and for flags that contradict each other or are not predicted.
    """
    words = split_command(text)
    program, rest = _program(words)
    before = words[: len(words) - len(rest)]
    if program in llamacpp.PROGRAMS:
        _check_engine(engine, (llamacpp.ENGINE, llamacpp.FORK), program)
        call = llamacpp.read(program, rest, engine)
    elif program in ollama.PROGRAMS:
        _check_engine(engine, (ollama.ENGINE,), program)
        call = ollama.read(program, rest, before)
    else:
        _check_engine(engine, servers.ENGINES[program], program)
        call = servers.read(program, rest)
    call = dataclasses.replace(call, text=" ".join((*_variables(before), call.text)))
    return _of_visible(call, _visible(before))


def _variables(words: Sequence[str]) -> list[str]:
    """Return the variables that are set before a program, as a shell takes them; not those whose names say that they are secret."""
    set_before = [word for word in words if _VARIABLE.match(word)]
    return [
        f"{name}={shlex.quote(value) if value else ''}"
        for name, _, value in (word.partition("=") for word in set_before) if not _SECRET.search(name)
    ]  # fmt: skip


def _visible(words: Sequence[str]) -> tuple[int, ...] | None:
    """Return the numbers of the cards that variables before the program let it see; None where they say nothing."""
    for word in words:
        found = _VISIBLE.fullmatch(word)
        if found is not None:
            return tuple(dict.fromkeys(int(number) for number in found[1].split(",")))
    return None


def _of_visible(call: Call, visible: tuple[int, ...] | None) -> Call:
    """Return the call with cards numbered as the machine has them, where the program saw only some; raises InputError for too few."""
    if visible is None or call.backend == "cpu":
        return call
    if call.cards is None:
        return dataclasses.replace(call, cards=visible)
    if max(call.cards) >= len(visible):
        raise InputError(
            f"{FIELD}: cards", len(call.cards), f"the program sees {len(visible)}", "let it see as many as it uses"
        )
    return dataclasses.replace(call, cards=tuple(visible[card] for card in call.cards))


def _program(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return (program, what it is told)."""
    for at, word in enumerate(words):
        if at == 0 and word.startswith("-"):
            return llamacpp.SERVERS[0], list(words)
        name = re.sub(r"\.(exe|py)$", "", word.replace("\\", "/").rpartition("/")[2].lower())
        if name == "vllm" and words[at + 1 : at + 2] == ["serve"]:
            return "vllm serve", list(words[at + 2 :])
        if name == "ollama" and words[at + 1 : at + 2] in (["run"], ["serve"]):
            return f"ollama {words[at + 1]}", list(words[at + 2 :])
        if name in PROGRAMS:
            return name, list(words[at + 1 :])
    raise UnknownName(f"{FIELD}: program", words[0], PROGRAMS)


def _check_engine(engine: str | None, possible: Sequence[str], program: str) -> None:
    if engine is not None and engine not in possible:
        raise InputError("--engine", engine, f"{program} is of {' or '.join(possible)}", "leave out one of the two")
