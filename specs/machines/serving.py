"""A machine as expert parallelism meets it: its links between cards, and its kernels or those of the card that it is made like.

Modelled: one way for every prediction of many ranks (`simulate`, `plan`, scores beside what people measured); a card by any of its
names is the bundled server that it was measured in; cards that nobody measured are run by an engine that serves. Ignored: clusters of
several kinds of cards.
"""

from __future__ import annotations

from ...base.errors import InputError
from .bundled_kernels import USUAL_ENGINE, as_measured, kernel_machines, measured_as, with_kernels
from .catalogue import known_gpu
from .compose import DEFAULT_ENGINE, compose_text
from .engines import load_engine
from .load import load_machine
from .notation import is_parts
from .profile import Profile
from .profile_file import list_hardware, load_hardware
from .siblings import as_server, servers

SERVING_ENGINES = ("tensorrt-llm", "sglang", "vllm")
"""Engines that serve experts on many ranks, the usual one first."""


def load_server(text: str) -> Profile:
    """Return a machine by whatever people call it, for many ranks: a card alone is the bundled server that it was measured in.

    Raises UnknownName or InputError.
    """
    card = known_gpu(text) if is_parts(text) and text not in list_hardware() else None
    if card is not None:
        machine = card.name if card.name in list_hardware() else measured_as(card.name)
        if machine is not None and load_hardware(machine).node is not None:
            return load_hardware(machine)
    return load_machine(text)


def serving_engines(profile: Profile) -> tuple[str, ...]:
    """Return the engines that a machine can be predicted under: those whose kernels are known on its card or on the card that it is made
    like; where nobody measured any, those that run on it. None for a machine that stands for the software it was measured with.
    """
    if profile.kernels is not None:
        return (profile.kernels.engine,)
    if profile.curves:
        return ()
    row = servers().get(profile.name)
    if row is None or profile.name in kernel_machines():
        return kernel_machines().get(profile.name, ())
    if "as" in row:
        return kernel_machines()[row["as"]]
    backend = "cuda" if profile.engine is None else profile.engine.backend
    return tuple(name for name in SERVING_ENGINES if backend in load_engine(name).backends)


def serving_machine(profile: Profile, engine: str | None = None) -> Profile:
    """Return a machine with links and kernels of `engine` (the usual one where None), a sibling's where its own were not measured.

    Raises InputError where an engine is named whose kernels are known neither on this card nor on the one that it is made like.
    """
    card = profile.name
    row = servers().get(card)
    if row is None or card in kernel_machines() or profile.curves:
        return with_kernels(profile, engine)
    if profile.kernels is not None:
        own = with_kernels(profile, engine)
        return as_measured(as_server(own, card, profile.kernels.engine))
    under = None if profile.engine is None else profile.engine.name
    chosen = engine or USUAL_ENGINE
    if engine is None and "as" not in row and under is not None:
        # Nobody serves a cluster with the engine that machines of parts have where none is named.
        chosen = serving_engines(profile)[0] if under == DEFAULT_ENGINE else under
    # A card that stands for a whole machine has rates of the engine it was put together with; what someone has set stays.
    if card not in list_hardware() and under is not None and profile == compose_text(card, under):
        profile = compose_text(card, chosen)
    found = as_measured(as_server(profile, card, chosen))
    if engine is not None and found.kernels is None and "as" in row:
        raise InputError("--engine", engine, f"its kernels are not known on {row['as']}, which {card} is made like, or what they "
                         "depend on is set otherwise", "leave it out")  # fmt: skip
    return found
