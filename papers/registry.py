"""The papers that can be reproduced, by name; a paper's module is imported when it is asked for.

Ignored: how tables are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..errors import UnknownName
from .cells import Reproduction


def _deepep() -> Reproduction:
    from .deepep import reproduce_deepep

    return reproduce_deepep()


def _eps_moe() -> Reproduction:
    from .eps_moe import reproduce_eps_moe

    return reproduce_eps_moe()


def _grace_moe() -> Reproduction:
    from .grace_moe import reproduce_grace_moe

    return reproduce_grace_moe()


PAPERS: Mapping[str, Callable[[], Reproduction]] = {"deepep": _deepep, "eps-moe": _eps_moe, "grace-moe": _grace_moe}


def reproduce(name: str) -> Reproduction:
    """Return a paper's tables beside the simulator's; raises UnknownName for a paper that is not here."""
    if name not in PAPERS:
        raise UnknownName("paper", name, PAPERS)
    return PAPERS[name]()
