"""A machine as expert parallelism meets it: its links between cards, and its kernels or those of the card that it is made like.

Modelled: one way for every prediction of many ranks (`simulate`, `plan`, scores beside what people measured). Ignored: clusters of
several kinds of cards.
"""

from __future__ import annotations

from ...base.errors import InputError
from .bundled_kernels import USUAL_ENGINE, as_measured, kernel_machines, with_kernels
from .compose import compose_text
from .profile import Profile
from .profile_file import list_hardware
from .siblings import as_server, servers


def serving_machine(profile: Profile, engine: str | None = None) -> Profile:
    """Return a machine with links and kernels of `engine` (the usual one where None), a sibling's where its own were not measured.

    Raises InputError where an engine is named whose kernels are known neither on this card nor on the one that it is made like.
    """
    card = profile.name
    row = servers().get(card)
    if row is None or card in kernel_machines() or profile.kernels is not None or profile.curves:
        return with_kernels(profile, engine)
    under = None if profile.engine is None else profile.engine.name
    chosen = engine or (under if under is not None and "as" not in row else USUAL_ENGINE)
    # A card that stands for a whole machine has rates of the engine it was put together with; what someone has set stays.
    if card not in list_hardware() and under is not None and profile == compose_text(card, under):
        profile = compose_text(card, chosen)
    found = as_measured(as_server(profile, card, chosen))
    if engine is not None and found.kernels is None and "as" in row:
        raise InputError("--engine", engine, f"its kernels are not known on {row['as']}, which {card} is made like, or what they "
                         "depend on is set otherwise", "leave it out")  # fmt: skip
    return found
