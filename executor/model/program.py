"""A model's own forward pass as the program of a run: its MoE layers are layer steps, whatever lies between them is the dense part.

Modelled: `LayerSteps` (executor/running) does all that a layer step asks for; here a layer step's routing comes from the model's router,
guesses from gates run early, and the pass from whoever calls the model. The compute stream is the caller's. Ignored: what is
generated (`generate`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...devices.device import Device, Mark
from ...devices.runners.runner import ExpertRunner
from ...sim.policies.offload import begin_step, decide_layer_step
from ...sim.policies.state import Decision, PolicyConfig, PolicyState, make_decision
from ...sim.timeline import OP_DENSE, OP_HEAD, OP_HOST_STEP
from ..running.copy_engine import Gate
from ..running.layer_steps import LayerSteps
from ..running.workers import Workers
from .guesses import Guesser, Hindsight
from .loading.pre_gates import PreGates
from .passes import LivePass


class LiveProgram(LayerSteps):
    """The layer steps of a model that is computing; `passing`, then the model, then `sampled`, for every pass."""

    def __init__(
        self,
        config: PolicyConfig,
        state: PolicyState,
        out: Decision,
        first: LivePass,
        *,
        device: Device,
        experts: Sequence[ExpertRunner],
        expert_bytes: Sequence[int],
        gate: Gate,
        workers: Workers,
        guesser: Guesser | Hindsight | None,
        pre_gates: PreGates | None = None,
    ) -> None:
        super().__init__(
            config, first.steps, state, out, device=device, experts=experts, expert_bytes=expert_bytes, gate=gate, workers=workers
        )  # fmt: skip
        self._guesser, self._pre_gates = guesser, pre_gates
        self._pass, self._number = first, -1
        self._began: Mark = device.mark()
        self._reads: dict[int, torch.Tensor] = {}
        self.step_begin_ns: list[int] = []
        self.guess_ns: list[int] = []
        """How long each guess for one later column took."""

    def _decided(self, number: int) -> int:
        """Return 0: decisions see one pass at a time."""
        del number
        return 0

    def begin(self, now: LivePass) -> None:
        """Start a pass: the model is about to compute it."""
        self._pass, self._steps = now, now.steps
        self._number += 1
        self._device.new_epoch()
        begin_step(self._config, self._steps, self._state, 0)
        self._began = self._device.mark()
        self.step_begin_ns.append(time.perf_counter_ns())

    def reads(self, column: int, x: torch.Tensor) -> None:
        """Note what the router of `column` reads, [T, H]: guesses for later columns are made from it."""
        self._reads[column] = x

    def answer(self, column: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the experts' summed answers [T, H] for tokens `x` [T, H] that chose `ids` [T, k] with `weights` [T, k]."""
        device, number = self._device, self._number
        end = device.mark()
        end.wait()
        tokens = len(x)
        self.rows.computed(OP_DENSE, number, column, -1, self._began, end, tokens)
        ids, weights = best_first(ids, weights)
        if self._pre_gates is None or column == 0:
            self._pass.know(column, ids.cpu().numpy(), weights.float().cpu().numpy())
        self._choose_early(column)
        self._guess(column, x)
        offsets = self._pass.offsets(column)
        layer_step = self._experts[0].begin(torch.zeros_like(x), x, weights.float(), ids, offsets)
        self._layer_step(number, column, layer_step, end.at_ns())
        self._await_cores()
        self._await_places()
        found = self._answered(layer_step)
        if column < self._config.num_layers - 1:
            self._note_part(time.perf_counter_ns())
        self._began = device.mark()
        return found

    def sampled(self, logits: torch.Tensor) -> int:
        """Return the likeliest next token by the last row of `logits` [T, V]; the pass is over."""
        last = self._config.num_layers - 1
        chosen = logits[-1].argmax()
        end = self._device.mark()
        end.wait()
        self.rows.computed(OP_HEAD, self._number, last, -1, self._began, end, self._pass.num_tokens)
        found = int(chosen)
        now = time.perf_counter_ns()
        self.rows.hosted(OP_HOST_STEP, self._number, last, end.at_ns(), now)
        self.step_end_ns.append(now)
        self._note_part(now)
        self._gate.check()
        return found

    def finish(self) -> None:
        """Wait until everything admitted has been moved."""
        self._end()

    def _choose_early(self, column: int) -> None:
        """Learn what the next layer's experts will be, where the model's gates say so."""
        if self._pre_gates is None or column + 1 >= self._config.num_layers:
            return
        ids, weights = best_first(*self._pre_gates.early(column + 1))
        self._pass.know(column + 1, ids.cpu().numpy(), weights.float().cpu().numpy())

    def _guess(self, column: int, x: torch.Tensor) -> None:
        if self._guesser is None:
            return
        read = self._reads.get(column, x)
        for distance in range(1, min(self._guesser.depth, self._config.num_layers - 1 - column) + 1):
            began = time.perf_counter_ns()
            self._pass.guess(column + distance, distance, *self._guesser.guess(column + distance, distance, read))
            if self._pass.num_tokens == 1:
                self.guess_ns.append(time.perf_counter_ns() - began)


def rehearse(config: PolicyConfig, state: PolicyState, scratch: LivePass) -> None:
    """Decide one layer step on a copy of `state`: decisions are compiled when first made, which belongs to no token's time."""
    copied = PolicyState(*(array.copy() for array in state))
    tokens, top_k = scratch.num_tokens, scratch.experts.shape[2]
    scratch.know(0, np.tile(np.arange(top_k), (tokens, 1)), np.zeros((tokens, top_k), np.float32))
    if scratch.predicted.size and config.num_layers > 1:
        shape = (tokens, scratch.predicted.shape[3])
        scratch.guess(1, 1, np.zeros(shape, np.int16), np.zeros(shape, np.float16))
    begin_step(config, scratch.steps, copied, 0)
    decide_layer_step(config, scratch.steps, copied, make_decision(config), 0, 0)


def best_first(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return choices in falling order of their weights: some routers leave them unsorted."""
    if len(weights) == 1 and not weights.is_cuda:  # a token's own few: quicker looked at one by one
        row = weights[0].tolist()
        sorted_already = all(one >= other for one, other in itertools.pairwise(row))
    else:
        sorted_already = bool((weights[:, :-1] >= weights[:, 1:]).all())
    if sorted_already:
        return ids, weights
    order = weights.argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), weights.gather(1, order)


def router_hooks(routers: Sequence[Any], program: LiveProgram) -> list[Any]:
    """Return handles of hooks that tell `program` what each router reads."""

    def hook(column: int) -> Any:
        def keep(_: Any, given: tuple[torch.Tensor, ...], __: Any) -> None:
            program.reads(column, given[0].reshape(-1, given[0].shape[-1]))

        return keep

    return [router.register_forward_hook(hook(column)) for column, router in enumerate(routers)]
