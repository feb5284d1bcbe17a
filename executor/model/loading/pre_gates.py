"""Models whose gates choose some blocks early: the router of block t reads what the router of block t − N reads.

    config.json: "moeplan_pre_gate": N        the first N blocks choose for themselves, as they have nobody before them

Such a checkpoint has the tensors of any other: the router of block t is the gate that stands, in the published picture, in block t − N
(Pre-gated MoE, arXiv 2308.12066, figure 6: the first block has two gates, the last none). Its choice is final, so it is never wrong.

Modelled: one forward pass at a time, any router that chooses from one matrix of rows. Ignored: how such gates are trained (the example
`tiny_moe` does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ....base.errors import InputError

KEY = "moeplan_pre_gate"


class PreGates:
    """Routers that read early. `distance`: blocks early."""

    def __init__(self, routers: Sequence[Any], distance: int) -> None:
        """Let each router read what the one `distance` blocks before it reads; `undo` takes it back."""
        self.distance = distance
        self._routers = list(routers)
        self._forwards: list[Callable[..., Any]] = [router.forward for router in routers]
        self._reads: dict[int, torch.Tensor] = {}
        self._chosen: dict[int, Any] = {}
        for column, router in enumerate(self._routers):
            router.forward = self._replacement(column)

    def undo(self) -> None:
        """Let routers read for themselves again."""
        for router in self._routers:
            del router.forward

    def early(self, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the tokens of this pass choose in `column`, ids [T, k] and weights [T, k]: block `column - distance` has been read.

        The model is given the same answer when it comes there.
        """
        self._chosen[column] = found = self._forwards[column](self._reads[column - self.distance])
        return found[2], found[1]

    def _replacement(self, column: int) -> Callable[..., Any]:
        own = self._forwards[column]

        def forward(x: torch.Tensor, *others: Any) -> Any:
            self._reads[column] = x
            if column < self.distance:
                return own(x, *others)
            known = self._chosen.pop(column, None)
            return own(self._reads[column - self.distance], *others) if known is None else known

        return forward


def reads_early(router: Any) -> bool:
    """Return whether a router is one of a model whose gates choose early."""
    return "forward" in vars(router)


def distance_of(config: Any, num_columns: int, folder: str) -> int:
    """Return how many blocks early a checkpoint's gates choose, 0 for an ordinary one; raises InputError for nonsense."""
    said = getattr(config, KEY, 0)
    if not isinstance(said, int) or isinstance(said, bool) or not 0 <= said < num_columns:
        rule = f"{KEY} is {said!r} in its config.json, with {num_columns} MoE layers"
        raise InputError("--model", folder, rule, f"a whole number from 0 to {num_columns - 1} belongs there")
    return said
