"""What routers would choose some layers early: each layer's own gate, or a trained one, run on what an earlier router reads.

    column c's router input x [T, H] ── gate of column c + d ──► its best `width` experts [T, width], with probabilities

Modelled: any router that chooses by `top_k`, asked for more than it usually chooses, so that biases and limits of groups count as
they do for the true choice; probabilities are the softmax of its logits, or their sigmoid where it corrects scores with a bias
and so weighs each expert by itself. Trained gates (`gates`) are linear maps, with a small
hidden layer beside them where one was trained; on a CPU one token's guess is a compiled loop, as a dozen small operations of torch take
many times longer than their arithmetic. `Hindsight` has an earlier run's choices in their place. Ignored: what is done with guesses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from ...base.errors import InputError, Internal
from ...base.jit import compiled, jit_numeric
from ...sim.policies.state import Array
from ...traces.recording import RoutingTrace
from .loading.pre_gates import reads_early


class Gate(NamedTuple):
    """A trained gate: a linear map, and where it has one, a hidden layer of R units beside it."""

    weight: torch.Tensor
    """[E, H]."""
    bias: torch.Tensor
    """[E]."""
    inner: torch.Tensor | None = None
    """[R, H]."""
    inner_bias: torch.Tensor | None = None
    """[R]."""
    outer: torch.Tensor | None = None
    """[E, R]."""

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return [T, E] for what a router reads, [T, H]: `weight x + bias + outer silu(inner x + inner_bias)`."""
        x = x.float()
        found = functional.linear(x, self.weight, self.bias)
        if self.inner is None or self.outer is None:
            return found
        return found + functional.linear(functional.silu(functional.linear(x, self.inner, self.inner_bias)), self.outer)


_DEAD = 80.0
"""Below its negative a SiLU is nothing, and the exponential still a float32."""

Gates = Mapping[tuple[int, int], Gate]
"""By (column, distance): the gate that guesses for the column so many columns early."""


def ranked(router: Any, x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids int64 [T, width] that `router` ranks highest for `x` [T, H], best first, and their probabilities."""
    usual = router.top_k
    router.top_k = width
    try:
        # Not as a module: a hook that notes what the router reads would note guesses.
        logits, weights, ids = router.forward(x)[:3]
    finally:
        router.top_k = usual
    ids = ids.gather(1, weights.argsort(dim=1, descending=True, stable=True))
    return ids, _probabilities(router, logits).gather(1, ids)


def ranked_by(gate: Gate, x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same for a trained gate."""
    best = gate.logits(x).softmax(dim=-1).topk(width, dim=-1)
    return best.indices, best.values


class GateRow:
    """A trained gate for one token at a time, on a CPU."""

    def __init__(self, gate: Gate) -> None:
        experts, hidden = gate.weight.shape
        self._linear = _with_bias(gate.weight, gate.bias)
        self._inner, self._outer = np.zeros((0, hidden + 1), np.float32), np.zeros((0, experts), np.float32)
        if gate.inner is not None and gate.inner_bias is not None and gate.outer is not None:
            self._inner, self._outer = _with_bias(gate.inner, gate.inner_bias), _plain(gate.outer.T)
        self._chances = np.empty(experts, np.float32)

    def ranked(self, x: Array, width: int) -> tuple[Array, Array]:
        """Return ids int16 [1, width], best first, and probabilities float16 [1, width], for what a router reads, float32 [H]."""
        ids, best = np.empty(width, np.int16), np.empty(width, np.float32)
        rank_row(x, self._linear, self._inner, self._outer, self._chances, ids, best)
        return ids[None], best.astype(np.float16)[None]


def _with_bias(weight: torch.Tensor, bias: torch.Tensor) -> Array:
    """Return [N, K + 1]: a matrix with its bias as the last column."""
    return _plain(torch.cat([weight, bias[:, None]], dim=1))


def _plain(tensor: torch.Tensor) -> Array:
    found: Array = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
    return found


@jit_numeric
def rank_row(x: Array, linear: Array, inner: Array, outer: Array, chances: Array, ids: Array, best: Array) -> None:
    """Fill `ids` and `best` with the likeliest experts and their softmax for `x` [H]; linear [E, H + 1] and inner [R, H + 1] end with
    their biases, outer is [R, E], chances [E] is scratch.
    """
    count, hidden = linear.shape[0], x.shape[0]
    for expert in range(count):
        total = np.float32(0)
        for at in range(hidden):
            total += linear[expert, at] * x[at]
        chances[expert] = total + linear[expert, hidden]
    for unit in range(inner.shape[0]):
        total = np.float32(0)
        for at in range(hidden):
            total += inner[unit, at] * x[at]
        total += inner[unit, hidden]
        total = total / (np.float32(1) + np.exp(-max(total, np.float32(-_DEAD))))
        for expert in range(count):
            chances[expert] += outer[unit, expert] * total
    most = chances[0]
    for expert in range(1, count):
        most = max(most, chances[expert])
    whole = np.float32(0)
    for expert in range(count):
        chances[expert] = np.exp(chances[expert] - most)
        whole += chances[expert]
    for place in range(ids.shape[0]):
        first = 0
        for expert in range(1, count):
            if chances[expert] > chances[first]:
                first = expert
        ids[place], best[place] = first, chances[first] / whole
        chances[first] = np.float32(-1)


def _probabilities(router: Any, logits: torch.Tensor) -> torch.Tensor:
    wide = logits.float()
    return wide.sigmoid() if _weighs_singly(router) else wide.softmax(dim=-1)


def distribution(router: Any, logits: torch.Tensor) -> torch.Tensor:
    """Return the distribution over experts that a router's logits [T, E] stand for; it sums to one."""
    if not _weighs_singly(router):
        return logits.float().softmax(dim=-1)
    chances = logits.float().sigmoid() + getattr(router, "e_score_correction_bias", torch.zeros(1)).float()
    chances = chances.clamp(min=1e-6)
    return chances / chances.sum(-1, keepdim=True)


def _weighs_singly(router: Any) -> bool:
    """Return whether a router gives each expert a score of its own (a sigmoid, corrected by a bias) rather than a share."""
    return hasattr(router, "e_score_correction_bias")


class Guesser:
    """Guesses for later columns of a model, up to `depth` columns ahead and `width` experts each."""

    def __init__(self, routers: Sequence[Any], *, depth: int, width: int, gates: Gates | None = None) -> None:
        for router in routers:
            if reads_early(router):
                rule = "the model's gates choose some layers early themselves, which leaves nothing to guess"
                raise InputError("--model", type(router).__name__, rule, "give a model with ordinary gates")
            if not isinstance(getattr(router, "top_k", None), int):
                name = type(router).__name__
                raise InputError(
                    "predictor.kind", "next-gate", f"{name} does not say how many it chooses", "set it to none"
                )
        self._routers, self._gates = routers, gates or {}
        self.depth, self.width = depth, width
        self._rows: dict[tuple[int, int], GateRow] = {}
        if compiled():
            self._rows = {
                at: GateRow(gate) for at, gate in self._gates.items() if at[1] <= depth and not gate.weight.is_cuda
            }
        for at, row in self._rows.items():  # loops are compiled when they first run, which belongs to no token's time
            row.ranked(np.zeros(self._gates[at].weight.shape[1], np.float32), width)
            break

    def guess(self, column: int, distance: int, x: torch.Tensor) -> tuple[Array, Array]:
        """Return ids int16 [T, width] and probabilities float16 [T, width] for `column`.

        x: what the router `distance` columns before reads, [T, H].
        """
        row = self._rows.get((column, distance))
        if row is not None and len(x) == 1 and not x.is_cuda:
            return row.ranked(np.ascontiguousarray(x.float().numpy()[0]), self.width)
        gate = self._gates.get((column, distance))
        if gate is None:
            ids, probabilities = ranked(self._routers[column], x, self.width)
        else:
            ids, probabilities = ranked_by(gate, x, self.width)
        return ids.cpu().numpy().astype(np.int16), probabilities.float().cpu().numpy().astype(np.float16)


class Hindsight:
    """The true choices in place of guesses, as an earlier run of the same requests recorded them: what better gates alone could gain."""

    def __init__(self, recording: RoutingTrace, *, depth: int, width: int) -> None:
        if width > recording.top_k:
            raise InputError("predictor.width", width, f"a layer chooses {recording.top_k}", "give at most that many")
        self._experts = recording.experts
        self._begin = self._end = 0
        self.depth, self.width = depth, width

    def guess(self, column: int, distance: int, x: torch.Tensor) -> tuple[Array, Array]:
        """Return ids int16 [T, width] and probabilities 1, float16 [T, width], of the passes' tokens in turn.

        x: [T, H], of which only T counts. Every pass asks for column 1, one column early, before anything else.
        """
        if (column, distance) == (1, 1):
            self._begin, self._end = self._end, self._end + len(x)
        if self._end > len(self._experts):
            raise Internal("a run is longer than the recording that its guesses are taken from")
        found = self._experts[self._begin : self._end, column, : self.width].astype(np.int16)
        return found, np.ones(found.shape, np.float16)
