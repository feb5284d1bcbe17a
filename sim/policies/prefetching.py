"""What to fetch ahead: guesses about a later layer of the same step, ranked.

Modelled: guesses from the recording (a gate applied early), the truth spoilt to a given recall by a counter-based hash,
the truth itself, or every expert. A batch's guesses are pooled: each token's best `width` guesses add their probability to
the experts they name, and experts are ranked by the sum; equal sums keep the order in which they were first named, so that
renumbering experts changes nothing. Guesses that depend on the recording alone are the same in every run, whatever it caches: where
many runs ask for them they are found once (`tabulate_guesses`). Ignored: guesses across steps (the next token is not known before
the head has run).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...base.jit import jit_inline, jit_inner, jit_lean
from ...base.records import Array
from .state import (
    GUESS_ACTIVATION, GUESS_ALL, GUESS_DIAL, GUESS_NEXT_GATE, PolicyConfig, PolicyState,
)  # fmt: skip

if TYPE_CHECKING:
    from .steps import Steps

_MASK = 0xFFFFFFFF
SURE = 65536
"""A score of probability one."""
_GUESSING = ("predictor", "depth", "width", "num_layers", "num_experts", "recall_65536", "recall_decay_65536", "seed",
             "guess_distances", "guess_width")  # fmt: skip


@jit_lean
def hash32(a: int, b: int, c: int, d: int) -> int:
    """Return 32 well-mixed bits of four whole numbers; the same on every machine, with no state to carry.

    The mixing constants are those of the public-domain `lowbias32` integer hash (C. Wellons).
    """
    x = 0x9E3779B9
    for word in (a, b, c, d):
        x = (x ^ (word & _MASK)) & _MASK
        x ^= x >> 16
        x = (x * 0x7FEB352D) & _MASK
        x ^= x >> 15
        x = (x * 0x46CA68B5) & _MASK
        x ^= x >> 16
    return x


@jit_inline
def _name(guesses: Array, count: int, expert: int, weight: int) -> int:
    """Add `weight` to an expert's score, noting it when first named; return how many are noted."""
    if guesses[expert].score == 0:
        guesses[count].ranked = expert
        count += 1
    guesses[expert].score += weight
    return count


@jit_inner
def _recorded_guesses(config: PolicyConfig, steps: Steps, guesses: Array, step: int, layer: int, distance: int) -> int:
    count = 0
    if distance > config.guess_distances:
        return count
    width = min(config.width, config.guess_width)
    for row in range(steps.step_start[step], steps.step_start[step + 1]):
        token = steps.step_token[row]
        for rank in range(width):
            expert = int(steps.predicted[token, layer, distance - 1, rank])
            if expert >= 0:
                weight = 2 * int(steps.predicted_prob[token, layer, distance - 1, rank]) + 1
                count = _name(guesses, count, expert, weight)
    return count


@jit_inner
def _dialled_guesses(config: PolicyConfig, steps: Steps, guesses: Array, step: int, layer: int, distance: int) -> int:
    recall = config.recall_65536
    for _ in range(distance - 1):
        recall = (recall * config.recall_decay_65536) >> 16
    top_k = steps.experts.shape[2]
    count = 0
    for row in range(steps.step_start[step], steps.step_start[step + 1]):
        token = int(steps.step_token[row])
        for rank in range(min(config.width, config.num_experts)):
            draw = hash32(config.seed, token, layer * 64 + distance, rank)
            if rank < top_k and (draw & 0xFFFF) < recall:
                expert = int(steps.experts[token, layer, rank])
            else:  # a wrong expert: the first one at or after a hashed place that the token did not choose
                expert = (draw >> 16) % config.num_experts
                for _ in range(config.num_experts):
                    chosen = False
                    for choice in range(top_k):
                        if steps.experts[token, layer, choice] == expert:
                            chosen = True
                    if not chosen:
                        break
                    expert = (expert + 1) % config.num_experts
            count = _name(guesses, count, expert, max(recall, 1))
    return count


@jit_inner
def _remembered_guesses(config: PolicyConfig, steps: Steps, state: PolicyState, step: int, layer: int) -> int:
    """Name the experts that the matched request used most in this layer, each with its share of that request's tokens."""
    guesses, requests = state.guesses, state.requests
    base = layer * config.num_experts
    total = 0
    for expert in range(config.num_experts):
        total += requests[base + expert].matched
    if total == 0:
        return 0
    top_k = steps.experts.shape[2]
    wanted = config.width * (steps.step_start[step + 1] - steps.step_start[step])
    count = 0
    while count < min(wanted, config.num_experts):
        best = -1
        for expert in range(config.num_experts):
            used = requests[base + expert].matched
            if used > 0 and guesses[expert].score == 0 and (best < 0 or used > requests[base + best].matched):
                best = expert
        if best < 0:
            break
        # Every token names top_k experts, so a share of one k-th of all choices is certainty.
        count = _name(guesses, count, best, max(1, requests[base + best].matched * top_k * SURE // total))
    return count


@jit_inline
def worth_fetching(config: PolicyConfig, state: PolicyState, rank: int, distance: int, fmt: int) -> bool:
    """Return whether the guess at `rank` is probable enough, and pays, to be fetched `distance` layers ahead.

    The gain expected is the part of the copy that ends before its layer's turn, if the guess is right; the loss expected
    is by how much the copy delays what comes after it, if it is wrong. Both follow from predicted costs and from the
    backlog that the link is predicted to have.
    """
    guesses, prices, counts = state.guesses, state.prices, state.counts[0]
    sure = min(guesses[rank].ranked_score, SURE)
    if sure < config.threshold_65536:
        return False
    if not config.benefit:
        return True
    copy, backlog = prices[fmt].copy_ns, counts.backlog_ns
    window = distance * prices[0].layer_step_ns
    hidden = min(copy, max(0, window - backlog))
    delayed = min(copy, max(0, backlog + copy - window))
    return bool(sure * hidden > (SURE - sure) * delayed)


@jit_inline
def _named_before(config: PolicyConfig, steps: Steps, guesses: Array, step: int, layer: int, distance: int) -> int:
    """Name what a kind of guess that depends on the recording alone names; return how many."""
    if config.predictor == GUESS_NEXT_GATE:
        return _recorded_guesses(config, steps, guesses, step, layer, distance)
    return _dialled_guesses(config, steps, guesses, step, layer, distance)


@jit_inline
def _rank_named(guesses: Array, found: int) -> None:
    """Put the first `found` named experts in order of falling scores, noted beside them, and clear the scores by expert.

    The insertion sort is stable: of equals the first named stays first.
    """
    for index in range(1, found):
        expert = guesses[index].ranked
        slot = index
        while slot > 0 and guesses[guesses[slot - 1].ranked].score < guesses[expert].score:
            guesses[slot].ranked = guesses[slot - 1].ranked
            slot -= 1
        guesses[slot].ranked = expert
    for index in range(found):
        guesses[index].ranked_score = guesses[guesses[index].ranked].score
        guesses[guesses[index].ranked].score = 0


@jit_inner
def rank_guesses(config: PolicyConfig, steps: Steps, state: PolicyState, step: int, layer: int, distance: int) -> int:
    """Return how many experts are guessed for `layer`, `distance` layers ahead of it; best first in `guesses["ranked"]`."""
    guesses, counts = state.guesses, state.counts[0]
    layer_step = step * config.num_layers + layer
    low, high = steps.layer_step_start[layer_step], steps.layer_step_start[layer_step + 1]
    found, true = 0, 0
    if steps.guessed_start.shape[0]:
        place = layer_step * config.depth + distance - 1
        for index in range(steps.guessed_start[place], steps.guessed_start[place + 1]):
            guesses[found].ranked = steps.guessed[index].expert
            guesses[found].ranked_score = steps.guessed[index].score
            true += steps.guessed[index].true
            found += 1
    elif config.predictor == GUESS_ALL:
        for expert in range(config.num_experts):
            guesses[expert].ranked = expert
            guesses[expert].ranked_score = SURE
        found, true = config.num_experts, high - low
    elif config.predictor == GUESS_NEXT_GATE or config.predictor == GUESS_DIAL or config.predictor == GUESS_ACTIVATION:
        if config.predictor == GUESS_ACTIVATION:
            found = _remembered_guesses(config, steps, state, step, layer)
        else:
            found = _named_before(config, steps, guesses, step, layer, distance)
        for index in range(low, high):
            true += guesses[steps.layer_step_expert[index]].score > 0
        _rank_named(guesses, found)
    else:  # a pre-gate and an oracle know the truth
        for index in range(low, high):
            guesses[found].ranked = steps.layer_step_expert[index]
            guesses[found].ranked_score = SURE
            found += 1
        true = found
    if distance == 1:
        counts.truths += high - low
        counts.guesses_true += true
    return found


def guesses_key(config: PolicyConfig) -> PolicyConfig | None:
    """Return the options that guesses depend on, all others 0, where the recording alone decides what they are; else None."""
    if config.predictor != GUESS_NEXT_GATE and config.predictor != GUESS_DIAL:
        return None
    wide = config.num_experts if config.predictor == GUESS_DIAL else config.guess_width
    nothing = PolicyConfig(*[0] * len(PolicyConfig._fields))
    kept = {name: getattr(config, name) for name in _GUESSING}
    return nothing._replace(**kept | {"width": min(config.width, wide)})


@jit_lean
def tabulate_guesses(config: PolicyConfig, steps: Steps, guesses: Array, start: Array, guessed: Array) -> None:
    """Write into `guessed` what `rank_guesses` finds for every layer step, and into `start` where each list begins.

    guesses: scratch, GUESS [num_experts]. start: int64 [num_layer_steps * depth + 1]. guessed: GUESSED, as many as there may be.
    """
    total = 0
    for layer_step in range(steps.layer_step_start.shape[0] - 1):
        step, layer = layer_step // config.num_layers, layer_step % config.num_layers
        low, high = steps.layer_step_start[layer_step], steps.layer_step_start[layer_step + 1]
        for index in range(low, high):  # this scratch is nobody else's: an expert's `worth` says here that it is needed
            guesses[steps.layer_step_expert[index]].worth = 1.0
        for distance in range(1, config.depth + 1):
            if distance <= layer:
                found = _named_before(config, steps, guesses, step, layer, distance)
                _rank_named(guesses, found)
                for index in range(found):
                    guessed[total].score = guesses[index].ranked_score
                    guessed[total].expert = guesses[index].ranked
                    guessed[total].true = int(guesses[guesses[index].ranked].worth > 0.0)
                    total += 1
            start[layer_step * config.depth + distance] = total
        for index in range(low, high):
            guesses[steps.layer_step_expert[index]].worth = 0.0
