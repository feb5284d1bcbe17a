"""The code around a rule of a policy file: what hands it its values and takes what it returns, compiled for each rule.

Modelled: a body is a function of the state's arrays that calls `rule`; a shell takes them as addresses. Whatever a rule raises or
returns that is no finite number is noted once, with what the rule was given, and the decision falls back to what is always allowed:
the run goes on and is refused at its end (`faults`). Ignored: where rules come from (`policy_file`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ...base.calls import array_at, handle_of
from ...base.jit import jit_inline
from ...base.records import Array
from ...specs.schedules.rules import MISS, PREFETCH, VICTIM
from .records import FAULT, KEY, POOL
from .rules import CORES, FETCH, MERIT, Expert, Guess, Miss, Now, Rule
from .seen import ALL_ROUNDS, FREE_ROUND, may_leave, seen_expert, seen_moment
from .state import ANSWER

# Which rule was at fault.
VICTIM_RULE, MERIT_RULE, PREFETCH_RULE, MISS_RULE = range(1, 5)
_SURE = 65536
ASKED = np.float64


def rule(*given: Any) -> float:
    """Stand for the rule: each body is given its own."""
    raise NotImplementedError


def body(*given: Any) -> int:
    """Stand for the body: each shell is given its own."""
    raise NotImplementedError


@jit_inline
def note_expert(which: int, expert: Expert, now: Now, fault: Array, asked: Array) -> None:
    """Note the first fault of a rule of experts."""
    if fault[0].kind == 0:
        fault[0].kind = 1
        fault[0].rule = which
        asked[0], asked[1], asked[2], asked[3] = expert.layer, expert.expert, expert.tokens, expert.stay_tokens
        asked[4], asked[5], asked[6] = expert.last_used, expert.next_use, expert.merit
        asked[7], asked[8], asked[9], asked[10], asked[11] = (
            now.layer_step,
            now.layer,
            now.num_layers,
            now.num_experts,
            now.age,
        )


@jit_inline
def note_guess(guess: Guess, fault: Array, asked: Array) -> None:
    """Note the first fault of a rule of guesses."""
    if fault[0].kind == 0:
        fault[0].kind = 1
        fault[0].rule = PREFETCH_RULE
        asked[0], asked[1], asked[2], asked[3] = guess.layer, guess.expert, guess.rank, guess.probability
        asked[4], asked[5], asked[6], asked[7] = guess.distance, guess.copy_ns, guess.backlog_ns, guess.layer_step_ns


@jit_inline
def note_miss(miss: Miss, fault: Array, asked: Array) -> None:
    """Note the first fault of a rule of misses."""
    if fault[0].kind == 0:
        fault[0].kind = 1
        fault[0].rule = MISS_RULE
        asked[0], asked[1], asked[2], asked[3], asked[4] = (
            miss.layer,
            miss.expert,
            miss.tokens,
            miss.copy_ns,
            miss.device_ns,
        )
        asked[5], asked[6], asked[7], asked[8] = miss.cores_ns, miss.link_ns, miss.busy_ns, miss.fetched


def victim_body(
    keys: Array, pools: Array, fault: Array, asked: Array, num_layers: int, num_experts: int, pool: int, layer_step: int, prefetching: int
) -> int:  # fmt: skip
    """Return the key with the least score that may leave `pool`, -1 when none may."""
    sentinel = num_layers * num_experts + pool
    now = seen_moment(num_layers, num_experts, pools, pool, layer_step)
    for search in range(FREE_ROUND, FREE_ROUND + 1 if prefetching else ALL_ROUNDS):
        best, least = -1, 0.0
        key = keys[sentinel].prev  # from the least recent end
        while key != sentinel:
            if may_leave(keys, key, layer_step, search):
                expert = seen_expert(num_experts, keys, key)
                score = math.nan
                try:
                    score = 1.0 * rule(expert, now)
                except Exception:  # noqa: BLE001 - whatever it is, it is shown with its line
                    score = math.nan
                if not math.isfinite(score):
                    note_expert(VICTIM_RULE, expert, now, fault, asked)
                    score = 0.0
                if best < 0 or score < least:
                    best, least = key, score
            key = keys[key].prev
        if best >= 0:
            return int(best)
    return -1


def merit_body(
    keys: Array, pools: Array, fault: Array, asked: Array, num_layers: int, num_experts: int, pool: int, key: int, layer_step: int
) -> int:  # fmt: skip
    """Give an expert the merit that the rule returns."""
    expert, now = seen_expert(num_experts, keys, key), seen_moment(num_layers, num_experts, pools, pool, layer_step)
    merit = math.nan
    try:
        merit = 1.0 * rule(expert, now)
    except Exception:  # noqa: BLE001
        merit = math.nan
    if not math.isfinite(merit):
        note_expert(MERIT_RULE, expert, now, fault, asked)
        merit = 0.0
    keys[key].merit = merit
    return 0


def prefetch_body(
    fault: Array, asked: Array, layer: int, expert: int, rank: int, score: int, distance: int, copy_ns: int, backlog_ns: int,
    layer_step_ns: int,
) -> int:  # fmt: skip
    """Write a guess's score into `asked[ANSWER]`."""
    guess = Guess(
        layer=layer, expert=expert, rank=rank, probability=min(score, _SURE) / _SURE, distance=distance, copy_ns=copy_ns,
        backlog_ns=backlog_ns, layer_step_ns=layer_step_ns,
    )  # fmt: skip
    worth = math.nan
    try:
        worth = 1.0 * rule(guess)
    except Exception:  # noqa: BLE001
        worth = math.nan
    if not math.isfinite(worth):
        note_guess(guess, fault, asked)
        worth = 0.0
    asked[ANSWER] = worth
    return 0


def miss_body(
    fault: Array, asked: Array, layer: int, expert: int, tokens: int, copy_ns: int, device_ns: int, cores_ns: int, link_ns: int,
    busy_ns: int, fetched: int,
) -> int:  # fmt: skip
    """Return FETCH or CORES for a missing expert."""
    miss = Miss(
        layer=layer, expert=expert, tokens=tokens, copy_ns=copy_ns, device_ns=device_ns, cores_ns=cores_ns, link_ns=link_ns,
        busy_ns=busy_ns, fetched=fetched,
    )  # fmt: skip
    choice = math.nan
    try:
        choice = 1.0 * rule(miss)
    except Exception:  # noqa: BLE001
        choice = math.nan
    if choice == CORES:
        return CORES
    if choice != FETCH:
        note_miss(miss, fault, asked)
    return FETCH


def expert_shell(
    keys: Any, num_keys: int, pools: Any, num_pools: int, fault: Any, num_faults: int, asked: Any, num_asked: int, a: int, b: int,
    c: int, d: int, e: int,
) -> int:  # fmt: skip
    """Hand the arrays at these addresses to the body of a rule of experts."""
    return body(
        array_at(keys, (num_keys,), KEY), array_at(pools, (num_pools,), POOL), array_at(fault, (num_faults,), FAULT),
        array_at(asked, (num_asked,), ASKED), a, b, c, d, e,
    )  # fmt: skip


def guess_shell(
    fault: Any,
    num_faults: int,
    asked: Any,
    num_asked: int,
    a: int,
    b: int,
    c: int,
    d: int,
    e: int,
    f: int,
    g: int,
    h: int,
) -> int:
    """Hand the arrays at these addresses to the body of a rule of guesses."""
    fault_array, asked_array = array_at(fault, (num_faults,), FAULT), array_at(asked, (num_asked,), ASKED)
    return body(fault_array, asked_array, a, b, c, d, e, f, g, h)


def miss_shell(
    fault: Any,
    num_faults: int,
    asked: Any,
    num_asked: int,
    a: int,
    b: int,
    c: int,
    d: int,
    e: int,
    f: int,
    g: int,
    h: int,
    i: int,
) -> int:
    """Hand the arrays at these addresses to the body of a rule of misses."""
    fault_array, asked_array = array_at(fault, (num_faults,), FAULT), array_at(asked, (num_asked,), ASKED)
    return body(fault_array, asked_array, a, b, c, d, e, f, g, h, i)


_CODE: dict[str, tuple[Callable[..., int], Callable[..., int], tuple[int, int]]] = {
    VICTIM: (expert_shell, victim_body, (4, 5)),
    MERIT: (expert_shell, merit_body, (4, 5)),
    PREFETCH: (guess_shell, prefetch_body, (2, 8)),
    MISS: (miss_shell, miss_body, (2, 9)),
}
_HANDLES: dict[tuple[str, str], int] = {}


def handle(given: Rule, digest: str) -> int:
    """Return the handle of a rule's code, compiled once in each process; digest: of the file that it stands in."""
    if (given.kind, given.name) not in _HANDLES:
        shell, code, counts = _CODE[given.kind]
        _HANDLES[given.kind, given.name] = handle_of(
            shell, code, given.function, counts, f"{digest}-{given.kind}-{given.name}"
        )
    return _HANDLES[given.kind, given.name]
