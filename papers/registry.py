"""The papers that can be reproduced, by name; a paper's module is imported when it is asked for.

Modelled: one line a paper; what a paper lets one change is read from its function's signature. Ignored: how tables are shown.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping

from ..base.errors import InputError, UnknownName
from .cells import Reproduction

# Name → module of this folder and function in it.
_PAPERS: Mapping[str, str] = {
    "deepep": "deepep.reproduce_deepep",
    "engines": "engines.reproduce_engines",
    "eps-moe": "eps_moe.reproduce_eps_moe",
    "grace-moe": "grace_moe.reproduce_grace_moe",
    "lookahead": "lookahead.reproduce_lookahead",
    "mixtral-offloading": "mixtral_offloading.reproduce_mixtral_offloading",
    "pre-gated": "pre_gated.reproduce_pre_gated",
    "rebalancing": "rebalancing.reproduce_rebalancing",
}
PAPERS = tuple(sorted(_PAPERS))
"""Names of the papers."""


def reproduce(name: str, *, hardware: str | None = None, bits: str | None = None) -> Reproduction:
    """Return a paper's tables beside the simulator's, or its model's predictions for another machine or weight format.

    Raises UnknownName for a paper, machine or format that is not here, InputError where the paper is tied to its own machines,
    DoesNotFit where the machine asked for cannot hold the model.
    """
    if name not in _PAPERS:
        raise UnknownName("paper", name, PAPERS)
    function = _function(name)
    if _any_machine(function):
        return function(hardware, bits)
    for option, value in (("--hardware", hardware), ("--bits", bits)):
        if value is not None:
            free = [other for other in PAPERS if _any_machine(_function(other))]
            raise InputError(option, value, f"{name} is reproduced for its own machines only",
                             f"leave it out, or choose {' or '.join(free)}")  # fmt: skip
    return function()


def _function(name: str) -> Callable[..., Reproduction]:
    module, _, function = _PAPERS[name].partition(".")
    found: Callable[..., Reproduction] = getattr(importlib.import_module(f".{module}", __package__), function)
    return found


def _any_machine(function: Callable[..., Reproduction]) -> bool:
    """Return whether a paper can be asked about another machine and weight format: its function takes both."""
    return {"hardware", "bits"} <= set(inspect.signature(function).parameters)
