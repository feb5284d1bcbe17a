"""Asking a rule of a policy file: through a handle, so that one's own rule needs no new machine code of the simulator.

Modelled: a handle is the address of the rule's machine code (`rule_code`), or stands for the plain function where nothing is compiled.
A whole search for a victim is one call; a merit, a guess and a miss are one each. Ignored: what the rules do.
"""

from __future__ import annotations

from ...base.calls import call_at
from ...base.jit import jit_inline, jit_inner
from .rules import Miss
from .state import ABSENT, ANSWER, PolicyConfig, PolicyState


@jit_inline
def ask_victim(config: PolicyConfig, state: PolicyState, pool: int, layer_step: int, prefetching: bool) -> int:
    """Return the key that leaves `pool`, or -1 when none may."""
    arrays = (state.keys, state.pools, state.fault, state.asked)
    numbers = (config.num_layers, config.num_experts, pool, layer_step, int(prefetching))
    return call_at(state.rules[0].victim, arrays, numbers)


@jit_inline
def ask_merit(config: PolicyConfig, state: PolicyState, pool: int, key: int, layer_step: int) -> None:
    """Give `key` the merit that its policy's rule returns."""
    arrays = (state.keys, state.pools, state.fault, state.asked)
    call_at(state.rules[0].merit, arrays, (config.num_layers, config.num_experts, pool, key, layer_step))


@jit_inline
def ask_miss(state: PolicyState, miss: Miss) -> int:
    """Return FETCH or CORES."""
    numbers = (
        miss.layer, miss.expert, miss.tokens, miss.copy_ns, miss.device_ns, miss.cores_ns, miss.link_ns, miss.busy_ns, miss.fetched,
    )  # fmt: skip
    return call_at(state.rules[0].miss, (state.fault, state.asked), numbers)


@jit_inner
def rank_by_rule(config: PolicyConfig, state: PolicyState, base: int, distance: int, num_guesses: int) -> None:
    """Put guesses in the order of a rule's scores, the greatest first, and note each one's score; equals keep their order."""
    keys, guesses, prices = state.keys, state.guesses, state.prices
    backlog = state.counts[0].backlog_ns
    for rank in range(num_guesses):
        key = base + guesses[rank].ranked
        copy = prices[0 if config.low_rank >= 0 else keys[key].format].copy_ns
        numbers = (
            base // config.num_experts, guesses[rank].ranked, rank, guesses[rank].ranked_score, distance, copy, backlog,
            prices[0].layer_step_ns,
        )  # fmt: skip
        call_at(state.rules[0].prefetch, (state.fault, state.asked), numbers)
        guesses[rank].worth = state.asked[ANSWER]
        if keys[key].where == ABSENT:  # what is there already needs no copy
            backlog += copy
    for rank in range(1, num_guesses):
        expert, score, worth = guesses[rank].ranked, guesses[rank].ranked_score, guesses[rank].worth
        place = rank
        while place > 0 and guesses[place - 1].worth < worth:
            guesses[place].ranked = guesses[place - 1].ranked
            guesses[place].ranked_score = guesses[place - 1].ranked_score
            guesses[place].worth = guesses[place - 1].worth
            place -= 1
        guesses[place].ranked = expert
        guesses[place].ranked_score = score
        guesses[place].worth = worth
