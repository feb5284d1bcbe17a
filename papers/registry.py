"""The papers that can be reproduced, by name; a paper's module is imported when it is asked for.

Ignored: how tables are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..base.errors import InputError, UnknownName
from .cells import Reproduction


def _deepep() -> Reproduction:
    from .deepep import reproduce_deepep

    return reproduce_deepep()


def _engines() -> Reproduction:
    from .engines import reproduce_engines

    return reproduce_engines()


def _eps_moe() -> Reproduction:
    from .eps_moe import reproduce_eps_moe

    return reproduce_eps_moe()


def _grace_moe() -> Reproduction:
    from .grace_moe import reproduce_grace_moe

    return reproduce_grace_moe()


def _mixtral_offloading(hardware: str | None, bits: str | None) -> Reproduction:
    from .mixtral_offloading import reproduce_mixtral_offloading

    return reproduce_mixtral_offloading(hardware, bits)


def _pre_gated(hardware: str | None, bits: str | None) -> Reproduction:
    from .pre_gated import reproduce_pre_gated

    return reproduce_pre_gated(hardware, bits)


_ONE_SETUP: Mapping[str, Callable[[], Reproduction]] = {
    "deepep": _deepep, "engines": _engines, "eps-moe": _eps_moe, "grace-moe": _grace_moe,
}  # fmt: skip
_ANY_MACHINE: Mapping[str, Callable[[str | None, str | None], Reproduction]] = {
    "mixtral-offloading": _mixtral_offloading,
    "pre-gated": _pre_gated,
}
PAPERS = tuple(sorted((*_ONE_SETUP, *_ANY_MACHINE)))
"""Names of the papers."""


def reproduce(name: str, *, hardware: str | None = None, bits: str | None = None) -> Reproduction:
    """Return a paper's tables beside the simulator's, or its model's predictions for another machine or weight format.

    Raises UnknownName for a paper, machine or format that is not here, InputError where the paper is tied to its own machines,
    DoesNotFit where the machine asked for cannot hold the model.
    """
    if name not in PAPERS:
        raise UnknownName("paper", name, PAPERS)
    if name in _ANY_MACHINE:
        return _ANY_MACHINE[name](hardware, bits)
    for option, value in (("--hardware", hardware), ("--bits", bits)):
        if value is not None:
            raise InputError(option, value, f"{name} is reproduced for its own machines only",
                             f"leave it out, or choose {' or '.join(_ANY_MACHINE)}")  # fmt: skip
    return _ONE_SETUP[name]()
