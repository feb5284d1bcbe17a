"""One forward pass as decisions see it, learnt layer by layer while the model computes; and the rows a recording keeps of it.

Modelled: the arrays of `sim.policies.steps.Steps` for a single pass. Layer steps of layers that are still to come are empty until they
are known, so a decision can see nothing that a replay of the same routing would not have shown it, and no more. Ignored: what
comes of it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

from ...base.jit import jit
from ...sim.offload.layer_steps import gather_layer_steps
from ...sim.offload.workload import PROBABILITY_ONE, guess_scores
from ...sim.policies.state import Array
from ...sim.policies.steps import Steps

NO_GUESSES = (0, 0)


class LivePass:
    """One pass of `num_tokens` tokens over `num_columns` MoE layers.

    guesses: (distance, width) of the guesses that are made, `NO_GUESSES` without any. first_layer_step: layer steps of the run before it.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        num_columns: int,
        num_experts: int,
        top_k: int,
        guesses: tuple[int, int],
        first_layer_step: int,
        phase: int,
        first: bool,
        reset: bool,
    ) -> None:
        self._num_experts, self._end = num_experts, 0
        room = num_columns * min(num_experts, num_tokens * top_k)
        kind = np.uint8 if num_experts <= 1 << 8 else np.uint16
        distance, width = guesses
        shape = (num_tokens, num_columns, distance, width) if distance and width else (0, 0, 0, 0)
        self.experts = np.zeros((num_tokens, num_columns, top_k), kind)
        self.weights = np.zeros((num_tokens, num_columns, top_k), np.float16)
        self.predicted = np.full(shape, -1, np.int16)
        self.probability = np.zeros(shape, np.float16)
        self._halves = self.probability.view(np.uint16)
        self.steps = steps = Steps(
            layer_step_start=np.zeros(num_columns + 1, np.int64),
            layer_step_expert=np.zeros(room, np.int16),
            layer_step_tokens=np.zeros(room, np.int32),
            layer_step_touch=np.zeros(room, np.int16),
            layer_step_next_use=np.zeros(1, np.int64),
            layer_step_rank=np.zeros(room, np.uint8),
            step_start=np.array([0, num_tokens], np.int64),
            step_token=np.arange(num_tokens, dtype=np.int64),
            step_phase=np.array([phase], np.uint8),
            step_first=np.array([int(first)], np.uint8),
            step_reset=np.array([int(reset)], np.uint8),
            experts=self.experts,
            predicted=self.predicted,
            predicted_prob=np.zeros(shape, np.int16),
            first_layer_step=first_layer_step,
        )
        self._noted = self.experts, steps.layer_step_start, steps.layer_step_expert, steps.layer_step_touch
        if num_tokens == 1:  # what is so whatever it chooses
            steps.layer_step_tokens[:] = 1
            steps.layer_step_rank[:] = np.tile(np.arange(top_k), num_columns)

    @property
    def num_tokens(self) -> int:
        """Tokens of the pass."""
        return len(self.experts)

    def know(self, column: int, ids: Array, weights: Array) -> None:
        """Note what tokens chose in `column`: ids [T, k], best first, and the router's weights."""
        steps = self.steps
        self.weights[:, column] = weights
        if self.num_tokens == 1:  # its choices, which all differ, are the layer step as they are
            self._end = note_choices(*self._noted, column, ids, self._end)
            return
        self.experts[:, column] = ids
        mine = np.ascontiguousarray(self.experts[:, column : column + 1])
        _, experts, tokens, touch, rank = gather_layer_steps(
            mine, steps.step_start, steps.step_token, self._num_experts
        )
        low, high = self._end, self._end + len(experts)
        steps.layer_step_expert[low:high] = experts
        steps.layer_step_tokens[low:high] = tokens
        steps.layer_step_touch[low:high] = touch
        steps.layer_step_rank[low:high] = rank
        steps.layer_step_start[column + 1 :] = high
        self._end = high

    def offsets(self, column: int) -> list[int]:
        """Return where each expert's rows begin among the choices of `column` sorted by expert; num_experts + 1 numbers."""
        if self.num_tokens == 1:  # its choices all differ
            chosen = sorted(self.experts[0, column].tolist())
            found = [0] * (chosen[0] + 1)
            for number, (one, other) in enumerate(itertools.pairwise([*chosen, self._num_experts]), 1):
                found += [number] * (other - one)
            return found
        counts = np.bincount(self.experts[:, column].ravel(), minlength=self._num_experts)
        return [0, *np.cumsum(counts).tolist()]

    def guess(self, column: int, distance: int, ids: Array, probability: Array) -> None:
        """Note what was guessed for `column`, `distance` columns early: int16 ids [T, width], best first, and float16 probabilities."""
        if self.num_tokens == 1:
            halves = probability.view(np.uint16)
            note_row(self.predicted, self._halves, self.steps.predicted_prob, column, distance - 1, ids, halves)
            return
        self.predicted[:, column, distance - 1] = ids
        self.probability[:, column, distance - 1] = probability
        self.steps.predicted_prob[:, column, distance - 1] = guess_scores(probability)


@jit
def note_choices(experts: Array, start: Array, expert: Array, touch: Array, column: int, ids: Array, low: int) -> int:
    """Write what a pass's only token chose in `column`, int [1, k], into its layer steps from `low` on; return where the next begin."""
    for place in range(ids.shape[1]):
        experts[0, column, place] = expert[low + place] = touch[low + place] = ids[0, place]
    high: int = low + ids.shape[1]
    start[column + 1 :] = high
    return high


@jit
def note_row(
    predicted: Array, halves: Array, scores: Array, column: int, at: int, ids: Array, probability: Array
) -> None:
    """Write one token's guesses into a pass's arrays [1, columns, distances, width]: ids [1, width], and float16 probabilities, as their
    bits and as `guess_scores` has them; one compiled call takes a tenth of what four assignments and their arithmetic take.
    """
    for place in range(ids.shape[1]):
        bits = probability[0, place]
        predicted[0, column, at, place] = ids[0, place]
        halves[0, column, at, place] = bits
        power, part = (bits >> 10) & 31, bits & 1023
        if bits >> 15 or power == 31:  # below nothing, or no finite number: infinity alone counts
            scores[0, column, at, place] = PROBABILITY_ONE if bits == 31 << 10 else 0
            continue
        whole = part * 2.0**-24 if power == 0 else (part + 1024) * 2.0 ** (power - 25)
        scores[0, column, at, place] = int(np.float32(min(whole, 1.0)) * np.float32(PROBABILITY_ONE))


@dataclass(slots=True)
class Kept:
    """The rows of all passes so far, as a recording has them."""

    experts: list[Array] = field(default_factory=list)
    weights: list[Array] = field(default_factory=list)
    predicted: list[Array] = field(default_factory=list)
    probability: list[Array] = field(default_factory=list)
    request: list[Array] = field(default_factory=list)
    position: list[Array] = field(default_factory=list)
    phase: list[Array] = field(default_factory=list)

    def add(self, done: LivePass, *, request: int, position: int, phase: int) -> None:
        """Keep a pass over one request's tokens, the first of them at `position`."""
        count = done.num_tokens
        self.experts.append(done.experts)
        self.weights.append(done.weights)
        if done.predicted.size:
            self.predicted.append(done.predicted)
            self.probability.append(done.probability)
        self.request.append(np.full(count, request, np.int32))
        self.position.append(np.arange(position, position + count, dtype=np.int32))
        self.phase.append(np.full(count, phase, np.uint8))
